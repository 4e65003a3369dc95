"""Input files that change while they are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import FormatError
from legomole.core.formats import load, save
from legomole.core.formats.file_changes import raise_if_changed
from legomole.core.lowrank import LowRank
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import run


def lora(value: float, rank: int = 2) -> Adapter:
    return Adapter({f"model.{i}": LowRank(torch.full((rank, 3), value), torch.ones(4, rank)) for i in range(3)})


def test_an_unchanged_file_raises_nothing(tmp_path: Path) -> None:
    path = save(lora(1.0), tmp_path / "x", format="comfy")
    with raise_if_changed([path, tmp_path / "none", tmp_path / ("x" * 400)]):
        assert load(path).modules


@pytest.mark.parametrize("how", ["written to", "replaced", "removed", "made"])
def test_a_file_that_changes(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if how != "made":
        save(lora(1.0), path, format="comfy")
    with pytest.raises(FormatError, match=r"changed while it was read[\s\S]*x\.safetensors"), raise_if_changed([path]):
        change(path, how)


def change(path: Path, how: str) -> None:
    if how == "written to":
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif how == "removed":
        path.unlink()
    else:
        save(lora(2.0), path, format="comfy")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_in_which_one_file_changes(name: str, tmp_path: Path) -> None:
    path = save(lora(1.0), tmp_path / "x", format="peft")

    def rewrite() -> None:
        content = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).write_bytes(content)
        os.utime(path / name, ns=(0, 1))

    with pytest.raises(FormatError, match=rf"changed while[\s\S]*{name}"), raise_if_changed([path]):
        rewrite()


def test_an_input_that_is_overwritten_during_a_merge(tmp_path: Path) -> None:
    """Another program writes into the mapped file: the result would mix modules of the old and the new LoRA."""
    a, b = (save(lora(value), tmp_path / name, format="comfy") for name, value in (("a", 1.0), ("b", 2.0)))
    other = save(lora(9.0), tmp_path / "c", format="comfy").read_bytes()
    recipe = Recipe(method="ties", settings={"rank": 2}, inputs=[Input(path=a.name), Input(path=b.name)])
    assert run(recipe, folder=tmp_path).adapter.modules

    def overwrite(done: int, total: int, name: str) -> None:
        if done == 1:
            with a.open("r+b") as file:
                file.write(other)
            os.utime(a, ns=(0, a.stat().st_mtime_ns + 1))

    with pytest.raises(FormatError, match=r"changed while it was read[\s\S]*a\.safetensors"):
        run(recipe, folder=tmp_path, progress=overwrite)
