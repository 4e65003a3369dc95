"""One ComfyUI server and hundreds of prompts: every picture as a fresh server paints it, no growth of memory."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import numpy as np

from tests.comfy.conftest import picture_of
from tests.comfy.server import Refused, Run, Server, find

from . import prompts
from .prompts import Asked

ROOT = Path(__file__).parents[2]
PICTURES = 51  # different ones; each comes up several times, in changing company
_GROWTH = 64.0  # MB between the medians of the first and the last third that are still called none
_LEFT = "memory leak detected"  # what ComfyUI logs of models that somebody holds on to


@dataclass
class Soak:
    """What became of the prompts.

    Args:
        pictures: Number of a picture -> the hashes it had, one per time it was painted.
        memory: Of the server after every prompt, in MB.
        kinds: How often each kind was painted, cancelled, refused.
        fresh: Servers that painted pictures again.
        defects: Lines, one per thing that was not as it should be.
    """

    pictures: dict[int, list[str]] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    fresh: int = 0
    compared: int = 0
    seconds: float = 0.0
    defects: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        third = max(1, len(self.memory) // 3)
        return median(self.memory[-third:]) - median(self.memory[:third])

    def text(self) -> str:
        ends = Counter[str]()
        for kind, count in self.kinds.items():
            ends[kind.partition(":")[0]] += count
        return "\n".join(
            [
                f"{sum(ends.values())} prompts in {self.seconds:.0f} s: "
                + ", ".join(f"{count} {end}" for end, count in sorted(ends.items(), reverse=True)),
                *(f"  {kind} {count}" for kind, count in sorted(self.kinds.items())),
                f"{self.compared} pictures compared with those of {self.fresh} fresh servers",
                f"memory {self.memory[0]:.0f} MB after the first prompt, {self.memory[-1]:.0f} MB after the last, "
                f"median {self.growth:+.0f} MB from the first third to the last",
                f"{len(self.defects)} defects",
                *self.defects,
            ]
        )


def soak(count: int, seed: int = 0, servers: int = 6) -> Soak:
    """Queue `count` prompts on one server, then paint the same pictures on fresh ones and compare.

    Args:
        count: Of prompts. seed: Of their order.
        servers: Fresh ones; each paints its share of the pictures, in an order of its own.
    """
    found, rng, began = Soak(), Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="legomole-soak-") as name:
        base = Path(name)
        prompts.lay_out(base, ROOT)
        with _server(base) as server:
            _queue_all(server, count, rng, found)
            _plain_again(server, found)
            if _LEFT in server.log.read_text(errors="replace"):
                found.defects.append(f"the server's log says: {_LEFT}")
        found.seconds = time.monotonic() - began
        numbers = sorted(found.pictures)
        rng.shuffle(numbers)
        for share in (numbers[i::servers] for i in range(min(servers, len(numbers)))):
            with _server(base) as server:
                found.fresh += 1
                for number in share:
                    compare(number, painted(server, prompts.picture(number)), found)
    with tempfile.TemporaryDirectory(prefix="legomole-soak-") as name:
        base = Path(name)
        prompts.lay_out(base, None)
        with _server(base) as server:  # without any node of ours
            compare(0, painted(server, prompts.picture(0)), found)
    if found.growth > _GROWTH:
        found.defects.append(f"memory grew by {found.growth:.0f} MB")
    return found


@contextmanager
def _server(base: Path) -> Iterator[Server]:
    where = find()
    if isinstance(where, str):
        raise SystemExit(where)
    server = Server(*where, base)
    try:
        yield server
    finally:
        server.close()


def _queue_all(server: Server, count: int, rng: Random, found: Soak) -> None:
    """One to five prompts wait in the queue at a time; those that need a quiet server come alone."""
    left = count
    while left:
        drawn = rng.random()
        if drawn < 1 / 12:
            cancel(server, prompts.cancelled(found.kinds.total()), rng, found)
            left -= 1
        elif drawn < 1 / 6:
            refuse(server, prompts.refused(rng.randrange(100)), found)
            left -= 1
        else:
            numbers = [rng.randrange(PICTURES) for _ in range(min(left, rng.randint(1, 5)))]
            paint(server, numbers, found)
            left -= len(numbers)


def paint(server: Server, numbers: Sequence[int], found: Soak) -> None:
    """Queue pictures together."""
    asked = [prompts.picture(number) for number in numbers]
    versions = [a.version for a in asked if a.version is not None]
    if len(versions) > 1:  # they would need the file in several versions at once
        for number in numbers:
            paint(server, [number], found)
        return
    if versions:
        prompts.change(server.base, versions[0])
    waiting = [server.queue(a.graph.nodes) for a in asked]
    for number, a, prompt_id in zip(numbers, asked, waiting, strict=True):
        run = server.wait(prompt_id, timeout=600)
        if run.error is not None:
            found.defects.append(f"picture {number} ({a.kind}): {run.error}")
        else:
            found.pictures.setdefault(number, []).append(_hash(server, run, a.node))
        _note(server, found, f"painted: {a.kind}")


def cancel(server: Server, asked: Asked, rng: Random, found: Soak) -> None:
    """Queue a prompt, and interrupt it up to half a second after its node has begun to tell how far it is."""
    prompt_id = server.queue(asked.graph.nodes)
    server.wait_for(
        "progress",
        lambda data: data["prompt_id"] == prompt_id and data["node"] == asked.node and data["value"] > 0,
        timeout=600,
    )
    time.sleep(rng.uniform(0, 0.5))
    server.post("/interrupt", {})
    run = server.wait(prompt_id, timeout=600)
    if not run.of("execution_interrupted"):
        found.defects.append(f"{asked.kind} was not cancelled: {run.error or 'it ran to its end'}")
    _note(server, found, f"cancelled: {asked.kind}")


def refuse(server: Server, asked: Asked, found: Soak) -> None:
    """Queue a prompt that is wrong."""
    try:
        said = server.wait(server.queue(asked.graph.nodes), timeout=600).error or "nothing"
    except Refused as error:
        said = str(error)
    if asked.error not in said:
        found.defects.append(f"{asked.kind} was not refused as it should be: {said}")
    _note(server, found, f"refused: {asked.kind}")


def _plain_again(server: Server, found: Soak) -> None:
    """Picture 0 has none of our nodes; it comes last as well, after all that was put on the model."""
    paint(server, [0], found)


def painted(server: Server, asked: Asked) -> str:
    """The hash of a picture, painted now."""
    if asked.version is not None:
        prompts.change(server.base, asked.version)
    run = server.wait(server.queue(asked.graph.nodes), timeout=600)
    return f"error: {run.error}" if run.error is not None else _hash(server, run, asked.node)


def compare(number: int, fresh: str, found: Soak) -> None:
    """All that was painted of a picture against the hash it must have."""
    for painted in found.pictures[number]:
        found.compared += 1
        if painted != fresh:
            found.defects.append(f"picture {number} ({prompts.picture(number).kind}) differs from a fresh server's")


def _hash(server: Server, run: Run, node: str) -> str:
    """Of the picture's pixels and its latent's bits."""
    pixels, latent = picture_of(server, run, node)
    return hashlib.sha256(pixels.tobytes() + np.ascontiguousarray(latent.numpy()).tobytes()).hexdigest()


def _note(server: Server, found: Soak, kind: str) -> None:
    found.kinds[kind] += 1
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    found.memory.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")))


def draw(found: Soak, path: Path) -> None:
    """The memory curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.2), dpi=100)
    axes.plot(range(1, len(found.memory) + 1), found.memory, color="#3b6ea5", lw=1.2)
    axes.set(xlabel="prompts", ylabel="resident memory, MB", ylim=(0, None), xlim=(1, len(found.memory)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
