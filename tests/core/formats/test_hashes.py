"""Hashes of files that are kept between runs: never those of another content."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from legomole.core.errors import FormatError
from legomole.core.formats import hashes
from legomole.core.formats.hashes import KeptHashes


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose hash is kept: the clock of the hashes is far ahead of the time at which it was written."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"one")
    now = time.time_ns
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now() + 10**10)
    return path


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read for their hashes during the test."""
    read: list[Path] = []
    compute = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: [read.append(path), compute(path)][1])
    return read


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_also_in_another_run(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch):
    kept = KeptHashes(tmp_path / "user" / "hashes.json")
    read = reads(monkeypatch)
    assert kept.find(file) is None
    assert kept.sha256(file) == digest(b"one")
    assert kept.sha256(file) == KeptHashes(kept.path).sha256(file) == digest(b"one")
    assert read == [file]


@pytest.mark.parametrize("change", ["size", "content", "time restored", "replaced"])
def test_another_content_is_hashed_again(tmp_path: Path, file: Path, change: str):
    kept = KeptHashes(tmp_path / "hashes.json")
    kept.sha256(file)
    before = file.stat()
    content = b"four" if change == "size" else b"two"
    if change == "replaced":
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "new").replace(file)
    else:
        time.sleep(0.02)  # a file system may count time in ticks of ten milliseconds
        file.write_bytes(content)
        if change == "time restored":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept.find(file) is None
    assert kept.sha256(file) == digest(content)


def test_the_hash_of_a_file_that_was_just_written_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A second write might get the same modification time, so that the kept hash would be wrong."""
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"one")
    kept = KeptHashes(tmp_path / "hashes.json")
    assert kept.sha256(file) == digest(b"one")
    assert kept.find(file) is None


def test_a_file_that_changes_while_it_is_hashed_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch):
    compute = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: [compute(path), path.write_bytes(b"longer")][0])
    kept = KeptHashes()
    with pytest.raises(FormatError, match="changed while it was read"):
        kept.sha256(file)
    assert kept.find(file) is None


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 1}', '{"a": [1, 2, 3, 4, 5]}', '{"a": [1, 2, 3, 4, "x"]}', "[" * 9999]
)
def test_a_damaged_file_of_hashes_is_ignored_and_replaced(tmp_path: Path, file: Path, content: str):
    path = tmp_path / "hashes.json"
    path.write_text(content)
    assert KeptHashes(path).sha256(file) == digest(b"one")
    assert KeptHashes(path).find(file) == digest(b"one")


def test_two_processes_keep_their_hashes_in_one_file_and_the_oldest_are_dropped(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
):
    one, two = KeptHashes(tmp_path / "hashes.json"), KeptHashes(tmp_path / "hashes.json")
    others = [tmp_path / name for name in ("b", "c")]
    for path in others:
        path.write_bytes(path.name.encode())
    one.sha256(file)
    two.sha256(others[0])
    assert len(json.loads((tmp_path / "hashes.json").read_text())) == 2
    monkeypatch.setattr(hashes, "_KEPT_HASHES", 2)
    two.sha256(others[1])
    assert list(json.loads((tmp_path / "hashes.json").read_text())) == [str(path) for path in others]


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, file: Path):
    (tmp_path / "user").write_text("a file where the folder would be")
    kept = KeptHashes(tmp_path / "user" / "hashes.json")
    assert kept.sha256(file) == kept.find(file) == digest(b"one")
