"""Time of findings and surveys relative to reading the files: `python -m benchmarks.speed.inspection`; one minute.

Three random LoRAs of rank 32 with SDXL's layers. Reading is `legomole.load`, which hashes a file and checks its values.
All parts run in turns in one process; the processor time of all threads counts, in the fastest round. Writes
``inspection.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from legomole.core.formats import load
from legomole.core.survey.sound import NoMerge, merge_sound_layers
from legomole.core.survey.survey import survey

from ..common import write
from .cases import CASES


def ratios(case: str, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of reading, and the others relative to it.

    Returns:
        ``read``: seconds. ``findings``: what `legomole inspect` computes. ``survey``: what its plot needs, with a LEGO
        merge.
    """
    paths = CASES[case].write(folder)
    adapters = [load(path) for path in paths]
    parts: dict[str, Callable[[], Any]] = {
        "read": lambda: [load(path) for path in paths],
        "findings": lambda: merge_sound_layers(adapters, NoMerge(), dtype=torch.float32),
        "survey": lambda: survey(adapters),
    }
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.process_time()
            part()
            best[name] = min(best[name], time.process_time() - start)
    read = best.pop("read")
    return {"read": round(read, 3), **{name: round(seconds / read, 2) for name, seconds in best.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="sdxl-3x32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, help="folder to keep the LoRAs in; default a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        result = ratios(options.case, options.work or Path(folder), options.rounds)
    print(result)
    write(options.out / "inspection.json", {"case": options.case, "threads": options.threads, **result})


if __name__ == "__main__":
    main()
