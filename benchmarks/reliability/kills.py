"""Kill processes at every stage of their work, after which the old or the new file must be there, intact.

The processes are forks of this one, so that a kill takes milliseconds. They are killed at each of their calls that
access the disk, one after the other, and at random moments.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import run

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")
_AUDITED = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "shutil.rmtree", "ctypes.dlsym")


@dataclass
class Job:
    """An operation that writes a file or folder.

    Args:
        work: Runs the operation in a folder.
        output: Name of the file or folder it writes.
        before: Digest of the output before the operation. after: Digest afterwards.
        seconds: Duration of the operation.
    """

    name: str
    work: Callable[[Path], None]
    output: str
    before: str = ""
    after: str = ""
    seconds: float = 0.0


@dataclass
class KillResults:
    """Results of the kills.

    Attributes:
        outputs: Name of a job -> number of kills after which the old or the new output was there.
        defects: Descriptions of defects.
        leftovers: Number of temporary files and folders left behind.
    """

    outputs: dict[str, Counter[str]] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)
    leftovers: int = 0

    @property
    def kills(self) -> int:
        return sum(sum(counts.values()) for counts in self.outputs.values())

    def text(self) -> str:
        lines = [f"{name}: {sum(c.values())} kills, {c['old']} left the old output, {c['new']} the new"
                 for name, c in self.outputs.items()]  # fmt: skip
        lines.append(f"{self.kills} kills in all, {self.leftovers} temporary files left, {len(self.defects)} defects")
        return "\n".join([*lines, *self.defects])


def lora(value: float, width: int = 64, layers: int = 4) -> Adapter:
    g = torch.Generator().manual_seed(int(1000 * value))
    made = {
        f"model.layers.{i}.q_proj": LowRank(
            value * torch.randn(4, width, generator=g), torch.randn(width, 4, generator=g), 4.0 * value
        )
        for i in range(layers)
    }
    return Adapter(made)


def jobs() -> list[Job]:
    def merging(folder: Path) -> None:
        inputs = [Input(path=f"{name}.safetensors") for name in "ab"]
        result = run(Recipe(method="lego", settings={"rank": 4}, inputs=inputs), folder=folder)
        save(result.adapter, folder / "out.safetensors")

    return [
        Job("merge over a file", merging, "out.safetensors"),
        Job("save over a file", lambda f: _ignore(save(lora(2.0, 4096), f / "out.safetensors", format="comfy")),
            "out.safetensors"),
        Job("save over a PEFT folder", lambda f: _ignore(save(lora(2.0), f / "out", format="peft")), "out"),
        Job("save a new PEFT folder", lambda f: _ignore(save(lora(2.0), f / "fresh", format="peft")), "fresh"),
    ]  # fmt: skip


def _ignore(_: object) -> None: ...


def prepare(folder: Path) -> None:
    """Write the inputs, and old outputs to replace."""
    for name, value in (("a", 0.5), ("b", 0.7), ("out", 1.0)):
        save(lora(value), folder / f"{name}.safetensors", format="comfy")
    save(lora(1.0), folder / "out", format="peft")
    (folder / "out" / "README.md").write_text("a file of the user")


def digest(path: Path) -> str:
    """Return a digest of a file, or of all files in a folder with their names; ``"none"`` if nothing exists."""
    if not path.exists():
        return "none"
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return hashlib.sha256(b"".join(p.name.encode() + b"\0" + p.read_bytes() for p in files)).hexdigest()


def kills(times: int, seed: int = 0) -> KillResults:
    """Kill every job at each of its disk accesses, and at random moments until `times` kills are reached."""
    torch.set_num_threads(1)
    results, rng, plan = KillResults(), Random(seed), jobs()
    for job in plan:
        results.outputs[job.name] = Counter()
        _measure(job)
        stage = 0
        while _killed(job, results, at_call=stage):
            stage += 1
    while results.kills < times:
        job = rng.choice(plan)
        _killed(job, results, after=rng.uniform(0, 1.2 * job.seconds))
    return results


def _measure(job: Job) -> None:
    with tempfile.TemporaryDirectory(prefix="legomole-kills-") as name:
        folder = Path(name)
        prepare(folder)
        job.before, began = digest(folder / job.output), time.monotonic()
        job.work(folder)
        job.seconds, job.after = time.monotonic() - began, digest(folder / job.output)
        if job.before == job.after:
            raise RuntimeError(f"{job.name} changes nothing")


def _killed(job: Job, results: KillResults, *, at_call: int | None = None, after: float = 0.0) -> bool:
    """Run the job in a fork and kill it; if it was not finished yet, check its output and return ``True``."""
    with tempfile.TemporaryDirectory(prefix="legomole-kills-") as name:
        folder = Path(name)
        prepare(folder)
        child = os.fork()
        if child == 0:
            if at_call is not None:
                die_at_call(at_call, folder)
            try:
                job.work(folder)
            finally:
                os._exit(0)
        if at_call is None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if killed:
            where = f"at call {at_call}" if at_call is not None else f"after {after:.4f} s"
            _check(job, folder, results, where)
        return killed


def die_at_call(number: int, folder: Path) -> None:
    """Kill this process at its n-th call from now on that opens, renames, links or removes a file in the folder."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _AUDITED and (event == "ctypes.dlsym" or str(folder) in str(arguments[0])):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def _check(job: Job, folder: Path, results: KillResults, where: str) -> None:
    state = {job.before: "old", job.after: "new"}.get(digest(folder / job.output))
    if state is None:
        results.defects.append(f"{job.name}, killed {where}: neither the old nor the new output")
        return
    results.outputs[job.name][state] += 1
    leftovers = [path for path in folder.iterdir() if path.name.startswith(".")]
    results.leftovers += len(leftovers)
    unknown = [path.name for path in leftovers if not _TEMPORARY.fullmatch(path.name)]
    results.defects += [f"{job.name}, killed {where}: left {name}" for name in unknown]
    # leftovers must not affect the next run, which removes those older than a day
    for path in leftovers:
        os.utime(path, (0, 0))
    job.work(folder)
    if digest(folder / job.output) != job.after:
        results.defects.append(f"{job.name}, killed {where}: the next run wrote something else")
    if any(path.exists() for path in leftovers if path.name.startswith(f".{job.output}.")):
        results.defects.append(f"{job.name}, killed {where}: old temporary files are never removed")


def training(times: int, seed: int = 0) -> str:
    """Kill and resume a gate training until it is finished; its gates must be those of an uninterrupted one."""
    from tests.core.train.toy import SETTINGS, equal, toy

    torch.set_num_threads(1)
    rng, example = Random(seed), toy()
    settings = SETTINGS.model_copy(update={"steps": 75})
    began = time.monotonic()
    whole, _ = example.trained(settings)
    seconds, killed, lost = time.monotonic() - began, 0, 0
    with tempfile.TemporaryDirectory(prefix="legomole-kills-") as name:
        while killed < times:
            folder = Path(name) / str(killed)
            while True:
                child = os.fork()
                if child == 0:
                    try:
                        example.trained(settings, folder=folder, key="k")
                    finally:
                        os._exit(0)
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                if not os.WIFSIGNALED(os.waitpid(child, 0)[1]) or killed >= times:
                    break
                killed += 1
            gates, _ = example.trained(settings, folder=folder, key="k")
            lost += not equal(gates, whole)
    return f"gate training of 75 steps: {killed} kills, {lost} trainings with different gates"
