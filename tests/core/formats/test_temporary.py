"""Temporary names, swapped folders, and one writer at a time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load, save, temporary
from legomole.core.lowrank import LowRank

UNIX = pytest.mark.skipif(sys.platform == "win32", reason="file systems of Windows cannot do it")


def lora(value: float) -> Adapter:
    return Adapter({"model.x": LowRank(torch.full((2, 3), value), torch.full((4, 2), value), 2 * value)})


def test_names_are_unique_and_recognisable(tmp_path: Path) -> None:
    names = {temporary.temporary_name(tmp_path / "x.safetensors").name for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith(".x.safetensors.") and name.endswith(".tmp") for name in names)
    assert len(temporary.temporary_name(tmp_path / ("x" * 255)).name) < 100


def test_files_of_a_killed_process_are_removed_a_day_later(tmp_path: Path) -> None:
    old, young, other, mine = (
        tmp_path / name
        for name in (f".x.{'0' * 32}.tmp", f".x.{'1' * 32}.tmp", f".y.{'0' * 32}.tmp", ".x.not mine.tmp")
    )
    folder = tmp_path / f".x.{'2' * 32}.tmp"
    folder.mkdir()
    (folder / "part").touch()
    for path in (old, young, other, mine):
        path.touch()
    for path in (old, other, mine, folder):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    temporary.temporary_name(tmp_path / "x")
    assert sorted(tmp_path.iterdir()) == sorted([young, other, mine])


@UNIX
def test_a_folder_is_swapped_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers see the old folder or the new one, and never a mixture."""
    path = save(lora(1.0), tmp_path / "x", format="peft")
    (path / "README.md").write_text("mine")
    before = path.stat().st_ino

    def never(*_: object) -> None:
        raise AssertionError("files were replaced one by one")

    monkeypatch.setattr("legomole.core.formats.files._replace_files", never)
    save(lora(2.0), path, format="peft")
    assert path.stat().st_ino != before
    assert load(path).modules["model.x"].A[0, 0] == 2.0
    assert (path / "README.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("case", ["a folder inside", "a link", "a system without it"])
def test_where_it_cannot_be_swapped_its_files_are_replaced(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(lora(1.0), tmp_path / "x", format="peft")
    if case == "a folder inside":
        (path / "runs").mkdir()
        (path / "runs" / "log").write_text("mine")
    elif case == "a link":
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "x", target_is_directory=True)
    else:
        monkeypatch.setattr(temporary.os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("no links")))
        (path / "README.md").write_text("mine")
    kept = sorted(p.relative_to(path) for p in path.rglob("*"))
    save(lora(2.0), path, format="peft")
    part = load(path).modules["model.x"]
    assert (part.A[0, 0], part.alpha) == (2.0, 4.0)
    assert sorted(p.relative_to(path) for p in path.rglob("*")) == kept
    assert not list(tmp_path.glob(".*"))


@UNIX
def test_one_process_at_a_time_replaces_files(tmp_path: Path) -> None:
    import fcntl

    with temporary.exclusive_lock(tmp_path):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_without_locks_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "fcntl", None)
    with temporary.exclusive_lock(tmp_path), temporary.exclusive_lock(tmp_path):
        pass
