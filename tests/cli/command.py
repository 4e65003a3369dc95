"""Run the command line, in this process or in one of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from legomole.cli import app
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank
from typer.testing import CliRunner, Result

NAMES = [f"lora_unet_down_blocks_0_{kind}_to_{x}" for kind in ("attn1", "attn2") for x in "qk"]


def write(path: Path, rank: int = 2, seed: int = 0, *, names=NAMES, d_in: int = 6, **metadata: str) -> Path:
    g = torch.Generator().manual_seed(seed)
    modules = {n: LowRank(torch.randn(rank, d_in, generator=g), torch.randn(5, rank, generator=g)) for n in names}
    return save(Adapter(modules, metadata=metadata), path, format="kohya")


def enter_copy(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a link to the pipeline in `made` and copies of the LoRA files there."""
    (folder / "pipe").symlink_to(made / "pipe")
    for path in made.glob("*.safetensors"):
        shutil.copy(path, folder)
    monkeypatch.chdir(folder)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def squeezed(text: str) -> str:
    """Text of a panel without its frame and line breaks."""
    return " ".join(text.replace("│", " ").split())


def process(*arguments: str, **kw) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONSAFEPATH": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "legomole", *arguments], capture_output=True, text=True, env=env, check=False, **kw
    )
