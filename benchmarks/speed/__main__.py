"""``python -m benchmarks.speed``, from the project's root: time and memory of merging, compared with other tools.

Every tool runs in a separate process, one after the other, on the same files; imports are not counted. Cases that are
not run keep their rows in ``results.json``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from legomole.core import __version__

from ..llm.many import measure
from . import report
from .cases import CASES, LARGE, PLAIN, Case
from .sampled import SAMPLED
from .whole import WHOLE, weights_of

_HERE = Path(__file__).parent
_IMPORTED = {"legomole": "scipy.cluster.hierarchy", "peft": "peft"}  # imported lazily by the tools


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(PLAIN))
    parser.add_argument("--large", action="store_true", help=f"also run {LARGE}: 5 GB of files, only legomole's tools")
    parser.add_argument("--tools", nargs="+", choices=[*WHOLE, *SAMPLED], default=[*WHOLE, *SAMPLED])
    parser.add_argument("--rounds", type=int, default=3, help="runs of every tool; the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder to keep the LoRAs in; default a temporary one")
    parser.add_argument("--out", type=Path, default=_HERE, help="folder for results.json, table.md and the plot")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        tool, case, folder = options.child
        torch.set_num_threads(options.threads)
        print(json.dumps(_child(tool, CASES[case], Path(folder))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = report.Results.load(options.out, machine(options.threads))
        for name in [*options.cases, *([LARGE] if options.large else [])]:
            tools = [tool for tool in options.tools if name != LARGE or tool.startswith(("legomole", "floor"))]
            rows, inertia = _measured(CASES[name], tools, options.rounds, options.threads, work)
            results.replace(name, rows, inertia)
            results.publish(options.out)
    print((options.out / "table.md").read_text())


def _child(tool: str, case: Case, folder: Path) -> dict[str, Any]:
    """Run one tool once; called in a separate process."""
    with torch.no_grad():
        if tool in SAMPLED:
            result = SAMPLED[tool](case, folder)
            return {"seconds": result.seconds, "inertia": result.inertia}
        paths, out = case.write(folder), folder / "out.safetensors"
        library = _IMPORTED.get(tool.partition("-")[0])
        if library is not None:
            importlib.import_module(library)  # before the clock starts
        start = time.perf_counter()
        WHOLE[tool](case, paths, out)
        return {"seconds": time.perf_counter() - start}


def _measured(
    case: Case, tools: Sequence[str], rounds: int, threads: int, work: Path
) -> tuple[list[report.Row], float | None]:
    """Run the tools on a case; return its rows, and the ratio of our inertia to scikit-learn's on the same units."""
    for path in case.write(work):
        weights_of(path).read_bytes()  # fills the page cache
    os.sync()  # pending writes would disturb the first tool
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    peak = dict.fromkeys(tools, 0.0)
    inertia: float | None = None
    for i in range(rounds):
        for tool in tools if i % 2 == 0 else reversed(tools):
            command = ["-m", "benchmarks.speed", "--threads", str(threads), "--child", tool, case.name, str(work)]
            cost = measure(command, threads)
            result = json.loads(cost.output.splitlines()[-1])
            seconds[tool].append(result["seconds"])
            peak[tool] = max(peak[tool], cost.own * 1000)
            inertia = result.get("inertia") or inertia
            print(f"{case.name} {tool}: {result['seconds']:.2f} s", file=sys.stderr, flush=True)
    rows = [
        report.Row(case.name, tool, round(statistics.median(seconds[tool]), 4), round(peak[tool]), tool in SAMPLED)
        for tool in tools
    ]
    return rows, inertia


def machine(threads: int) -> str:
    """Describe the machine and the versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (x.partition(": ")[2] for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), name
        )
    return f"{name}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, legomole {__version__}"


if __name__ == "__main__":
    main()
