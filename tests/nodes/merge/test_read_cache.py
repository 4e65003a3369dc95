"""Readings that are used again, without a model; with one see tests/comfy/test_behaviour.py."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from legomole.core.errors import FormatError
from legomole.nodes.lora import Lora
from legomole.nodes.merge.read_cache import read
from safetensors.torch import save_file


def write(path: Path, value: float) -> Lora:
    factors = {"x.lora_A.weight": torch.full((2, 4), value), "x.lora_B.weight": torch.full((3, 2), value)}
    save_file({f"diffusion_model.{key}": tensor for key, tensor in factors.items()}, path)
    return Lora(path, path.stem)


@pytest.fixture
def loras(tmp_path: Path) -> list[Lora]:
    return [write(tmp_path / f"{name}.safetensors", value) for name, value in (("one", 1.0), ("two", 2.0))]


def test_other_strengths_are_no_reason_to_read_again(loras: list[Lora]) -> None:
    first = read(loras, None, None)
    assert read([replace(lora, strength_model=0.3, strength_clip=2.0) for lora in loras], None, None) is first


@pytest.mark.parametrize("change", ["order", "fewer", "rank", "content", "time"])
def test_what_changed_is_read_again(loras: list[Lora], change: str) -> None:
    first = read(loras, None, None)
    path = loras[1].content
    assert isinstance(path, Path)
    if change == "order":
        loras = loras[::-1]
    elif change == "fewer":
        loras = loras[:1]
    elif change == "rank":
        loras = [loras[0], replace(loras[1], convert_rank=4)]
    elif change == "content":
        write(path, 5.0)
    else:
        os.utime(path, ns=(0, 0))
    again = read(loras, None, None)
    assert again is not first
    assert again.cache is not first.cache
    if change == "content":
        assert again.adapters[1].modules["diffusion_model.x"].A[0, 0] == 5.0


def test_a_file_that_is_gone_has_its_own_error(loras: list[Lora]) -> None:
    read(loras, None, None)
    path = loras[0].content
    assert isinstance(path, Path)
    path.unlink()
    for _ in range(2):
        with pytest.raises(FormatError, match="no such file"):
            read(loras, None, None)


def test_loras_made_in_the_graph_are_told_apart() -> None:
    contents = [
        {"diffusion_model.x.lora_A.weight": torch.ones(2, 4), "diffusion_model.x.lora_B.weight": torch.ones(3, 2)}
    ]
    contents.append({key: tensor.clone() for key, tensor in contents[0].items()})
    one, two = (Lora(content, "trained") for content in contents)
    first = read([one], None, None)
    assert read([replace(one, strength_model=2.0)], None, None) is first
    assert read([two], None, None) is not first
