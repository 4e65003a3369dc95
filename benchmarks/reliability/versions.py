"""Run the test suite with the oldest versions that pyproject.toml declares and with the newest ones, on each Python.

Every environment is created from scratch for a copy of the working tree, and removed afterwards. The tests in a real
ComfyUI, which has its own versions, and those of the benchmarks are excluded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
EXTRAS = ("diffusers", "peft", "plots", "ray")
_SHOWN = ("torch", "numpy", "safetensors", "diffusers", "transformers", "peft")
_TOOLS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "pillow",
    "scikit-learn",
    "setuptools>=77",
)  # newest versions
_EXCLUDED = ("comfy", "page", "benchmarks")
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")


@dataclass(frozen=True)
class Environment:
    """An environment for the tests.

    Args:
        name: Name in the table and on the command line.
        python: Python version. extras: Extras of the package to install.
        oldest: Whether all dependencies have their declared minimum version; otherwise the newest.
    """

    name: str
    python: str
    extras: tuple[str, ...] = EXTRAS
    oldest: bool = False


ENVIRONMENTS = (
    Environment("oldest-core", "3.10", extras=(), oldest=True),
    Environment("oldest", "3.10", oldest=True),
    *(Environment(f"newest-{minor}", f"3.{minor}") for minor in range(10, 14)),
)


def project() -> dict[str, Any]:
    """Return the ``[project]`` table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(extras: Iterable[str]) -> list[Requirement]:
    """Return the requirements of the core and some extras in pyproject.toml, nested extras included."""
    table = project()

    def read(texts: Iterable[str]) -> Iterator[Requirement]:
        for requirement in map(Requirement, texts):
            if requirement.name == table["name"]:
                for extra in sorted(requirement.extras):
                    yield from read(table["optional-dependencies"][extra])
            else:
                yield requirement

    return list(read([*table["dependencies"], *(f"{table['name']}[{extra}]" for extra in extras)]))


def floors(extras: Iterable[str]) -> dict[str, str]:
    """Return package -> lowest supported version, the maximum over core and extras."""
    lowest: dict[str, str] = {}
    for requirement in declared(extras):
        minimums = [part.version for part in requirement.specifier if part.operator == ">="]
        lowest[requirement.name] = max([*minimums, lowest.get(requirement.name, "0")], key=Version)
    return lowest


def versions(names: Sequence[str]) -> Iterator[str]:
    """Run the tests in the named environments (default all); yield the lines of a table as they are finished."""
    columns = ("environment", "Python", *_SHOWN, "passed", "skipped", "failed")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for environment in ENVIRONMENTS:
        if not names or environment.name in names:
            cells = _row(environment)
            yield f"| {' | '.join([environment.name, *cells])} |"


def _row(environment: Environment) -> list[str]:
    interpreter = _interpreter(environment.python)
    if interpreter is None:
        return [environment.python, "no such Python on this machine"]
    with tempfile.TemporaryDirectory(prefix="legomole-versions-") as name:
        folder = Path(name)
        tree = _copied(folder / "legomole")
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        limits = folder / "limits.txt"
        lowest = floors(environment.extras) if environment.oldest else {}
        limits.write_text("".join(f"{package}=={version}\n" for package, version in lowest.items()))
        extras = f"[{','.join(environment.extras)}]" if environment.extras else ""
        for command in (
            [interpreter, "-m", "venv", str(folder / "venv")],
            [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "pip"],
            [str(python), "-m", "pip", "install", "--quiet", "-c", str(limits), "-e", f".{extras}", *_TOOLS],
        ):
            result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
            if result.returncode:
                return [environment.python, f"cannot be installed: {result.stderr.strip()[-600:]}"]
        return [environment.python, *_installed(python), *_tested(python, tree, environment.name)]


def _interpreter(version: str) -> str | None:
    """Return a Python of a version, from pyenv or on the path."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    of_pyenv = [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    return next((path for path in [*of_pyenv, on_path] if path), None)


def _copied(target: Path) -> Path:
    """Copy the working tree without files that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def _installed(python: Path) -> list[str]:
    code = (
        "from importlib.metadata import PackageNotFoundError, version\n"
        f"for name in {_SHOWN}:\n"
        "    try: print(version(name))\n"
        "    except PackageNotFoundError: print('')\n"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def _tested(python: Path, tree: Path, name: str) -> list[str]:
    """Run the tests; return the numbers of passed, skipped and failed ones, and write the output to a file."""
    command = [str(python.with_name("pytest")), *(f"--ignore=tests/{name}" for name in _EXCLUDED), "-q"]
    # ruff is pinned for developers; its findings do not depend on the environment
    command += ["--deselect=tests/test_package.py::test_ruff_is_clean"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMFYUI"))}
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, env=environment)
    log = Path(tempfile.gettempdir()) / f"legomole-{name}.log"
    log.write_text(result.stdout + result.stderr, encoding="utf-8")
    lines = result.stdout.strip().splitlines() or ["no output"]
    counts = {what.rstrip("s"): int(number) for number, what in _COUNTS.findall(lines[-1])}
    if not counts:
        return [f"{lines[-1]} ({log})"]
    bad = counts.get("failed", 0) + counts.get("error", 0)
    return [str(counts.get("passed", 0)), str(counts.get("skipped", 0)), f"{bad} ({log})" if bad else "0"]
