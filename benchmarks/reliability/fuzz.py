"""Fuzz every reader: each reading must succeed or raise our own error, within limits of time and memory.

Child processes read the cases, because a reader may crash; they report on standard output which case they are reading.
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

SECONDS = 60.0  # processor time per reading; the wall time may be ten times as long on a busy machine
MEMORY = 2 << 30  # bytes of address space beyond those in use before the first reading
_BATCH = 2000  # cases per child process


@dataclass
class Tally:
    """Results of fuzzing.

    Attributes:
        outcomes: Number of readings by outcome, ``ok`` or ``refused``.
        kinds: Number of cases by kind.
        defects: Descriptions of defects, with case and reading.
        slowest: Seconds of the slowest reading.
        largest: Largest growth of a child's memory in MB.
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
    """Make and read cases in this process; print the results as JSON lines, or count them in `tally`."""
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
                    _print(reading=number, name=name)
                    _limit(SECONDS)
                began = time.process_time()
                try:
                    outcomes.append(outcome(read))
                except BaseException as error:  # a panic of the Rust parser is not an Exception
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    text = f"{type(error).__name__}: {str(error)[-600:]} ({Path(where.filename).name}:{where.lineno})"
                    defects.append(f"case {number} ({case.kind}): {name}: {text}")
                slowest = max(slowest, time.process_time() - began)
        result = {
            "kind": case.kind, "outcomes": outcomes, "defects": defects, "seconds": slowest,
            "memory": (_resident() - before) / 1e6,
        }  # fmt: skip
        if tally is None:
            _print(finished=number, **result)
        else:
            count(tally, result)


def count(tally: Tally, result: dict) -> None:  # type: ignore[type-arg]
    tally.kinds[result["kind"]] += 1
    tally.outcomes.update(result["outcomes"])
    tally.defects += result["defects"]
    tally.slowest = max(tally.slowest, result["seconds"])
    tally.largest = max(tally.largest, result["memory"])


def _limit(seconds: float) -> None:
    """Kill this process once it has used that much more processor time."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, most))


def _print(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _resident() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(seed: int, start: int, stop: int, seconds: float) -> None:
    """Run a child process, limited to `MEMORY` beyond the memory in use after all imports."""
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
    """Read cases `first`, `first` + 1, .. in child processes, for some minutes or, if given, `count_only` cases."""
    tally, number = Tally(), first
    end = time.monotonic() + 60 * minutes
    last = sys.maxsize if count_only is None else first + count_only
    while number < last and (count_only is not None or time.monotonic() < end):
        left = 1e9 if count_only is not None else end - time.monotonic()
        number = _watch(tally, seed, number, min(last, number + _BATCH), left)
    return tally


def _watch(tally: Tally, seed: int, start: int, stop: int, seconds: float) -> int:
    """Run one child process; return the number of the next case to read."""
    command = [sys.executable, "-m", "benchmarks.reliability", "child", str(seed), str(start), str(stop), str(seconds)]
    env = os.environ | {"PYTHONSAFEPATH": "", "OMP_NUM_THREADS": "1", "TORCH_SHOW_CPP_STACKTRACES": "0"}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=Path(__file__).parents[2]
    ) as process:  # fmt: skip
        assert process.stdout is not None
        reading, next_case = None, start
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(10 * SECONDS if reading is not None else 300):
                line = process.stdout.readline()
                if not line:
                    break
                result = json.loads(line)
                if "reading" in result:
                    reading = result["reading"]
                else:
                    reading, next_case = None, result["finished"] + 1
                    count(tally, result)
            else:
                process.kill()
                tally.defects.append(f"case {reading}: no answer within {10 * SECONDS:.0f} seconds")
                return next_case + 1
        if process.wait() or reading is not None:
            errors.seek(0)
            code = process.returncode
            how = (
                f"more than {SECONDS:.0f} s of processor time"
                if code == -signal.SIGXCPU
                else f"the process ended with {code}"
            )
            tally.defects.append(f"case {reading}: {how}: {errors.read()[-800:]}")
            return next_case + 1
    return next_case if next_case > start or seconds < 1 else stop
