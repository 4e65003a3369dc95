"""Real faults of the machine: full disks, read-only folders, too little memory, inputs that change.

Each one hits a fork of this process. Afterwards the old output must be intact, without any leftover files.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from legomole.core.errors import FormatError, LegoMoleError, MergeError, SaveError
from legomole.core.formats import load, save
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import run

from .kills import digest, lora, prepare

_WRONG = 99  # exit code of a fork with a wrong result


def faults() -> list[str]:
    """Cause every fault; return a line for each with its name and ``ok`` or the defect."""
    return [f"{name}: {_outcome(fault, expected)}" for name, fault, expected in _FAULTS]


def _outcome(fault: Callable[[Path], object], expected: type[LegoMoleError] | None) -> str:
    with tempfile.TemporaryDirectory(prefix="legomole-faults-") as name:
        folder = Path(name)
        prepare(folder)
        folder.chmod(0o755)
        before = {path: digest(folder / path) for path in ("out.safetensors", "out")}
        child = os.fork()
        if child == 0:
            code = 0 if expected is None else _WRONG
            try:
                fault(folder)
            except LegoMoleError as error:
                code = 0 if expected is not None and isinstance(error, expected) else _WRONG
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                code = _WRONG
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        folder.chmod(0o755)
        if os.WIFSIGNALED(status):
            ended = f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
            if fault is not _cut_short:
                return ended
        elif os.WEXITSTATUS(status):
            return "not the expected error"
        else:
            ended = "ok"
        changed = [path for path, was in before.items() if digest(folder / path) != was]
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        return ended if not changed and not left else f"changed {changed}, left {left}"


def _merge(folder: Path, method: str = "lego", progress: Callable[[int, int, str], None] | None = None) -> None:
    inputs = [Input(path=f"{name}.safetensors") for name in "ab"]
    settings = {"rank": 4} if method != "concat" else {}
    save(run(Recipe(method=method, settings=settings, inputs=inputs), folder=folder, progress=progress).adapter,
         folder / "out.safetensors")  # fmt: skip


def _full_disk(path: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        save(lora(2.0), folder / path, format="peft" if path == "out" else "comfy")

    return fault


def _read_only(path: str) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        folder.chmod(0o555)
        if os.getuid() == 0:
            os.setuid(65534)  # nobody: permissions do not apply to root
        save(lora(2.0), folder / path, format="peft" if path == "out" else "comfy")

    return fault


def _no_memory(folder: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.7)):
        save(lora(value, 16_384, 1), folder / f"{name}.safetensors", format="comfy")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _merge(folder, "ties")  # needs dense matrices of a gigabyte each


def _overwritten(folder: Path) -> None:
    other = save(lora(9.0), folder / "other", format="comfy").read_bytes()

    def overwrite(done: int, total: int, name: str) -> None:
        if done == 1:
            with (folder / "a.safetensors").open("r+b") as file:
                file.write(other)
            os.utime(folder / "a.safetensors")

    _merge(folder, "ties", overwrite)


def _replaced(folder: Path) -> None:
    def replace(done: int, total: int, name: str) -> None:
        if done == 1:
            save(lora(9.0), folder / "a.safetensors", format="comfy")

    _merge(folder, "ties", replace)


def _cut_short(folder: Path) -> None:
    def cut(done: int, total: int, name: str) -> None:
        if done == 1:
            os.truncate(folder / "a.safetensors", 0)

    _merge(folder, "ties", cut)


def _race(folder: Path, path: str = "race") -> None:
    """Let three processes save under one name while this one reads the file repeatedly."""
    target = folder / (f"{path}.safetensors" if path != "pair" else path)
    format = "peft" if path == "pair" else "comfy"
    save(lora(1.0), target, format=format)
    writers: list[int] = []
    for value in (1.0, 2.0, 3.0):
        child = os.fork()
        if child == 0:
            end, adapter = time.monotonic() + 3, lora(value)
            code = 0
            while time.monotonic() < end and not code:
                try:
                    save(adapter, target, format=format)
                except SaveError:
                    code = 1
            os._exit(code)
        writers.append(child)
    scales, reads = {lora(value).modules["model.layers.0.q_proj"].scale: value for value in (1.0, 2.0, 3.0)}, 0
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            part = load(target).modules["model.layers.0.q_proj"]
        except FormatError as error:
            if "changed while it was read" not in str(error):
                raise
            continue
        reads += 1
        written = lora(scales[part.scale]).modules["model.layers.0.q_proj"]
        if not bool((written.A == part.A).all() and (written.B == part.B).all()):
            raise RuntimeError("factors and scale are of different writers")
    codes = [os.waitpid(child, 0)[1] for child in writers]
    if any(codes) or not reads:
        raise RuntimeError(f"writers ended with {codes}, {reads} reads")


def _race_of_folders(folder: Path) -> None:
    _race(folder, "pair")


_FAULTS: list[tuple[str, Callable[[Path], object], type[LegoMoleError] | None]] = [
    ("full disk, file", _full_disk("out.safetensors"), SaveError),
    ("full disk, PEFT folder", _full_disk("out"), SaveError),
    ("read-only folder, file", _read_only("out.safetensors"), SaveError),
    ("read-only folder, PEFT folder", _read_only("out"), SaveError),
    ("out of memory in the middle of a merge", _no_memory, MergeError),
    ("an input overwritten in place in the middle of a merge", _overwritten, FormatError),
    ("an input replaced as a whole in the middle of a merge", _replaced, FormatError),
    ("an input cut to nothing in the middle of a merge", _cut_short, FormatError),
    ("three processes save one file, one reads it", _race, None),
    ("three processes save one PEFT folder, one reads it", _race_of_folders, None),
]
