"""Fuzzing of every reader: our own error or success, within limits of time and memory; never anything else.

Child processes read the cases, because a reader may crash: one is told where to begin, and says what it is at.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 60.0  # of processor time, for one reading; on a busy machine it may take ten times as long
MEMORY = 2 << 30  # bytes of address space beyond what the program takes before it has read anything
_BATCH = 2000  # cases of one child


@dataclass
class Tally:
    """What fuzzing came to.

    Attributes:
        outcomes: Readings by what came of them. kinds: Cases by kind.
        defects: ``number: reading: what went wrong``.
        slowest, largest: Seconds of the slowest reading; megabytes by which memory grew at most, over all children.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.kinds.values())

    def text(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))
        lines = [
            f"{self.cases} inputs ({kinds}), {sum(self.outcomes.values())} readings: "
            f"{self.outcomes['ok']} succeeded, {self.outcomes['refused']} refused with our own error, "
            f"{len(self.defects)} defects",
            f"slowest reading {self.slowest:.1f} s (limit {SECONDS:.0f}), memory up by {self.largest:.0f} MB at most "
            f"(limit {MEMORY >> 20})",
        ]
        return "\n".join([*lines, *self.defects])


def read_cases(seed: int, start: int, stop: int, seconds: float, tally: Tally | None = None) -> None:
    """Make and read cases in this process, and say how each went on standard output, or count it in `tally`."""
    from .cases import make
    from .readers import outcome, readings

    end = time.monotonic() + seconds
    before = _resident()
    for number in range(start, stop):
        if time.monotonic() > end:
            break
        slowest = 0.0
        outcomes: list[str] = []
        defects: list[str] = []
        with tempfile.TemporaryDirectory(prefix="legomole-fuzz-") as folder:
            case = make(seed, number, Path(folder))
            for name, read in readings(case, number):
                if tally is None:
                    _say(at=number, reading=name)
                    _allow(SECONDS)
                began = time.process_time()
                try:
                    outcomes.append(outcome(read))
                except BaseException as error:  # a panic of the parser's is no Exception
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    text = f"{type(error).__name__}: {str(error)[-600:]} ({Path(where.filename).name}:{where.lineno})"
                    defects.append(f"case {number} ({case.kind}): {name}: {text}")
                slowest = max(slowest, time.process_time() - began)
        found = {
            "kind": case.kind, "outcomes": outcomes, "defects": defects, "seconds": slowest,
            "memory": (_resident() - before) / 1e6,
        }  # fmt: skip
        if tally is None:
            _say(done=number, **found)
        else:
            count(tally, found)


def count(tally: Tally, found: dict) -> None:  # type: ignore[type-arg]
    tally.kinds[found["kind"]] += 1
    tally.outcomes.update(found["outcomes"])
    tally.defects += found["defects"]
    tally.slowest = max(tally.slowest, found["seconds"])
    tally.largest = max(tally.largest, found["memory"])


def _allow(seconds: float) -> None:
    """Let this process die when it has taken so much more processor time."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, most))


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _resident() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(seed: int, start: int, stop: int, seconds: float) -> None:
    """A child process: with all that is imported already in memory, no more than `MEMORY` on top of it."""
    import torch

    from . import readers

    torch.set_num_threads(1)
    readers.key_map([])  # loads diffusers
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    read_cases(seed, start, stop, seconds)


def fuzz(minutes: float, seed: int, *, first: int = 0, count_only: int | None = None) -> Tally:
    """Read cases `first`, `first` + 1, .. in child processes until the time is over (or so many were read)."""
    tally, number = Tally(), first
    end = time.monotonic() + 60 * minutes
    last = sys.maxsize if count_only is None else first + count_only
    while number < last and (count_only is not None or time.monotonic() < end):
        left = 1e9 if count_only is not None else end - time.monotonic()
        number = _watch(tally, seed, number, min(last, number + _BATCH), left)
    return tally


def _watch(tally: Tally, seed: int, start: int, stop: int, seconds: float) -> int:
    """Run one child; the number of the next case to be read."""
    command = [sys.executable, "-m", "benchmarks.reliability", "child", str(seed), str(start), str(stop), str(seconds)]
    env = os.environ | {"PYTHONSAFEPATH": "", "OMP_NUM_THREADS": "1", "TORCH_SHOW_CPP_STACKTRACES": "0"}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=Path(__file__).parents[2]
    ) as process:  # fmt: skip
        assert process.stdout is not None
        at, next_one = None, start
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(10 * SECONDS if at is not None else 300):
                line = process.stdout.readline()
                if not line:
                    break
                found = json.loads(line)
                if "at" in found:
                    at = found["at"]
                else:
                    at, next_one = None, found["done"] + 1
                    count(tally, found)
            else:
                process.kill()
                tally.defects.append(f"case {at}: no answer within {10 * SECONDS:.0f} seconds")
                return next_one + 1
        if process.wait() or at is not None:
            errors.seek(0)
            code = process.returncode
            how = (
                f"more than {SECONDS:.0f} s of processor time"
                if code == -signal.SIGXCPU
                else f"the process ended with {code}"
            )
            tally.defects.append(f"case {at}: {how}: {errors.read()[-800:]}")
            return next_one + 1
    return next_one if next_one > start or seconds < 1 else stop
