"""diffusers as the oracle: its own conversions of real tensors, and its own loading of our files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import lora_pipeline  # noqa: E402
from legomole.core.adapter import Adapter  # noqa: E402
from legomole.core.errors import MergeError  # noqa: E402
from legomole.core.formats import from_state_dict, load, save  # noqa: E402
from legomole.core.formats.suffixes import classify  # noqa: E402
from legomole.core.layers.align import align  # noqa: E402
from legomole.core.layers.keymap import apply_key_map  # noqa: E402
from legomole.core.lowrank import LowRank  # noqa: E402
from legomole.core.recipes.recipe import Input, Recipe  # noqa: E402
from legomole.core.recipes.run import run  # noqa: E402
from legomole.hosts.diffusers.layer_names import key_map, to_diffusers, to_kohya  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ... import lora_files as files  # noqa: E402

# warnings within the libraries: deprecations, and PEFT's that `proj_out` is also the end of another layer's name
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")


def kohya(shapes: files.Shapes, **options: Any) -> Adapter:
    return from_state_dict(files.state_dict(shapes, files.KOHYA, **options))


def split(shapes: files.Shapes) -> Adapter:
    return from_state_dict(files.state_dict(shapes, files.PEFT, alpha=None, seed=1))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def act(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The update applied to four random inputs: distinguishes deltas at a fraction of their size."""
    X = torch.randn(A.shape[1], 4, generator=torch.Generator().manual_seed(A.shape[1]))
    return scale * (B @ (A @ X))


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {name: act(part.A, part.B, part.scale) for name, part in adapter.modules.items()}


def converted_by_diffusers(loader: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The deltas that the library's loader makes of the real tensors."""
    config = SimpleNamespace(layers_per_block=2)
    result = getattr(lora_pipeline, loader).lora_state_dict(
        {key: tensor.clone() for key, tensor in state.items()},  # some loaders scale in place
        unet_config=config,
    )
    tensors, alphas = result if isinstance(result, tuple) else (result, None)
    found = {}
    for module, keys in classify(tensors)[0].items():
        scale = 2.0 / 4 if alphas else 1.0  # every alpha of the file is 2 at rank 4
        found[module] = act(tensors[keys["down"]].flatten(1), tensors[keys["up"]].flatten(1), scale)
    return found


@pytest.mark.parametrize(
    ("first", "second", "loader"),
    [
        (files.KOHYA_SD15, files.DIFFUSERS_SD15, "StableDiffusionLoraLoaderMixin"),
        (files.KOHYA_SDXL, files.DIFFUSERS_SDXL, "StableDiffusionXLLoraLoaderMixin"),
        (files.KOHYA_FLUX, files.AI_TOOLKIT_FLUX, "FluxLoraLoaderMixin"),
    ],
    ids=["SD1.5", "SDXL", "Flux"],
)
def test_kohya_meets_diffusers(first: files.Shapes, second: files.Shapes, loader: str) -> None:
    state = files.state_dict(first)
    a, b = align([from_state_dict(state), split(second)], key_map=key_map)
    assert a.modules.keys() == b.modules.keys()
    a, b = to_diffusers(a), to_diffusers(b)
    assert a.modules.keys() == b.modules.keys() == second.keys()
    expected = converted_by_diffusers(loader, state)
    # the Flux loader forgets the component and the alpha of these
    for name in ("norm_out.linear", "x_embedder"):
        if name in expected:
            expected[f"transformer.{name}"] = expected.pop(name) * (0.5 if name == "norm_out.linear" else 1.0)
    same(deltas(a), expected)
    same(deltas(b), deltas(split(second)))


def test_kohya_sd3_meets_diffusers() -> None:
    """By hand: qkv is three thirds, the last block's context modulation swaps its halves (scale before shift)."""
    original = kohya(files.KOHYA_SD3)
    a, b = align([original, split(files.DIFFUSERS_SD3)], key_map=key_map)
    assert a.modules.keys() == b.modules.keys()
    qkv, fc1, mod, text = deltas(original).values()
    same(
        deltas(a),
        {
            **{
                f"transformer.transformer_blocks.0.attn.to_{x}": qkv[1536 * i : 1536 * (i + 1)]
                for i, x in enumerate("qkv")
            },
            "transformer.transformer_blocks.0.ff_context.net.0.proj": fc1,
            "transformer.transformer_blocks.23.norm1_context.linear": torch.cat([mod[1536:], mod[:1536]]),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1": text,
        },
    )


def test_only_the_last_sd3_block_is_swapped() -> None:
    name = "lora_unet_joint_blocks_5_context_block_adaLN_modulation_1"
    shapes = {name: (9216, 1536), "lora_unet_joint_blocks_5_x_block_attn_qkv": (4608, 1536)}
    (piece,) = key_map([kohya(shapes)])[name]
    assert (piece.target, piece.rows) == ("transformer.transformer_blocks.5.norm1_context.linear", None)


THIRDS = tuple(((3072 * i, 3072 * (i + 1)),) for i in range(3))
TARGETS = {
    "XLabs": (
        files.XLABS_FLUX,
        {
            "double_blocks.0.processor.qkv_lora1": [
                (f"transformer.transformer_blocks.0.attn.to_{x}", rows) for x, rows in zip("qkv", THIRDS, strict=True)
            ],
            "double_blocks.0.processor.proj_lora2": [("transformer.transformer_blocks.0.attn.to_add_out", None)],
            "single_blocks.0.processor.qkv_lora": [
                (f"transformer.single_transformer_blocks.0.attn.to_{x}", rows)
                for x, rows in zip("qkv", THIRDS, strict=True)
            ],
        },
    ),
    "OneTrainer": (
        files.ONETRAINER_FLUX,
        {
            "lora_transformer_transformer_blocks_0_attn_to_q": [("transformer.transformer_blocks.0.attn.to_q", None)],
            "lora_transformer_single_transformer_blocks_0_proj_out": [
                ("transformer.single_transformer_blocks.0.proj_out", None)
            ],
        },
    ),
    "Wan": (
        files.WAN,
        {
            "diffusion_model.blocks.0.self_attn.q": [("transformer.blocks.0.attn1.to_q", None)],
            "diffusion_model.blocks.7.ffn.0": [("transformer.blocks.7.ffn.net.0.proj", None)],
        },
    ),
    "Wan, musubi": (
        files.WAN_MUSUBI,
        {
            "lora_unet_blocks_0_self_attn_q": [("transformer.blocks.0.attn1.to_q", None)],
            "lora_unet_blocks_7_ffn_0": [("transformer.blocks.7.ffn.net.0.proj", None)],
        },
    ),
    "Z-Image": (
        files.Z_IMAGE,
        {
            f"diffusion_model.layers.0.attention.to_{x}": [(f"transformer.layers.0.attention.to_{x}", None)]
            for x in "qkv"
        },
    ),
    "Z-Image, fused": (
        files.Z_IMAGE_KOHYA,
        {
            "lora_unet_layers_0_attention_qkv": [
                (f"transformer.layers.0.attention.to_{x}", ((384 * i, 384 * (i + 1)),)) for i, x in enumerate("qkv")
            ]
        },
    ),
    "HunyuanVideo": (
        files.HUNYUAN,
        {
            "transformer.double_blocks.0.img_attn_qkv": [
                (f"transformer.transformer_blocks.0.attn.to_{x}", rows) for x, rows in zip("qkv", THIRDS, strict=True)
            ],
            "transformer.double_blocks.0.img_mlp.fc1": [("transformer.transformer_blocks.0.ff.net.0.proj", None)],
        },
    ),
    "Flux2": (
        files.FLUX2,
        {
            "lora_unet_double_blocks_0_img_mlp_0": [("transformer.transformer_blocks.0.ff.linear_in", None)],
            "lora_unet_single_blocks_0_linear1": [
                ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", None)
            ],
        },
    ),
}


@pytest.mark.parametrize("dialect", TARGETS)
def test_other_dialects(dialect: str) -> None:
    shapes, expected = TARGETS[dialect]
    found = key_map([kohya(shapes)])
    assert {name: sorted((p.target, p.rows) for p in pieces) for name, pieces in found.items()} == {
        name: sorted(pieces) for name, pieces in expected.items()
    }


def test_comfyui_names_mean_the_same_as_kohyas() -> None:
    dotted = {
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": (640, 640),
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj": (1280, 1280),
    }
    found = {pieces[0].target for pieces in key_map([kohya(dotted)]).values()}
    assert found <= files.DIFFUSERS_SDXL.keys()
    assert len(found) == 2


def test_layers_without_a_diffusers_name_keep_their_names() -> None:
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    odd = "lora_unet_double_blocks_0_no_such_layer"
    original = kohya({**files.KOHYA_FLUX, t5: (64, 64), odd: (64, 64)})
    found = key_map([original])
    assert original.modules.keys() - found.keys() == {t5, odd}
    assert {t5, odd} <= apply_key_map(original, found).modules.keys()
    with pytest.raises(MergeError, match=t5):
        to_diffusers(original)


def test_the_key_map_does_not_depend_on_rank_or_values() -> None:
    """A block-sparse up factor of rank 3r makes the loader split A too; the key map remains a plain split of rows."""
    state = files.state_dict({"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)}, rank=3)
    up = state["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    for i in range(3):
        up[3072 * i : 3072 * (i + 1), [j for j in range(3) if j != i]] = 0
    original = from_state_dict(state)
    found = to_diffusers(original)
    assert {part.rank for part in found.modules.values()} == {3}
    after, (before,) = deltas(found), deltas(original).values()
    torch.testing.assert_close(
        torch.cat([after[f"transformer.transformer_blocks.0.attn.to_{x}"] for x in "qkv"]), before
    )


@pytest.mark.parametrize(
    ("shapes", "given"), [(files.DIFFUSERS_SD15, files.KOHYA_SD15), (files.DIFFUSERS_SDXL, None)], ids=["SD1.5", "SDXL"]
)
def test_to_kohya_and_back(shapes: files.Shapes, given: files.Shapes | None, tmp_path: Path) -> None:
    original = split(shapes)
    path = save(to_kohya(original), tmp_path / "x", format="kohya")
    back = load(path)
    if given is not None:
        assert back.modules.keys() == given.keys()
    assert all(name.startswith(("lora_unet_", "lora_te")) for name in back.modules)
    same(deltas(to_diffusers(back)), deltas(original))


def test_no_kohya_names_for_flux() -> None:
    with pytest.raises(MergeError, match="Stable Diffusion"):
        to_kohya(split(files.AI_TOOLKIT_FLUX))


@pytest.mark.parametrize("swap", [False, True])
def test_a_merge_with_layers_without_a_diffusers_name_can_be_saved(swap: bool, tmp_path: Path) -> None:
    """T5 layers have no diffusers names; the file then holds names of two dialects, and readers know both."""
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    shapes = ({**files.KOHYA_FLUX, t5: (64, 64)}, files.AI_TOOLKIT_FLUX)
    paths = [
        files.write(tmp_path / "kohya.safetensors", files.state_dict(shapes[0])),
        files.write(tmp_path / "split.safetensors", files.state_dict(shapes[1], files.PEFT, alpha=None)),
    ]
    inputs = [Input(path=str(path)) for path in (reversed(paths) if swap else paths)]
    merged = run(Recipe(method="concat", inputs=inputs), key_map=key_map).adapter
    assert load(save(merged, tmp_path / "x")).modules.keys() == {*files.AI_TOOLKIT_FLUX, t5}


def test_inputs_that_disagree_are_saved_under_the_names_of_comfyui(tmp_path: Path) -> None:
    """It does not read Wan's names of diffusers."""
    shapes: files.Shapes = {"transformer.blocks.0.attn1.to_q": (512, 512)}
    paths = [
        files.write(tmp_path / "native.safetensors", files.state_dict(files.WAN)),
        files.write(tmp_path / "diffusers.safetensors", files.state_dict(shapes, files.PEFT, alpha=None)),
    ]
    merged = run(Recipe(method="concat", inputs=[Input(path=str(path)) for path in paths]), key_map=key_map).adapter
    assert merged.source.format == "comfy"
    assert merged.modules.keys() == files.WAN.keys()


# --- tiny models ------------------------------------------------------------------------------------------------------


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config)


def sd15() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, attention_head_dim=2,
        norm_num_groups=4,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=text_encoder(), tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=text_encoder(), tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=text_encoder(), tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip


def lora_for(pipeline: Any) -> Adapter:
    """A LoRA on every third linear or convolutional layer, every one with its own rank and scale."""
    modules: dict[str, LowRank] = {}
    components = {"unet": getattr(pipeline, "unet", None), "transformer": getattr(pipeline, "transformer", None)}
    components["text_encoder"] = pipeline.text_encoder
    g = torch.Generator().manual_seed(0)
    for component, model in components.items():
        if model is None:
            continue
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        # the layers that loaders accept in a text encoder
        layers = [(n, m) for n, m in layers if component != "text_encoder" or n.endswith(("_proj", "fc1", "fc2"))]
        for i, (name, layer) in enumerate(layers[::3]):
            shape = layer.weight.shape
            prefix = "text_model." if component == "text_encoder" and not name.startswith("text_model.") else ""
            r = 1 + i % 3
            A, B = torch.randn(r, shape[1:].numel(), generator=g), torch.randn(shape[0], r, generator=g)
            modules[f"{component}.{prefix}{name}"] = LowRank(A, B, 0.5 * (i % 5) or None, tuple(shape[2:]))
    return Adapter(modules)


@pytest.mark.parametrize("pipeline", [sd15, flux, sd3])
def test_our_file_in_a_pipeline(pipeline: Any, tmp_path: Path) -> None:
    """load_lora_weights on a tiny model: every layer gains its delta, and no other layer changes."""
    pipe = pipeline()
    lora = lora_for(pipe)
    assert len({part.rank for part in lora.modules.values()}) == 3
    path = save(lora, tmp_path / "x", format="diffusers")
    before = {
        f"{c}.{n}": p.detach().clone()
        for c in ("unet", "transformer", "text_encoder")
        if getattr(pipe, c, None) is not None
        for n, p in getattr(pipe, c).named_parameters()
    }
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    pipe.fuse_lora(
        components=[c for c in ("unet", "transformer", "text_encoder") if getattr(pipe, c, None) is not None]
    )
    pipe.unload_lora_weights()
    changed: dict[str, Tensor] = {}
    for component in ("unet", "transformer", "text_encoder"):
        if getattr(pipe, component, None) is None:
            continue
        for name, parameter in getattr(pipe, component).named_parameters():
            old = before[f"{component}.{name}"]
            if not torch.equal(parameter, old):
                prefix = "text_model." if component == "text_encoder" and not name.startswith("text_model.") else ""
                changed[f"{component}.{prefix}{name.removesuffix('.weight')}"] = (parameter.detach() - old).flatten(1)
    same(changed, {name: part.delta() for name, part in lora.modules.items()})
