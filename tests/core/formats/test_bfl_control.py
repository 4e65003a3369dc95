"""Control LoRAs of Black Forest Labs: every part of the file arrives as ComfyUI reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from legomole import load, merge, save
from legomole.core.errors import MergeError
from safetensors.torch import load_file
from torch import Tensor

from ... import lora_files as files

QKV, ATTENTION = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.norm.query_norm"


def control(path: Path, seed: int = 1) -> Path:
    state = files.state_dict({"img_in": (16, 12), QKV: (48, 16)}, files.PEFT, alpha=None, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state |= {f"{name}.lora_B.bias": torch.randn(n, generator=generator) for name, n in (("img_in", 16), (QKV, 48))}
    return files.write(
        path, state | {f"{ATTENTION}.scale": torch.rand(8), "single_blocks.0.norm.key_norm.scale": torch.rand(8)}
    )


def delta(state: dict[str, Tensor], name: str, up: str = "lora_up", down: str = "lora_down") -> Tensor:
    rank = state[f"{name}.{down}.weight"].shape[0]
    scale = float(state[f"{name}.alpha"]) / rank if f"{name}.alpha" in state else 1.0
    return scale * state[f"{name}.{up}.weight"] @ state[f"{name}.{down}.weight"]


def test_a_control_lora_keeps_all_its_parts_under_comfyuis_keys(tmp_path: Path) -> None:
    path = control(tmp_path / "control.safetensors")
    original, written = load_file(path), load_file(save(load(path), tmp_path / "again"))
    for name in ("img_in", QKV):
        torch.testing.assert_close(delta(written, f"diffusion_model.{name}"), delta(original, name, "lora_B", "lora_A"))
        assert torch.equal(written[f"diffusion_model.{name}.diff_b"], original[f"{name}.lora_B.bias"])
    assert written["diffusion_model.img_in.reshape_weight"].tolist() == [16, 12]
    for norm in (ATTENTION, "single_blocks.0.norm.key_norm"):
        assert torch.equal(written[f"diffusion_model.{norm}.set_weight"], original[f"{norm}.scale"])
    assert len(written) == 2 * 4 + 1 + 2


def test_other_loras_of_the_widened_layer_get_zeros_for_the_new_inputs(tmp_path: Path) -> None:
    first = control(tmp_path / "control.safetensors")
    style = files.write(
        tmp_path / "style.safetensors",
        files.state_dict({"lora_unet_img_in": (16, 4), "lora_unet_double_blocks_0_img_attn_qkv": (48, 16)}),
    )
    for order in ([first, style], [style, first]):
        merged = load_file(save(merge(order, "concat"), tmp_path / "merged"))
        wanted = delta(load_file(first), "img_in", "lora_B", "lora_A")
        wanted[:, :4] += load(style).modules["lora_unet_img_in"].delta()
        torch.testing.assert_close(delta(merged, "diffusion_model.img_in"), wanted, rtol=1e-5, atol=1e-5)
        assert merged["diffusion_model.img_in.reshape_weight"].tolist() == [16, 12]


def test_layers_named_otherwise_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    flux = files.state_dict(files.AI_TOOLKIT_FLUX, files.PEFT, alpha=None)
    style = files.write(tmp_path / "style.safetensors", flux)
    state = files.state_dict({"img_in": (3072, 128), QKV: (9216, 3072)}, files.PEFT, alpha=None)
    state["single_blocks.0.norm.key_norm.scale"] = torch.rand(128)
    with pytest.raises(MergeError, match=r"widens a layer that the other LoRAs name otherwise|different base models"):
        merge([style, files.write(tmp_path / "control.safetensors", state)], "concat")
