"""load() and save(): every format returns what was stored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import FormatError, SaveError
from legomole.core.formats import FORMATS, detect, from_state_dict, load, save, summarise, to_state_dict
from legomole.core.formats.peft import Peft
from legomole.core.formats.suffixes import role_of
from legomole.core.lowrank import LowRank
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import run
from safetensors.torch import load_file
from torch import Tensor

from ... import lora_files as files


def adapter(names: list[str], dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    """Mixed ranks and scales, one 3x3 and one 1x1 convolution."""
    g = torch.Generator().manual_seed(seed)
    kernels = [(), (3, 3), (1, 1)]
    modules = {}
    for i, name in enumerate(names):
        r, kernel = 2 + i, kernels[i % 3]
        A = torch.randn(r, 6 * math.prod(kernel), generator=g).to(dtype)
        B = torch.randn(5, r, generator=g).to(dtype)
        modules[name] = LowRank(A, B, None if i == 0 else 1.5 * (i + 1), kernel)
    return Adapter(modules, metadata={"title": "ünï", "a": "1"})


NAMES = {
    "kohya": ["lora_unet_a_to_q", "lora_unet_conv1", "lora_te_b_proj_in"],
    "comfy": ["diffusion_model.a.to_q", "diffusion_model.conv", "text_encoders.clip_l.transformer.b"],
    "diffusers": ["unet.a.to_q", "unet.conv", "text_encoder.b"],
    "peft": ["model.layers.0.q_proj", "model.conv", "model.layers.10.q_proj"],
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = adapter(NAMES[format], dtype)
    path = save(original, tmp_path / "out", format=format)
    back = load(path)
    assert path == tmp_path / ("out" if format == "peft" else "out.safetensors")
    assert back.source.format == format
    assert len(back.source.sha256) == 64
    assert list(back.modules) == sorted(original.modules)
    for name, part in original.modules.items():
        found = back.modules[name]
        assert (found.kernel, found.dtype, found.rank) == (part.kernel, dtype, part.rank)
        # only diffusers' folded scale is rounded, once, in one factor; the rest is float32 arithmetic of the test
        eps = torch.finfo(dtype).eps if format == "diffusers" else 0.0
        bound = (eps + 1e-6) * part.scale * (part.B.float().abs() @ part.A.float().abs())
        assert bool(((found.delta() - part.delta()).abs() <= bound).all())
    assert {key: back.metadata[key] for key in original.metadata} == dict(original.metadata)


@pytest.mark.parametrize("format", FORMATS)
def test_same_bytes_every_time(format: str, tmp_path: Path) -> None:
    names = NAMES[format]
    shuffled = adapter(names)
    shuffled = Adapter(
        dict(reversed(shuffled.modules.items())), metadata=dict(reversed(list(shuffled.metadata.items())))
    )
    first, second = (save(a, tmp_path / n, format=format) for a, n in ((adapter(names), "a"), (shuffled, "b")))
    paths = [
        (p / "adapter_model.safetensors", p / "adapter_config.json") if p.is_dir() else (p,) for p in (first, second)
    ]
    assert [p.read_bytes() for p in paths[0]] == [p.read_bytes() for p in paths[1]]


def test_kohya_keys_and_alpha() -> None:
    state = to_state_dict(adapter(NAMES["kohya"]), "kohya")
    assert state["lora_unet_a_to_q.alpha"] == 2  # no alpha given: the rank
    assert state["lora_unet_conv1.alpha"] == 3  # 1.5 * 2
    assert state["lora_unet_conv1.lora_down.weight"].shape == (3, 6, 3, 3)
    assert state["lora_unet_conv1.lora_up.weight"].shape == (5, 3, 1, 1)
    assert state["lora_te_b_proj_in.lora_down.weight"].shape == (4, 6, 1, 1)


def test_diffusers_folds_the_scale_and_writes_no_alpha() -> None:
    a = adapter(NAMES["diffusers"])
    state = to_state_dict(a, "diffusers")
    assert not [key for key in state if "alpha" in key]
    for name, part in a.modules.items():
        delta = state[f"{name}.lora_B.weight"].flatten(1) @ state[f"{name}.lora_A.weight"].flatten(1)
        torch.testing.assert_close(delta, part.delta())


def test_the_scale_is_folded_into_the_factor_with_room_for_it() -> None:
    # |A| is near the largest fp16 value: a scale of 8 must go into B
    part = LowRank(torch.full((1, 2), 60000.0).half(), torch.full((2, 1), 0.5).half(), alpha=8.0)
    state = to_state_dict(Adapter({"unet.x": part}), "diffusers")
    assert state["unet.x.lora_A.weight"].tolist() == [[60000, 60000]]
    assert state["unet.x.lora_B.weight"].tolist() == [[4], [4]]


@pytest.mark.parametrize("format", FORMATS)
def test_read_by_the_library(format: str, tmp_path: Path) -> None:
    """Our writer against safetensors' own reader: the same values under the same keys."""
    a = adapter(NAMES[format])
    path = save(a, tmp_path / "out", format=format)
    found = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
    expected = to_state_dict(a, format)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(
    ("keys", "module"),
    [
        (("X.lora_down.weight", "X.lora_up.weight"), "X"),
        (("a.b.lora_A.weight", "a.b.lora_B.weight"), "a.b"),
        (("a.b.lora_A.default.weight", "a.b.lora_B.default.weight"), "a.b"),
        (("a.b.lora_A", "a.b.lora_B"), "a.b"),
        (("unet.a.to_k.lora.down.weight", "unet.a.to_k.lora.up.weight"), "unet.a.to_k"),
        (("t.q_proj.lora_linear_layer.down.weight", "t.q_proj.lora_linear_layer.up.weight"), "t.q_proj"),
        (("a.attn1.processor.to_q_lora.down.weight", "a.attn1.processor.to_q_lora.up.weight"), "a.attn1.to_q"),
        (("a.attn1.processor.to_out_lora.down.weight", "a.attn1.processor.to_out_lora.up.weight"), "a.attn1.to_out.0"),
        (("t.self_attn.to_out_lora.down.weight", "t.self_attn.to_out_lora.up.weight"), "t.self_attn.out_proj"),
        (
            ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
            "double_blocks.0.processor.qkv_lora1",
        ),
        (("m.embed.lora_embedding_A", "m.embed.lora_embedding_B"), "m.embed.lora_embedding"),
    ],
)
def test_suffixes(keys: tuple[str, str], module: str) -> None:
    assert [role_of(key) for key in keys] == [(module, "down"), (module, "up")]
    found = from_state_dict({keys[0]: torch.ones(2, 3), keys[1]: torch.ones(4, 2)})
    assert {name: (part.d_out, part.d_in, part.scale) for name, part in found.modules.items()} == {module: (4, 3, 1.0)}


def test_one_file_may_mix_suffixes() -> None:
    state = {
        **files.state_dict({"a.x": (4, 3)}, files.KOHYA, alpha=2.0),
        **files.state_dict({"a.y": (4, 3)}, files.PEFT, alpha=None),
    }
    found = from_state_dict(state)
    assert {name: part.scale for name, part in found.modules.items()} == {"a.x": 0.5, "a.y": 1.0}


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_alpha(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    state = files.state_dict({"lora_unet_x": (4, 3)}, rank=4, alpha=None)
    state["lora_unet_x.alpha"] = torch.full(shape, 6.0, dtype=dtype)
    assert from_state_dict(state).modules["lora_unet_x"].scale == 1.5


def test_tucker_is_folded() -> None:
    """delta[o, c, h, w] = sum_pq up[o, p] mid[p, q, h, w] down[q, c]."""
    down, mid, up = torch.randn(2, 3, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(5, 2, 1, 1)
    found = from_state_dict(
        {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_mid.weight": mid, "lora_unet_x.lora_up.weight": up}
    ).modules["lora_unet_x"]
    dense = torch.einsum("op,pqhw,qc->ochw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert found.kernel == (3, 3)
    assert found.rank == 2
    torch.testing.assert_close(found.delta(), dense.flatten(1))


def test_one_by_one_convolution_stored_flat_or_not() -> None:
    flat = from_state_dict(files.state_dict({"lora_unet_x": (4, 3)})).modules["lora_unet_x"]
    conv = from_state_dict(files.state_dict({"lora_unet_x": (4, 3, 1, 1)})).modules["lora_unet_x"]
    assert (flat.kernel, conv.kernel) == ((), (1, 1))
    assert flat.A.shape == conv.A.shape


def test_factors_are_views_in_their_dtype() -> None:
    state = files.state_dict({"lora_unet_x": (4, 3, 3, 3)}, dtype=torch.float16)
    part = from_state_dict(state).modules["lora_unet_x"]
    assert part.A.dtype == torch.float16
    assert part.A.data_ptr() == state["lora_unet_x.lora_down.weight"].data_ptr()


def test_eight_bit_floats_are_kept() -> None:
    state = files.state_dict({"lora_unet_x": (4, 3)}, dtype=torch.float8_e4m3fn)
    assert from_state_dict(state).modules["lora_unet_x"].A.dtype == torch.float8_e4m3fn


def test_diffs_and_extras(tmp_path: Path) -> None:
    state = {
        **files.state_dict({"diffusion_model.x": (4, 3)}),
        "diffusion_model.x.diff_b": torch.randn(4),
        "diffusion_model.norm.diff": torch.randn(3),
        "diffusion_model.y.set_weight": torch.randn(2, 2),
        "bundle_emb.word.clip_l": torch.randn(1, 8),
    }
    found = load(files.write(tmp_path / "x.safetensors", state))
    assert dict(found.diffs).keys() == {"diffusion_model.x.bias", "diffusion_model.norm.weight"}
    assert torch.equal(found.diffs["diffusion_model.norm.weight"], state["diffusion_model.norm.diff"])
    assert found.extras.keys() == {"diffusion_model.y.set_weight", "bundle_emb.word.clip_l"}
    again = load_file(save(found, tmp_path / "y"))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key].double(), state[key].double()) for key in state)


def test_lycoris_norms_are_diffs() -> None:
    state = files.state_dict({"lora_unet_x": (4, 3)})
    state |= {"lora_unet_n.w_norm": torch.ones(3), "lora_unet_n.b_norm": torch.zeros(3)}
    assert from_state_dict(state).diffs.keys() == {"lora_unet_n.weight", "lora_unet_n.bias"}


def test_bias_of_B_carries_the_scale() -> None:
    # PEFT: (B(A x) + b) * scale, so the layer's bias gains scale * b; alpha 2 at rank 4: scale 0.5
    state = {**files.state_dict({"unet.x": (2, 3)}, files.PEFT), "unet.x.lora_B.bias": torch.tensor([1.0, 4.0])}
    assert from_state_dict(state).diffs["unet.x.bias"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_biases_are_written_for_all_layers_or_none(format: str) -> None:
    names = NAMES[format]
    a = adapter(names)
    biased = Adapter(a.modules, {f"{names[1]}.bias": torch.arange(5.0)})
    state = to_state_dict(biased, format)
    assert sum(key.endswith(".lora_B.bias") for key in state) == 3
    metadata = {"adapter_config": json.dumps(Peft().config(biased))} if format == "peft" else {}
    back = from_state_dict(state, metadata).diffs
    torch.testing.assert_close(back[f"{names[1]}.bias"], torch.arange(5.0))
    assert not back[f"{names[0]}.bias"].any()


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_norms_cannot_be_written_in_every_format(format: str) -> None:
    a = Adapter(adapter(NAMES[format]).modules, {"unet.norm.weight": torch.ones(3)})
    with pytest.raises(SaveError, match="no place for changes of norms"):
        to_state_dict(a, format)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_foreign_names_are_refused(format: str, tmp_path: Path) -> None:
    foreign = {"kohya": "unet.x", "diffusers": "lora_unet_x", "peft": "lora_unet_x"}[format]
    with pytest.raises(SaveError, match=foreign):
        save(adapter([foreign]), tmp_path / "x", format=format)
    assert not list(tmp_path.iterdir())


def test_the_format_is_detected_from_the_names(tmp_path: Path) -> None:
    for format in ("kohya", "comfy", "diffusers"):
        assert load(save(adapter(NAMES[format]), tmp_path / format)).source.format == format
    peft = Adapter(adapter(NAMES["peft"]).modules, metadata={"adapter_config": '{"peft_type": "LORA"}'})
    assert save(peft, tmp_path / "peft").is_dir()


def test_detect() -> None:
    assert detect(["lora_te2_x.alpha"]) == "kohya"
    assert detect(["base_model.model.x.lora_A.weight"]) == "peft"
    assert detect(["diffusion_model.x.lora_A.weight"]) == "comfy"
    assert detect(["transformer_blocks.0.attn.to_q.lora_down.weight"]) == "comfy"
    assert detect(["transformer.x.lora_A.weight"]) == "diffusers"


def test_cast(tmp_path: Path) -> None:
    a = Adapter(adapter(NAMES["kohya"]).modules, {"lora_unet_n.weight": torch.ones(2)}, {"emb": torch.ones(2)})
    back = load(save(a, tmp_path / "x", dtype=torch.bfloat16))
    assert {part.A.dtype for part in back.modules.values()} == {torch.bfloat16}
    assert back.diffs["lora_unet_n.weight"].dtype == torch.bfloat16
    assert back.extras["emb"].dtype == torch.float32


def test_overflow_is_an_error(tmp_path: Path) -> None:
    a = Adapter({"lora_unet_x": LowRank(torch.full((1, 2), 1e5), torch.ones(2, 1))})
    with pytest.raises(SaveError, match=r"too large for float16[\s\S]*lora_unet_x[\s\S]*bf16 or fp32"):
        save(a, tmp_path / "x", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


BARE = {  # names without a prefix, which their readers do not know with one
    "LTX": "transformer_blocks.0.attn1.to_q",
    "Mochi": "blocks.0.attn.qkv_x",
    "BFL control": "img_in",
}


@pytest.mark.parametrize("case", BARE)
def test_bare_names_are_written_unchanged(case: str, tmp_path: Path) -> None:
    state = files.state_dict({BARE[case]: (4, 3)}, files.PEFT, alpha=None)
    path = files.write(tmp_path / "x.safetensors", state)
    assert not FORMATS["diffusers"].is_native_name(BARE[case])  # not diffusers' own names: a host must translate them
    merged = run(Recipe(method="concat", inputs=[Input(path=str(path), weight=0.5)])).adapter
    assert load_file(save(merged, tmp_path / "y")).keys() == state.keys()


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_processors_are_written_unchanged(prefix: str, tmp_path: Path) -> None:
    """Their readers know neither alpha nor lora_down."""
    layer = f"{prefix}double_blocks.0.processor.qkv_lora1"
    state = files.state_dict({layer: (6, 3)}, ("down.weight", "up.weight"), alpha=None)
    path = files.write(tmp_path / "x.safetensors", state)
    merged = run(Recipe(method="concat", inputs=[Input(path=str(path), weight=0.5)])).adapter
    found = load_file(save(merged, tmp_path / "y"))
    assert found.keys() == state.keys()
    torch.testing.assert_close(
        found[f"{layer}.up.weight"] @ found[f"{layer}.down.weight"],
        0.5 * state[f"{layer}.up.weight"] @ state[f"{layer}.down.weight"],
    )


def test_summary_without_reading(tmp_path: Path) -> None:
    state: dict[str, Tensor] = files.state_dict({"lora_unet_a": (4, 3), "lora_unet_b": (4, 3)}, dtype=torch.float16)
    state |= {"lora_unet_c.lokr_w1": torch.ones(2, 2), "lora_unet_c.dora_scale": torch.ones(2), "odd": torch.ones(1)}
    summary = summarise(files.write(tmp_path / "x.safetensors", state, {"ss_x": "1"}))
    assert summary.format == "kohya"
    assert summary.modules == 3
    assert summary.roles == {"alpha": 2, "dora": 1, "down": 2, "lokr_w1": 1, "up": 2}
    assert summary.ranks == {4: 2}
    assert summary.dtypes == {"F16": 6, "F32": 3}
    assert summary.others == ("odd",)
    assert summary.metadata == {"ss_x": "1"}


def test_diffusers_configuration_gives_the_scale() -> None:
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"b.x": 2},
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 4,
    }
    shapes = {"transformer.a.x": (4, 3), "transformer.b.x": (4, 3), "text_encoder.x": (4, 3)}
    state = files.state_dict(shapes, files.PEFT, alpha=None)
    found = from_state_dict(state, {"lora_adapter_metadata": json.dumps(config)})
    assert {name: part.scale for name, part in found.modules.items()} == {
        "transformer.a.x": 2.0,
        "transformer.b.x": 0.5,
        "text_encoder.x": 1.0,
    }


def test_the_written_diffusers_file_has_no_stale_configuration(tmp_path: Path) -> None:
    state = files.state_dict({"unet.x": (4, 3)}, files.PEFT, alpha=None)
    found = from_state_dict(state, {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'})
    back = load(save(found, tmp_path / "x"))
    assert "lora_adapter_metadata" not in back.metadata
    torch.testing.assert_close(back.modules["unet.x"].delta(), found.modules["unet.x"].delta())


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="no such format"):
        save(adapter(["x"]), tmp_path / "x", format="onnx")


def test_source_names_the_format() -> None:
    state = files.state_dict({"lora_unet_x": (4, 3)})
    assert from_state_dict(state, source=Source("here")).source == Source("here", "", "kohya")
    with pytest.raises(FormatError, match="here"):
        from_state_dict({"odd": torch.ones(1)}, source=Source("here"))
