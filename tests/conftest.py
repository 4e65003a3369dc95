"""What all tests share: finding a real ComfyUI, and saying loudly when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .comfy import loras, server, tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    """A running ComfyUI with this checkout as a custom node and the tiny models."""
    found = server.find()
    if isinstance(found, str):
        pytest.skip(found)
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "legomole").symlink_to(ROOT, target_is_directory=True)
    for name in ("loras", "checkpoints", "vae"):
        (base / "models" / name).mkdir(parents=True)
    tiny.write_models(base)
    running = server.Server(*found, base)
    yield running
    running.close()


@pytest.fixture(scope="session")
def files(comfy: server.Server) -> dict[str, str]:
    """LoRA files on the server: short name -> file name."""
    return loras.write_all(comfy.loras)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if isinstance(found := server.find(), str):
        terminalreporter.section("ComfyUI NOT TESTED", red=True, bold=True)
        terminalreporter.line(f"The nodes were not tried in a real ComfyUI: {found}")
