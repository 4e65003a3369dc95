"""Every test of the command line runs in a folder of its own with two LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .command import write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with two LoRAs: a of rank 4, b of rank 2."""
    monkeypatch.chdir(tmp_path)
    write(Path("a.safetensors"), 4, 1, ss_base_model_version="sd_v1")
    write(Path("b.safetensors"), 2, 2)
    return tmp_path
