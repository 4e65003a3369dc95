"""`legomole convert`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load, save
from legomole.core.lowrank import LowRank

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
