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
