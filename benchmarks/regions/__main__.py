"""``python -m benchmarks.regions train | evaluate | smoke``, from the project's root."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from ..common import say
from . import report, train
from .evaluate import Amount, Bench, run
from .store import FOLDER, RegionStore

_HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="fine-tune base and judge, train LoRAs; resumes an interrupted run")
    training.add_argument("--install", action="store_true", help="copy the result over the shipped weights")
    training.add_argument("--work", type=Path, default=_HERE / "work", help="folder with the stages of the training")
    scoring = commands.add_parser("evaluate", help="run the comparison with the shipped weights")
    scoring.add_argument("--weights", type=Path, default=FOLDER)
    scoring.add_argument("--out", type=Path, default=_HERE, help="folder for results.json, table.md and the sheet")
    commands.add_parser("smoke", help="run everything once, at a tiny size; the results mean nothing")
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.command == "train":
        store = train.train(chosen.work, train.Size(), say)
        if chosen.install:
            shutil.copytree(store.folder, FOLDER, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.state"))
    elif chosen.command == "evaluate":
        report.evaluate(RegionStore(chosen.weights), chosen.out, say)
    else:
        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder))


def smoke(folder: Path) -> Bench:
    """Train at a tiny size and measure one pair."""
    subjects = train.SMOKE.subjects
    store = train.train(folder, train.SMOKE, say)
    bench = Bench(store, folder / "rows.jsonl", say, Amount(2, 1, 1))
    run(bench, [(subjects[0], subjects[1])], train.SMOKE.seeds)
    return bench


if __name__ == "__main__":
    main()
