"""Full differences of weights and parameters: summed exactly with their weights, and read back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from legomole import load, merge, save
from legomole.core.errors import SaveError
from legomole.core.formats import from_state_dict, to_state_dict
from safetensors.torch import load_file
from torch import Tensor

from ... import lora_files as files

BLOCK, PATCH = "diffusion_model.blocks.0", "diffusion_model.patch_embedding"
SHAPES = {f"{BLOCK}.diff_m": (1, 6, 8), f"{BLOCK}.cross_attn.norm_k.diff": (8,), f"{PATCH}.diff": (8, 4, 1, 2, 2)}


def state(seed: int, **others: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    layer = files.state_dict({f"{BLOCK}.self_attn.q": (8, 8)}, seed=seed)
    return tensors | layer | others


@pytest.mark.parametrize("method", ["concat", "svd", "lego"])
def test_differences_of_any_shape_are_added_with_their_weights(method: str, tmp_path: Path) -> None:
    paths = [files.write(tmp_path / f"{seed}.safetensors", state(seed)) for seed in (1, 2)]
    result = merge(paths, method, weights=[0.5, -2.0], dtype="float32")
    merged = load_file(save(result, tmp_path / "merged"))
    for key, shape in SHAPES.items():
        assert merged[key].shape == shape
        torch.testing.assert_close(merged[key], 0.5 * state(1)[key] - 2 * state(2)[key])
    assert sum("(added, times 0.5" in line for line in result.report.passed_on) == len(SHAPES)


def test_a_difference_beside_a_low_rank_update_of_the_same_weight_becomes_one_key(tmp_path: Path) -> None:
    full = files.write(tmp_path / "full.safetensors", state(1))
    shapes = {PATCH: (8, 4, 1, 2, 2), f"{BLOCK}.self_attn.q": (8, 8)}
    low = files.write(tmp_path / "low.safetensors", files.state_dict(shapes))
    merged = load_file(save(merge([full, low], "concat", weights=[0.5, 2.0]), tmp_path / "merged"))
    assert [key for key in merged if key.startswith(PATCH)] == [f"{PATCH}.diff"]
    delta = load(low).modules[PATCH].delta().reshape(SHAPES[f"{PATCH}.diff"])
    torch.testing.assert_close(merged[f"{PATCH}.diff"], 0.5 * state(1)[f"{PATCH}.diff"] + 2 * delta)


def test_differences_of_other_shapes_than_the_factors_are_an_error() -> None:
    adapter = from_state_dict(state(1) | files.state_dict({PATCH: (8, 5)}, seed=3))
    with pytest.raises(SaveError, match="different shapes"):
        to_state_dict(adapter, "comfy")


def test_with_a_rank_matrices_are_approximated_and_parameters_are_not() -> None:
    adapter = from_state_dict(state(1), convert_rank=2)
    assert set(adapter.diffs) == {f"{BLOCK}.modulation", f"{BLOCK}.cross_attn.norm_k.weight"}
    assert adapter.modules[PATCH].rank == 2


def test_keys_are_written_as_they_were_read() -> None:
    tensors = state(1, **{f"{BLOCK}.modulation.diff": torch.ones(1, 6, 8), "lora_unet_x.diff_b": torch.ones(3)})
    written = to_state_dict(from_state_dict(tensors), "comfy")
    assert set(written) == set(tensors)
    assert all(torch.equal(written[key], tensors[key]) for key in tensors if "diff" in key)
