"""DoRA with the base model at hand, against PEFT, ComfyUI's own code and the definition."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole import Recipe, load, merge, run, save
from legomole.core.errors import FormatError
from legomole.core.formats.dora import dora_delta
from legomole.core.recipes.recipe import RecipeError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ... import lora_files as files
from ...comfy import server

CONV, LINEAR = "lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_middle_block_1_proj"
LAYERS: files.Shapes = {CONV: (12, 6, 3, 3), LINEAR: (8, 8)}
_MODEL = "model.diffusion_model"
KEYS = {CONV: f"{_MODEL}.input_blocks.1.0.in_layers.2.weight", LINEAR: f"{_MODEL}.middle_block.1.proj.weight"}


def base_file(path: Path) -> Path:
    generator = torch.Generator().manual_seed(9)
    save_file({KEYS[name]: torch.randn(shape, generator=generator) for name, shape in LAYERS.items()}, path)
    return path


def kohya_dora(path: Path, axis: int) -> Path:
    """A DoRA with magnitudes per input (axis 1, as kohya and LyCORIS write it) or per output (axis 0)."""
    state = files.state_dict(LAYERS, alpha=2.0)
    generator = torch.Generator().manual_seed(5)
    for name, shape in LAYERS.items():
        size = [n if i == axis else 1 for i, n in enumerate(shape)]
        state[f"{name}.dora_scale"] = 3 + torch.rand(size, generator=generator)
    return files.write(path, state)


def definition(state: dict[str, Tensor], name: str, weight: Tensor, axis: int) -> Tensor:
    weight = weight.double()
    up, down = (state[f"{name}.{x}.weight"].double().flatten(1) for x in ("lora_up", "lora_down"))
    scale = float(state[f"{name}.alpha"]) / down.shape[0]
    whole = weight + (scale * up @ down).reshape(weight.shape)
    norm = whole.square().sum([i for i in range(weight.ndim) if i != axis], keepdim=True).sqrt()
    return state[f"{name}.dora_scale"].double() * whole / norm - weight


@pytest.mark.parametrize("axis", [0, 1])
def test_both_axes_of_magnitudes_against_the_definition(axis: int, tmp_path: Path) -> None:
    base, path = base_file(tmp_path / "base.safetensors"), kohya_dora(tmp_path / "dora.safetensors", axis)
    adapter = load(path, base=base, convert_rank=64)
    weights = load_file(base)
    for name in LAYERS:
        weight = weights[KEYS[name]]
        wanted = definition(load_file(path), name, weight, axis).flatten(1).float()
        torch.testing.assert_close(adapter.modules[name].delta(), wanted, rtol=1e-4, atol=1e-5)
        assert adapter.modules[name].kernel == tuple(LAYERS[name][2:])
    assert adapter.notes == ("dora: 2 layers (DoRA) were approximated at rank 64, which keeps 100.0% of their energy",)


ORACLE = """
import sys
sys.path.insert(0, sys.argv[1])
path, base, out = sys.argv[2:5]
sys.argv = ["x", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import comfy.lora
from safetensors.torch import load_file, save_file
weights = load_file(base)
names = dict(zip(sorted({key.split(".")[0] for key in load_file(path)}), sorted(weights)))
patches = comfy.lora.load_lora(load_file(path), names)
def change(key, patch):
    after = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weights[key].clone(), key)
    return (after - weights[key]).contiguous()
save_file({key: change(key, patch) for key, patch in patches.items()}, out)
"""


@pytest.mark.comfy
def test_magnitudes_per_input_against_comfyui(tmp_path: Path) -> None:
    comfyui = server.find()
    if isinstance(comfyui, str):
        pytest.skip(comfyui)
    folder, python = comfyui
    base, path = base_file(tmp_path / "base.safetensors"), kohya_dora(tmp_path / "dora.safetensors", 1)
    command = [str(python), "-c", ORACLE, str(folder), str(path), str(base), str(tmp_path / "oracle.safetensors")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    wanted = load_file(tmp_path / "oracle.safetensors")
    adapter = load(path, base=base, convert_rank=64)
    for name in LAYERS:
        delta = wanted[KEYS[name]].flatten(1)
        torch.testing.assert_close(adapter.modules[name].delta(), delta, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.second = nn.Linear(10, 6)
        self.conv = nn.Conv2d(4, 6, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_folder_against_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second", "conv"], use_dora=True)
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "dora")
    after: dict[str, Tensor] = model.merge_and_unload().state_dict()
    with pytest.raises(FormatError, match=r"DoRA[\s\S]*--base"):
        load(tmp_path / "dora")
    adapter = load(tmp_path / "dora", base=tmp_path / "base.safetensors", convert_rank=64)
    for name in ("first", "second", "conv"):
        wanted = (after[f"{name}.weight"] - before[f"{name}.weight"]).flatten(1)
        torch.testing.assert_close(adapter.modules[name].delta(), wanted, rtol=1e-4, atol=1e-5)
    again = peft.PeftModel.from_pretrained(Net(), str(save(adapter, tmp_path / "lora")))
    assert not again.peft_config["default"].use_dora


def test_magnitudes_by_hand() -> None:
    weight, delta = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[0.0, 4.0], [0.0, 0.0]]).double()
    per_output = dora_delta(weight, delta, torch.tensor([10.0, 2.0]))  # norms 5 and 1
    torch.testing.assert_close(per_output, torch.tensor([[3.0, 8.0], [0.0, 1.0]]).double(), rtol=1e-6, atol=1e-6)
    per_input = dora_delta(weight, delta, torch.tensor([[6.0, 17**0.5]]))  # norms 3 and sqrt(17)
    torch.testing.assert_close(per_input, torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double(), rtol=1e-6, atol=1e-6)
    with pytest.raises(FormatError, match="magnitudes of a DoRA do not fit"):
        dora_delta(weight, delta, torch.ones(3))


def test_a_low_rank_tells_its_loss_in_the_report_of_a_merge(tmp_path: Path) -> None:
    base, path = base_file(tmp_path / "base.safetensors"), kohya_dora(tmp_path / "dora.safetensors", 1)
    result = merge([path], "concat", base=base, convert_rank=3)
    exact, weights = load(path, base=base, convert_rank=64), load_file(base)
    total = sum(part.energy() for part in exact.modules.values())
    kept = sum(part.energy() for part in result.adapter.modules.values())
    assert result.report.energy_kept == pytest.approx(kept / total, abs=1e-4)
    assert any(f"approximated at rank 3, which keeps {kept / total:.1%}" in note for note in result.report.notes)
    recipe = json.loads(result.adapter.metadata["legomole"])["recipe"]
    assert recipe["base"] == "base.safetensors"
    save_file({key: 2 * value for key, value in weights.items()}, base)
    again = Recipe.model_validate({**recipe, "inputs": [{"path": str(path)}]})
    with pytest.raises(RecipeError, match="not the file this recipe was written for"):
        run(again, folder=tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no rank": ({"base": True}, r"only by approximation[\s\S]*--convert-rank"),
    "no base": ({"convert_rank": 4}, r"not in the file[\s\S]*--base FILE_OR_FOLDER"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_base_and_rank_are_both_needed(case: str, tmp_path: Path) -> None:
    options, match = REFUSED[case]
    base = base_file(tmp_path / "base.safetensors") if "base" in options else None
    with pytest.raises(FormatError, match=match):
        load(kohya_dora(tmp_path / "dora.safetensors", 1), base=base, convert_rank=options.get("convert_rank"))


def test_dora_of_other_kinds_than_lora_is_refused(tmp_path: Path) -> None:
    state = {f"{LINEAR}.lokr_w1": torch.ones(2, 2), f"{LINEAR}.lokr_w2": torch.ones(4, 4)}
    state[f"{LINEAR}.dora_scale"] = torch.ones(1, 8)
    path, base = files.write(tmp_path / "x.safetensors", state), base_file(tmp_path / "base.safetensors")
    with pytest.raises(FormatError, match="without the plain factors"):
        load(path, base=base, convert_rank=4)
