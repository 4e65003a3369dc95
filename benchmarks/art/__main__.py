"""``python -m benchmarks.art data | train | evaluate | smoke``, from the project's root."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from ..common import say
from . import report, train
from .model import ArtStore

_HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.art", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", help="download the packages and rasterise the drawings")
    commands.add_parser("train", help="train autoencoder, judge, base model and LoRAs; resumes an interrupted run")
    evaluating = commands.add_parser("evaluate", help="run the comparison; resumes an interrupted run")
    evaluating.add_argument("--out", type=Path, default=_HERE, help="folder for results.json, table.md and the sheet")
    evaluating.add_argument("--pairs", type=int, default=40, help="number of pairs of LoRAs")
    commands.add_parser("smoke", help="train everything at a tiny size; the result means nothing")
    for command in commands.choices.values():
        command.add_argument("--work", type=Path, default=_HERE / "work", help="folder with the packages and weights")
        command.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="number of processes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # several processes are faster than several threads
    store = ArtStore(chosen.work)
    if chosen.command == "data":
        train.data(store)
    elif chosen.command == "train":
        train.train(store, train.Size(), say, chosen.processes)
    elif chosen.command == "evaluate":
        report.evaluate(store, chosen.out, chosen.pairs, say, chosen.processes)
    else:
        with tempfile.TemporaryDirectory() as folder:
            small = ArtStore(Path(folder))
            small.drawings_file.symlink_to(store.drawings_file.resolve())
            train.train(small, train.SMOKE, say, chosen.processes)


if __name__ == "__main__":
    main()
