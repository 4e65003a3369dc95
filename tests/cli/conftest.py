"""Every test of the command line runs in a folder of its own with two LoRAs."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from legomole.cli import gates_report

from .command import write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with two LoRAs: a of rank 4, b of rank 2."""
    monkeypatch.chdir(tmp_path)
    write(Path("a.safetensors"), 4, 1, ss_base_model_version="sd_v1")
    write(Path("b.safetensors"), 2, 2)
    return tmp_path


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Raises Ctrl-C after so many steps of training (0: while examples are made; -1: never), or another exception."""

    def at(step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        @contextlib.contextmanager
        def bar(*_: Any, **__: Any) -> Generator[Any]:
            def progress(number: int, total: int, what: str) -> None:
                if (number == step and what.startswith("loss")) or (step == 0 and what in ("sampling", "predicting")):
                    raise error

            yield progress

        monkeypatch.setattr(gates_report, "progress_bar", bar)

    return at
