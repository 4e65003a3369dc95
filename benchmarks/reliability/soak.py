"""Hundreds of prompts on one ComfyUI server: images must equal those of a fresh server, memory must not grow."""

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
from .prompts import SoakPrompt

ROOT = Path(__file__).parents[2]
PICTURES = 51  # distinct images; each is sampled several times, between changing others
_GROWTH = 64.0  # MB of growth between the medians of the first and the last third that are tolerated
_LEAK = "memory leak detected"  # logged by ComfyUI about models that are still referenced


@dataclass
class SoakResults:
    """Results of a soak test.

    Args:
        pictures: Number of an image -> its hash each time it was sampled.
        memory: Memory of the server after every prompt, in MB.
        kinds: Outcome and kind of the prompts -> their number.
        fresh: Number of fresh servers. compared: Number of images compared. seconds: Time on the first server.
        defects: Descriptions of defects.
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


def soak(count: int, seed: int = 0, servers: int = 6) -> SoakResults:
    """Queue `count` prompts on one server, then sample the same images on fresh servers and compare.

    Args:
        count: Number of prompts.
        seed: Random seed of their order.
        servers: Number of fresh servers, each of which samples a part of the images in another order.
    """
    results, rng, began = SoakResults(), Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="legomole-soak-") as name:
        base = Path(name)
        prompts.lay_out(base, ROOT)
        with _server(base) as server:
            _queue_all(server, count, rng, results)
            _plain_again(server, results)
            if _LEAK in server.log.read_text(errors="replace"):
                results.defects.append(f"the server's log says: {_LEAK}")
        results.seconds = time.monotonic() - began
        numbers = sorted(results.pictures)
        rng.shuffle(numbers)
        for share in (numbers[i::servers] for i in range(min(servers, len(numbers)))):
            with _server(base) as server:
                results.fresh += 1
                for number in share:
                    compare(number, sample(server, prompts.picture(number)), results)
    with tempfile.TemporaryDirectory(prefix="legomole-soak-") as name:
        base = Path(name)
        prompts.lay_out(base, None)
        with _server(base) as server:  # without our nodes
            compare(0, sample(server, prompts.picture(0)), results)
    if results.growth > _GROWTH:
        results.defects.append(f"memory grew by {results.growth:.0f} MB")
    return results


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


def _queue_all(server: Server, count: int, rng: Random, results: SoakResults) -> None:
    """Queue one to five images at a time; prompts to be cancelled or refused run alone."""
    left = count
    while left:
        drawn = rng.random()
        if drawn < 1 / 12:
            cancel(server, prompts.cancelled(results.kinds.total()), rng, results)
            left -= 1
        elif drawn < 1 / 6:
            refuse(server, prompts.refused(rng.randrange(100)), results)
            left -= 1
        else:
            numbers = [rng.randrange(PICTURES) for _ in range(min(left, rng.randint(1, 5)))]
            queue_images(server, numbers, results)
            left -= len(numbers)


def queue_images(server: Server, numbers: Sequence[int], results: SoakResults) -> None:
    """Queue images together and record their hashes."""
    queued = [prompts.picture(number) for number in numbers]
    versions = [prompt.version for prompt in queued if prompt.version is not None]
    if len(versions) > 1:  # each needs another version of the file
        for number in numbers:
            queue_images(server, [number], results)
        return
    if versions:
        prompts.change(server.base, versions[0])
    waiting = [server.queue(prompt.graph.nodes) for prompt in queued]
    for number, prompt, prompt_id in zip(numbers, queued, waiting, strict=True):
        run = server.wait(prompt_id, timeout=600)
        if run.error is not None:
            results.defects.append(f"picture {number} ({prompt.kind}): {run.error}")
        else:
            results.pictures.setdefault(number, []).append(_hash(server, run, prompt.node))
        _note(server, results, f"sampled: {prompt.kind}")


def cancel(server: Server, prompt: SoakPrompt, rng: Random, results: SoakResults) -> None:
    """Queue a prompt, and interrupt it within half a second of the first progress report of its node."""
    prompt_id = server.queue(prompt.graph.nodes)
    server.wait_for(
        "progress",
        lambda data: data["prompt_id"] == prompt_id and data["node"] == prompt.node and data["value"] > 0,
        timeout=600,
    )
    time.sleep(rng.uniform(0, 0.5))
    server.post("/interrupt", {})
    run = server.wait(prompt_id, timeout=600)
    if not run.of("execution_interrupted"):
        results.defects.append(f"{prompt.kind} was not cancelled: {run.error or 'it ran to its end'}")
    _note(server, results, f"cancelled: {prompt.kind}")


def refuse(server: Server, prompt: SoakPrompt, results: SoakResults) -> None:
    """Queue a prompt that must be refused."""
    try:
        error = server.wait(server.queue(prompt.graph.nodes), timeout=600).error or "nothing"
    except Refused as refusal:
        error = str(refusal)
    if prompt.error not in error:
        results.defects.append(f"{prompt.kind} was not refused with the expected error: {error}")
    _note(server, results, f"refused: {prompt.kind}")


def _plain_again(server: Server, results: SoakResults) -> None:
    """Queue image 0, which has none of our nodes, after everything that was applied to the model."""
    queue_images(server, [0], results)


def sample(server: Server, prompt: SoakPrompt) -> str:
    """Sample an image now and return its hash."""
    if prompt.version is not None:
        prompts.change(server.base, prompt.version)
    run = server.wait(server.queue(prompt.graph.nodes), timeout=600)
    return f"error: {run.error}" if run.error is not None else _hash(server, run, prompt.node)


def compare(number: int, fresh: str, results: SoakResults) -> None:
    """Compare all samples of an image with the hash from a fresh server."""
    for digest in results.pictures[number]:
        results.compared += 1
        if digest != fresh:
            results.defects.append(f"picture {number} ({prompts.picture(number).kind}) differs from a fresh server's")


def _hash(server: Server, run: Run, node: str) -> str:
    """Return a hash of the image's pixels and its latent."""
    pixels, latent = picture_of(server, run, node)
    return hashlib.sha256(pixels.tobytes() + np.ascontiguousarray(latent.numpy()).tobytes()).hexdigest()


def _note(server: Server, results: SoakResults, kind: str) -> None:
    results.kinds[kind] += 1
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    results.memory.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")))


def draw(results: SoakResults, path: Path) -> None:
    """Plot the memory curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.2), dpi=100)
    axes.plot(range(1, len(results.memory) + 1), results.memory, color="#3b6ea5", lw=1.2)
    axes.set(xlabel="prompts", ylabel="resident memory, MB", ylim=(0, None), xlim=(1, len(results.memory)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
