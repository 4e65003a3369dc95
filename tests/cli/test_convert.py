"""`legomole convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load, save
from legomole.core.lowrank import LowRank
from safetensors.torch import load_file, save_file

from .command import NAMES, done


def test_convert_changes_the_format_and_the_numbers():
    done("convert", "a.safetensors", "--to", "comfy", "--dtype", "float16", "-o", "out.safetensors")
    a, out = load("a.safetensors"), load("out.safetensors")
    assert out.dtype == torch.float16
    for name in NAMES:
        torch.testing.assert_close(out.modules[name].delta(), a.modules[name].delta(), atol=2e-2, rtol=2e-2)
    assert out.metadata["ss_base_model_version"] == "sd_v1"


def test_dialects_are_translated():
    """kohya's names to diffusers' and back; the deltas stay what they were, but for float rounding of the scale."""
    pytest.importorskip("diffusers")
    generator = torch.Generator().manual_seed(0)

    def layers(prefix: str, rank: int, *, dots: bool, alpha: float | None) -> Adapter:
        block = "down_blocks.0.attentions.0.transformer_blocks.0"
        names = [
            f"{block}.{layer}" for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2")
        ]
        draw = [torch.randn(shape, generator=generator).half() for _ in names for shape in ((rank, 16), (16, rank))]
        return Adapter(
            {
                f"{prefix}{name if dots else name.replace('.', '_')}": LowRank(A, B, alpha)
                for name, A, B in zip(names, draw[::2], draw[1::2], strict=True)
            }
        )

    Path("d").mkdir()
    save(layers("lora_unet_", 8, dots=False, alpha=4.0), "d/style", format="kohya")
    save(layers("unet.", 4, dots=True, alpha=None), "d/subject", format="diffusers")
    done("convert", "d/style.safetensors", "--to", "diffusers", "-o", "there.safetensors")
    done("convert", "there.safetensors", "--to", "kohya", "-o", "back.safetensors")
    style, back = load("d/style.safetensors"), load("back.safetensors")
    assert set(load("there.safetensors").modules) == set(load("d/subject.safetensors").modules)
    assert set(back.modules) == set(style.modules)
    for name, part in style.modules.items():
        torch.testing.assert_close(back.modules[name].delta(), part.delta(), atol=1e-4, rtol=1e-2)
    # the first LoRA's format, without asking: what every program reads
    done("merge", "d/style.safetensors", "d/subject.safetensors", "-o", "both.safetensors")
    both = load("both.safetensors")
    assert both.source.format == "kohya"
    assert set(both.modules) == set(style.modules)
    assert (both.metadata["ss_network_dim"], both.metadata["ss_network_alpha"]) == ("6", "6")


def test_a_converted_merge_repeats_byte_for_byte():
    """Also after a second conversion, which translates the names; another dtype replaces the conversions."""
    pytest.importorskip("diffusers")
    names = [f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{x}" for x in "qk"]
    generator = torch.Generator().manual_seed(0)
    for stem in ("x", "y"):
        parts = {
            name: LowRank(torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator), 3.0)
            for name in names
        }
        save(Adapter(parts), stem, format="kohya")
    done("merge", "x.safetensors:0.8", "y.safetensors", "--method", "concat", "-o", "merged.safetensors")
    done("convert", "merged.safetensors", "--dtype", "float16", "-o", "half.safetensors")
    done("convert", "half.safetensors", "--to", "diffusers", "-o", "renamed.safetensors")
    for name in ("half", "renamed"):
        done("merge", "--config", f"{name}.safetensors", "-o", "again.safetensors", "--overwrite")
        assert Path("again.safetensors").read_bytes() == Path(f"{name}.safetensors").read_bytes()
    assert "kohya float16, diffusers" in done("inspect", "renamed.safetensors")
    done("inspect", "renamed.safetensors", "--recipe")
    done("merge", "--config", "renamed.safetensors", "--dtype", "float32", "-o", "whole.safetensors")
    assert load("whole.safetensors").source.format == "kohya"
    assert load("whole.safetensors").dtype == torch.float32


def test_losses_are_reported(loha):
    """What an approximation cuts off, and rounding, by text and by JSON."""
    options = ("--convert-rank", "1", "--dtype", "float16")
    text = done("convert", str(loha), *options, "-o", "out.safetensors")
    data = json.loads(done("convert", str(loha), *options, "-o", "again.safetensors", "--json"))
    exact = load(loha, convert_rank=64).modules["lora_unet_x"].delta().double()
    out = load("out.safetensors").modules["lora_unet_x"].delta().double()
    kept = 1 - float((out - exact).square().sum() / exact.square().sum())
    assert data["energy_kept"] == pytest.approx(kept, abs=1e-5)
    assert 0.1 < kept < 0.9
    assert f"{kept:.4%} of the LoRA's energy kept" in text
    assert f"note: {data['notes'][0]}" in " ".join(text.split())
    assert f"approximated at rank 1, which keeps {kept:.1%}" in data["notes"][0]


@pytest.fixture
def loha(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (12, 3), "hada_w1_b": (3, 10), "hada_w2_a": (12, 3), "hada_w2_b": (3, 10)}
    state = {f"lora_unet_x.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "loha.safetensors"
    save_file(state, path)
    return path


def test_metadata_that_programs_act_on_is_kept_and_stale_hashes_are_not(tmp_path: Path):
    entries = {"reference_downscale_factor": "2", "ss_clip_skip": "1", "sshs_model_hash": "0123"}
    part = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    save(Adapter({"diffusion_model.x": part}), tmp_path / "a.safetensors", format="comfy")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata=entries)
    for command in ("convert", "compress"):
        done(command, str(tmp_path / "b.safetensors"), "-o", f"{command}.safetensors")
        metadata = load(f"{command}.safetensors").metadata
        assert metadata["reference_downscale_factor"] == "2"
        assert metadata["ss_clip_skip"] == "1"
        assert "sshs_model_hash" not in metadata


def test_short_names_of_dtypes_are_accepted():
    for command, name, dtype in (("convert", "bf16", torch.bfloat16), ("merge", "fp16", torch.float16)):
        done(command, "a.safetensors", "--dtype", name, "-o", f"{command}.safetensors")
        assert load(f"{command}.safetensors").dtype == dtype


def fused(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 8, generator=generator), torch.randn(24, 4, generator=generator)
    save(Adapter({"diffusion_model.layers.0.attention.qkv": LowRank(A, B, 2.0)}), path, format="comfy")


def test_a_program_decides_the_names():
    fused("zimage")
    done("convert", "zimage.safetensors", "--for", "diffusers", "-o", "there.safetensors")
    done("convert", "there.safetensors", "--for", "kohya", "-o", "musubi.safetensors")
    done("convert", "musubi.safetensors", "--to", "comfy", "-o", "back.safetensors")
    names = [f"layers.0.attention.to_{x}" for x in "qkv"]
    assert list(load("there.safetensors").modules) == sorted(f"transformer.{name}" for name in names)
    assert list(load("musubi.safetensors").modules) == sorted(f"lora_unet_{name.replace('.', '_')}" for name in names)
    original, back = load("zimage.safetensors"), load("back.safetensors")
    delta = torch.cat([back.modules[f"transformer.{name}"].delta() for name in names])
    torch.testing.assert_close(delta, original.modules["diffusion_model.layers.0.attention.qkv"].delta())


@pytest.mark.parametrize("reader", ["comfy", "diffusers", "kohya"])
def test_merges_and_compressed_files_are_for_a_program_too(reader: str):
    fused("zimage")
    done("convert", "zimage.safetensors", "--for", "kohya", "-o", "musubi.safetensors")
    first = {"comfy": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}[reader]
    done("merge", "zimage.safetensors", "musubi.safetensors", "--method", "concat", "--for", reader, "-o", "m")
    done("compress", "musubi.safetensors", "--rank", "2", "--for", reader, "-o", "c")
    for name in ("m", "c"):
        names = list(load(f"{name}.safetensors").modules)
        assert all(name.startswith((first, "transformer." if reader == "comfy" else first)) for name in names)


def test_a_peft_adapter_is_for_peft():
    fused("zimage")
    done("convert", "zimage.safetensors", "--for", "peft", "-o", "adapter")
    assert list(load("adapter").modules) == [f"layers.0.attention.to_{x}" for x in "kqv"]
    assert Path("adapter/adapter_config.json").is_file()


def test_convert_caps_and_keeps_layers():
    text = done("convert", "a.safetensors", "--cap", "1", "--only", "*attn1*", "-o", "out.safetensors")
    assert "cap 1 lowered singular values" in text
    assert "2 layers of a were left out" in text
    assert done("inspect", "--modules", "out.safetensors").split() == sorted(n for n in NAMES if "attn1" in n)
    for part in load(Path("out.safetensors")).modules.values():
        S = torch.linalg.svdvals(part.delta())[: part.rank]
        assert float(S[0]) == pytest.approx(float(S[part.rank // 2]), rel=1e-3)


def test_a_converted_merge_with_a_cap_can_be_repeated():
    done("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors")
    done("convert", "out.safetensors", "--cap", "1.5", "--only", "*attn1*", "-o", "capped.safetensors")
    done("merge", "--config", "capped.safetensors", "-o", "again.safetensors")
    assert Path("capped.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
