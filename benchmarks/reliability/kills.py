"""Kill processes at every stage of their work, and see what they leave: the old file or the new one, whole.

The processes are forks of this one, so that a kill costs milliseconds. They die in two ways: at every one of their
calls that touch the disk, one after the other; and at moments drawn at random.
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

_LEFT_OVER = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")
_AUDITED = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "shutil.rmtree", "ctypes.dlsym")


@dataclass
class Job:
    """Something that writes.

    Args:
        work: Does it, in a folder. makes: The name of what it writes there.
        before, after: Digests of what lies there before, and when it is done.
        seconds: How long it takes.
    """

    name: str
    work: Callable[[Path], None]
    makes: str
    before: str = ""
    after: str = ""
    seconds: float = 0.0


@dataclass
class Toll:
    """What the kills came to.

    Attributes:
        found: By job: how often the old, or the new one was found after a kill.
        defects: What was neither.
        leftovers: Temporary files and folders that were left behind.
    """

    found: dict[str, Counter[str]] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)
    leftovers: int = 0

    @property
    def kills(self) -> int:
        return sum(sum(counts.values()) for counts in self.found.values())

    def text(self) -> str:
        lines = [f"{name}: {sum(c.values())} kills, {c['old']} left the old, {c['new']} the new"
                 for name, c in self.found.items()]  # fmt: skip
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
    """The inputs, and old outputs to be replaced."""
    for name, value in (("a", 0.5), ("b", 0.7), ("out", 1.0)):
        save(lora(value), folder / f"{name}.safetensors", format="comfy")
    save(lora(1.0), folder / "out", format="peft")
    (folder / "out" / "README.md").write_text("a file of the user's")


def digest(path: Path) -> str:
    """Of a file, or of all files of a folder with their names; ``"none"`` where there is nothing."""
    if not path.exists():
        return "none"
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return hashlib.sha256(b"".join(p.name.encode() + b"\0" + p.read_bytes() for p in files)).hexdigest()


def kills(times: int, seed: int = 0) -> Toll:
    """Kill every job at each of its calls to the disk, and at random moments until `times` kills are reached."""
    torch.set_num_threads(1)
    toll, rng, plan = Toll(), Random(seed), jobs()
    for job in plan:
        toll.found[job.name] = Counter()
        _measure(job)
        stage = 0
        while _killed(job, toll, at_call=stage):
            stage += 1
    while toll.kills < times:
        job = rng.choice(plan)
        _killed(job, toll, after=rng.uniform(0, 1.2 * job.seconds))
    return toll


def _measure(job: Job) -> None:
    with tempfile.TemporaryDirectory(prefix="legomole-kills-") as name:
        folder = Path(name)
        prepare(folder)
        job.before, began = digest(folder / job.makes), time.monotonic()
        job.work(folder)
        job.seconds, job.after = time.monotonic() - began, digest(folder / job.makes)
        if job.before == job.after:
            raise RuntimeError(f"{job.name} changes nothing")


def _killed(job: Job, toll: Toll, *, at_call: int | None = None, after: float = 0.0) -> bool:
    """Run the job in a fork that is killed; whether it was before it was done. Then look at what is there."""
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
            _look(job, folder, toll, where)
        return killed


def die_at_call(number: int, folder: Path) -> None:
    """Kill this process at its n-th call from now on that opens, renames, links or removes something in the folder."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _AUDITED and (event == "ctypes.dlsym" or str(folder) in str(arguments[0])):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def _look(job: Job, folder: Path, toll: Toll, where: str) -> None:
    found = digest(folder / job.makes)
    state = {job.before: "old", job.after: "new"}.get(found)
    if state is None:
        toll.defects.append(f"{job.name}, killed {where}: neither the old nor the new")
        return
    toll.found[job.name][state] += 1
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    toll.leftovers += len(left)
    toll.defects += [f"{job.name}, killed {where}: left {p.name}" for p in left if not _LEFT_OVER.fullmatch(p.name)]
    # what is left does no harm to the next, and is gone when it is a day old
    for path in left:
        os.utime(path, (0, 0))
    job.work(folder)
    if digest(folder / job.makes) != job.after:
        toll.defects.append(f"{job.name}, killed {where}: the next run made something else")
    if any(path.exists() for path in left if path.name.startswith(f".{job.makes}.")):
        toll.defects.append(f"{job.name}, killed {where}: old temporary files stay for ever")


def training(times: int, seed: int = 0) -> str:
    """Kill a training again and again until it is through; its gates must be those of one that was left alone."""
    from tests.core.train.toy import SETTINGS, equal, toy

    torch.set_num_threads(1)
    rng, plain = Random(seed), toy()
    settings = SETTINGS.model_copy(update={"steps": 75})
    began = time.monotonic()
    whole, _ = plain.trained(settings)
    seconds, killed, lost = time.monotonic() - began, 0, 0
    with tempfile.TemporaryDirectory(prefix="legomole-kills-") as name:
        while killed < times:
            folder = Path(name) / str(killed)
            while True:
                child = os.fork()
                if child == 0:
                    try:
                        plain.trained(settings, folder=folder, key="k")
                    finally:
                        os._exit(0)
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                if not os.WIFSIGNALED(os.waitpid(child, 0)[1]) or killed >= times:
                    break
                killed += 1
            found, _ = plain.trained(settings, folder=folder, key="k")
            lost += not equal(found, whole)
    return f"gate training of 75 steps: {killed} kills, {lost} trainings that ended with other gates"
