"""What all tests share: finding a real ComfyUI, and saying loudly when there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes: small tensors are faster so, and two processes test

from .comfy import loras, server, tiny

ROOT = Path(__file__).parent.parent
WITH_SERVER = ("tests/comfy/", "tests/page/")


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    """A running ComfyUI with this checkout as a custom node and the tiny models."""
    found = server.find()
    if isinstance(found, str):
        pytest.skip(found)
    base = tmp_path_factory.mktemp("comfyui")
    server.lay_out(base, ROOT)
    (base / "custom_nodes" / "idle_layers.py").symlink_to(Path(__file__).parent / "comfy" / "idle_layers.py")
    tiny.write_models(base)
    running = server.Server(*found, base)
    yield running
    running.close()


@pytest.fixture(scope="session")
def files(comfy: server.Server) -> dict[str, str]:
    """LoRA files on the server: short name -> file name."""
    return loras.write_all(comfy.loras)


@pytest.fixture(scope="session")
def nano(comfy: server.Server) -> Path:
    """The server's base directory with the small trained model placed there, as ``legomole demo --comfyui`` does."""
    pytest.importorskip("diffusers")
    from legomole.nano.comfyui import place

    place(comfy.base)
    return comfy.base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a server come first: they are the longest part that one process must run."""
    items.sort(key=lambda item: not item.nodeid.startswith(WITH_SERVER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests with a server in one of the processes, so that only one server is started."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "server" if nodeid.startswith(WITH_SERVER) else super()._split_scope(nodeid)

    return OneServer(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A run without ComfyUI or its page must not look like a full one."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if r.nodeid.startswith(WITH_SERVER)]
    if skipped:
        terminalreporter.section("NOT TESTED IN A REAL COMFYUI", red=True, bold=True)
        for reason in sorted({r.longrepr[2] for r in skipped}):
            terminalreporter.line(f"{sum(r.longrepr[2] == reason for r in skipped)} tests: {reason}", red=True)
