"""Who may import whom: the door is light, the engine knows no host. Each check runs in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import legomole
import pytest

ROOT = Path(legomole.__file__).parent
ENGINE = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "core").rglob("*.py"))
HOSTS = (
    "comfy",
    "comfy_api",
    "folder_paths",
    "nodes",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
)
HEAVY = ("torch", "numpy", "safetensors", "pydantic", "typer", "rich", "yaml")
LAZY = ("sklearn", "matplotlib", "scipy")  # only where used, never on import

FORBID = """
import importlib.abc, sys
class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise AssertionError(f"imports {{name}}")
sys.meta_path.insert(0, Forbid())
"""


def run(code: str) -> str:
    """Run code in a fresh interpreter, away from the repository's folder; fail with its traceback."""
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT.anchor)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    run(FORBID.format(names={*HOSTS, *HEAVY, *LAZY}) + "import legomole; legomole.__version__")


def test_the_engine_imports_no_host_and_nothing_it_uses_only_now_and_then():
    modules = [f"legomole.{name.removesuffix('.__init__')}" for name in ENGINE]
    assert "legomole.core.merge.engine" in modules
    assert "legomole.core.merge.methods" in modules
    run(FORBID.format(names={*HOSTS, *LAZY}) + f"import importlib\nfor m in {modules!r}: importlib.import_module(m)")


def test_the_guard_itself_works():
    with pytest.raises(AssertionError, match="imports torch"):
        run(FORBID.format(names={"torch"}) + "import torch")


def test_public_names_resolve():
    for name in ("Adapter", "Lego", "LowRank", "METHODS", "Rank", "align", "load", "merge", "save"):
        assert getattr(legomole, name) is not None
        assert name in dir(legomole)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = legomole.nonsense


def test_only_relative_imports_inside():
    """ComfyUI loads the folder by path, under a name of its own: `import legomole` would find nothing, or a twin."""
    inside = [p for folder in ("core", "hosts", "nodes", "cli") for p in (ROOT / folder).rglob("*.py")]
    guilty = [
        f"{p.relative_to(ROOT)}: {line}"
        for p in inside
        for line in p.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith(("import legomole", "from legomole"))
    ]
    assert guilty == []
