"""What the package imports is what pyproject.toml declares, with a lowest version each, and free to use."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import legomole
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(legomole.__file__).parent
if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks.reliability import licences, versions  # noqa: E402

PARTS = ("core", "cli", "hosts", "nano", "nodes")
# Modules of ComfyUI, which is no package, with the web server it is made with; packages imported under another name.
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "aiohttp"}
NAMES = {"PIL": "pillow", "yaml": "pyyaml"}
DRAWING = {"pillow"}  # imported inside functions only, from the extra plots


def imports(part: str) -> Iterator[str]:
    """Top-level names of other packages that a part of ours imports, wherever in a file."""
    files = (ROOT / part).rglob("*.py") if part else ROOT.glob("*.py")
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                yield node.module.partition(".")[0]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                named = ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "."
                yield from [named.partition(".")[0]] * (not named.startswith("."))


def packages(part: str) -> set[str]:
    known = COMFYUI if part in ("", "nodes") else set[str]()  # "": the door of the pack
    names = set(imports(part)) - set(sys.stdlib_module_names) - known - {"tomli", "tomllib"}
    return {canonicalize_name(NAMES.get(name, name)) for name in names}


def named(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_what_is_imported_is_declared() -> None:
    """The engine and the command line by the core alone, but for what they draw with where it is there."""
    assert packages("") | packages("core") | packages("cli") <= named(versions.declared([])) | DRAWING
    declared = named(versions.declared(versions.EXTRAS))
    assert {part: packages(part) - declared for part in PARTS} == {part: set() for part in PARTS}
    assert {"torch", "diffusers", "ray", "huggingface-hub", "accelerate"} <= declared


def test_what_is_declared_is_imported() -> None:
    """Or else needed by what is: PEFT adapters are loaded by transformers and diffusers."""
    used = set().union(*map(packages, ("", *PARTS)))
    assert named(versions.declared(versions.EXTRAS)) - used <= {"peft", "tomli"}


def test_everything_has_a_lowest_version_and_the_pins_are_above_it() -> None:
    floors = versions.floors(versions.EXTRAS)
    assert "0" not in floors.values()
    assert Version(floors["torch"]) > Version(versions.floors([])["torch"])  # an extra raises it
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    below = {
        name: (pinned[canonicalize_name(name)], lowest)
        for name, lowest in floors.items()
        if name != "tomli" and Version(pinned[canonicalize_name(name)]) < Version(lowest)
    }
    assert below == {}


def test_the_matrix_goes_from_the_oldest_python_to_the_one_of_every_classifier() -> None:
    pythons = [environment.python for environment in versions.ENVIRONMENTS]
    lowest = re.fullmatch(r">=(3\.\d+)", versions.project()["requires-python"])
    assert lowest is not None
    assert lowest[1] == min(pythons, key=Version)
    assert {environment.oldest for environment in versions.ENVIRONMENTS if environment.python == lowest[1]} == {
        True,
        False,
    }


def test_licences_of_all_that_is_installed_are_known_and_free() -> None:
    """Of the core; whatever is installed of the extras is audited by the command."""
    found, missing = licences.licences([])
    assert missing == []
    assert {"torch", "numpy", "safetensors", "pydantic-core"} <= {licence.package for licence in found}
    # NVIDIA's, which PyTorch's builds for its GPUs bring, are free of charge, not free
    odd = [licence for licence in found if not licence.is_free and not licence.package.startswith(("nvidia", "cuda"))]
    assert odd == []


@pytest.mark.parametrize(
    ("says", "known"),
    [("MIT", True), ("BSD License", True), ("Apache-2.0 AND MIT", True), ("GPL-3.0-only", False), ("", False)],
)
def test_a_licence_is_known_or_to_be_looked_at(says: str, known: bool) -> None:
    licence = licences.Licence("a", "1.0", says)
    assert licence.is_free is known
    assert ("0 to look at" in licences.text([licence], [])) is known
