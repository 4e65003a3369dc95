"""Import rules: the package root is light, the engine knows no host, rooms import only rooms before them."""

from __future__ import annotations

import ast
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


def test_only_relative_imports_inside():
    """ComfyUI loads the folder under a name of its own: `import legomole` would find nothing or a second copy."""
    inside = [p for folder in ("core", "hosts", "nodes", "cli") for p in (ROOT / folder).rglob("*.py")]
    guilty = [
        f"{p.relative_to(ROOT)}: {line}"
        for p in inside
        for line in p.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith(("import legomole", "from legomole"))
    ]
    assert guilty == []


Floors = tuple[tuple[str, ...], ...]

# Rooms from the ground up. A module imports only modules of its own room and of rooms on lower floors.
FLOORS: Floors = (
    ("core.errors", "core.progress", "core.precision", "core.fields"),
    ("core.lowrank", "core.json_text", "core.safe_paths", "core.memory"),
    ("core.adapter",),
    ("core.digest", "core.formats"),
    ("core.layers",),
    ("core.merge",),
    ("core.recipes", "core.mole"),
    ("core.train",),
    ("core.pictures",),
    ("core.survey",),
    ("hosts",),
    ("nano", "api"),
    ("cli", "nodes"),
    ("__init__", "__main__"),
)
# Rooms of nodes/.
NODE_FLOORS: Floors = (
    ("nodes.graph_lora", "nodes.settings"),
    ("nodes.loaded_loras",),
    ("nodes.comfy",),
    ("nodes.sockets",),
    ("nodes.merge",),
    ("nodes.mole",),
    ("nodes.compare", "nodes.lora_list"),
    ("nodes.extension",),
)


def module_names() -> dict[str, Path]:
    """Dotted name below the package -> file, of all modules of the package."""
    folders = ("core", "hosts", "nodes", "cli", "nano")
    files = [*ROOT.glob("*.py"), *(p for folder in folders for p in (ROOT / folder).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, anywhere in its code and also for types only."""
    package = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in modules else ".".join(base))
    return {target for target in found if target in modules and target != name}


def room_of(name: str, floors: Floors) -> tuple[int, str] | None:
    """Floor and room of a module, ``None`` for one that lives in none of the rooms."""
    for i, rooms in enumerate(floors):
        for room in rooms:
            if name == room or name.startswith(f"{room}."):
                return i, room
    return None


@pytest.mark.parametrize("floors", [FLOORS, NODE_FLOORS])
def test_no_import_runs_upwards(floors: Floors) -> None:
    modules = module_names()
    wrong: list[str] = []
    for name, path in modules.items():
        if (here := room_of(name, floors)) is None:
            continue
        for target in imports_of(name, path, modules):
            there = room_of(target, floors)
            if there is not None and there != here and there[0] >= here[0]:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_every_module_has_a_room() -> None:
    assert [name for name in module_names() if room_of(name, FLOORS) is None and name != "core"] == []


def test_no_module_imports_private_names_of_another() -> None:
    guilty: list[str] = []
    for name, path in module_names().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                private = [
                    alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
                ]
                guilty += [f"{name}: {', '.join(private)} from {node.module}"] if private else []
    assert guilty == []


def test_core_has_at_most_19_entries() -> None:
    entries = {p.name for p in (ROOT / "core").iterdir() if p.name != "__pycache__"}
    assert len(entries) <= 19, sorted(entries)
