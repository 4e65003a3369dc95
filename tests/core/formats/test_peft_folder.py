"""PEFT folders on disk: single files, shards, incomplete folders, interrupted writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import FormatError, SaveError
from legomole.core.formats import load, save, summarise
from legomole.core.lowrank import LowRank

from ... import lora_files as files

INDEX = "adapter_model.safetensors.index.json"
SHAPES = {"model.x": (4, 3), "model.y": (5, 4), "model.z": (3, 6)}


def shard(i: int) -> str:
    return f"adapter_model-0000{i}-of-00003.safetensors"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    folder.mkdir()
    state = files.state_dict(SHAPES, files.PEFT, alpha=None, prefix="base_model.model.")
    files.write(folder / "adapter_model.safetensors", state, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


@pytest.fixture
def sharded(whole: Path) -> Path:
    """The same adapter in three shards of one module each, but the factors of the last are in different shards."""
    folder = whole.parent / "sharded"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
    state = files.state_dict(SHAPES, files.PEFT, alpha=None, prefix="base_model.model.")
    where = {key: 1 if ".x." in key else 2 if ".y." in key or "lora_A" in key else 3 for key in state}
    for i in (1, 2, 3):
        files.write(folder / shard(i), {key: x for key, x in state.items() if where[key] == i}, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {key: shard(i) for key, i in where.items()}}))
    return folder


@pytest.mark.parametrize("index", [INDEX, "model.safetensors.index.json"])
def test_shards_are_one_adapter(index: str, whole: Path, sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / index)
    one = load(whole)
    for named in (sharded, sharded / shard(1), sharded / shard(3)):
        found = load(named)
        assert found.modules.keys() == one.modules.keys()
        for name, module in one.modules.items():
            assert module.scale == found.modules[name].scale == 2.0
            torch.testing.assert_close(found.modules[name].delta(), module.delta(), rtol=0, atol=0)
    assert len(found.source.sha256) == 64
    assert summarise(sharded).names == summarise(whole).names
    assert summarise(sharded).ranks == {4: 3}


def test_every_shard_counts_in_the_hash(sharded: Path) -> None:
    before = load(sharded).source.sha256
    state = {
        "base_model.model.model.x.lora_A.weight": torch.ones(4, 3),
        "base_model.model.model.x.lora_B.weight": torch.ones(4, 4),
    }
    files.write(sharded / shard(1), state)
    assert load(sharded).source.sha256 != before


def test_a_single_file_takes_precedence_over_shards(whole: Path, sharded: Path) -> None:
    (sharded / "adapter_model.safetensors").write_bytes((whole / "adapter_model.safetensors").read_bytes())
    (sharded / shard(2)).unlink()
    assert load(sharded).modules.keys() == SHAPES.keys()


def missing_shard(folder: Path) -> None:
    (folder / shard(2)).unlink()


def truncated_shard(folder: Path) -> None:
    path = folder / shard(2)
    path.write_bytes(path.read_bytes()[:-5])


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def listless_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": [shard(1)]}))


def escaping_index(folder: Path) -> None:
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    listed["base_model.model.model.x.lora_A.weight"] = f"../whole/{shard(1)}"
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))


def other_tensors(folder: Path) -> None:
    files.write(folder / shard(2), {"base_model.model.model.q.lora_A.weight": torch.ones(4, 3)})


def same_tensors(folder: Path) -> None:
    (folder / shard(3)).write_bytes((folder / shard(2)).read_bytes())


BROKEN: dict[Callable[[Path], None], str] = {
    missing_shard: rf"A shard of the weights is missing[\s\S]*no {shard(2)}",
    truncated_shard: rf"cut off[\s\S]*{shard(2)}",
    no_index: r"without the index adapter_model\.safetensors\.index\.json: the download or save was interrupted",
    no_config: r"no adapter_config\.json, so the scale is unknown",
    broken_index: r"index of the weights cannot be read",
    listless_index: r"index of the weights is not valid",
    escaping_index: rf"A shard of the weights is missing[\s\S]*no \.\./whole/{shard(1)}",
    other_tensors: r"in no shard of the weights[\s\S]*model\.y\.lora_A",
    same_tensors: r"Two shards of the weights hold the same tensors[\s\S]*model\.y",
}


@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__)
def test_incomplete_folders(harm: Callable[[Path], None], sharded: Path) -> None:
    load(sharded)
    harm(sharded)
    for named in (sharded, sharded / shard(1)):
        with pytest.raises(FormatError, match=BROKEN[harm]):
            load(named)


def lora(value: float) -> Adapter:
    return Adapter({"model.x": LowRank(torch.full((2, 3), value), torch.full((4, 2), value))})


@pytest.mark.parametrize("reached", range(4))
def test_interrupted_while_a_folder_is_replaced(reached: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where folders cannot be swapped: after a power failure the folder is old, new, or reported as incomplete."""
    monkeypatch.setattr("legomole.core.formats.files.swap_folders", lambda new, old: False)
    folder = save(lora(1.0), tmp_path / "x", format="peft")
    renamed = 0

    def stop(self: Path, target: Path) -> Path:
        nonlocal renamed
        if renamed == reached:
            raise OSError("power cut")
        renamed += 1
        return replace(self, target)

    replace = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        if reached < 3:
            with pytest.raises(SaveError, match="could not be written"):
                save(lora(2.0), folder, format="peft")
        else:
            save(lora(2.0), folder, format="peft")
    if reached in (1, 2):
        with pytest.raises(FormatError, match="the scale is unknown"):
            load(folder)
    else:
        assert load(folder).modules["model.x"].A[0, 0] == (1.0 if reached == 0 else 2.0)


def test_weights_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where another program has them open: the old folder stays."""
    monkeypatch.setattr("legomole.core.formats.files.swap_folders", lambda new, old: False)
    folder = save(lora(1.0), tmp_path / "x", format="peft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def held(self: Path, target: Path) -> Path:
        if target.name == "adapter_model.safetensors":
            raise PermissionError("in use")
        return replace(self, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", held)
    with pytest.raises(SaveError, match="could not be written"):
        save(lora(2.0), folder, format="peft")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_interrupted_while_a_new_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(SaveError, match="could not be written"):
        save(lora(1.0), tmp_path / "x", format="peft")
    assert not list(tmp_path.iterdir())
