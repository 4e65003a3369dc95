"""``python -m benchmarks.nano train | evaluate | suggest | smoke``, from the project's root."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from legomole.nano.store import FOLDER, Store

from ..common import say
from . import report, spikes, suggestions, train
from .evaluate import Bench, Plan, run

_HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nano", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser(
        "train", help="train autoencoder, judge, base model and LoRAs; resumes an interrupted run"
    )
    training.add_argument("--install", action="store_true", help="copy the result over the shipped weights")
    training.add_argument("--device", default="cpu", help="cpu or cuda")
    training.add_argument("--longer", type=float, default=1.0, metavar="TIMES", help="factor on steps and pictures")
    scoring = commands.add_parser("evaluate", help="run the comparison with the shipped weights")
    scoring.add_argument("--weights", type=Path, default=FOLDER)
    scoring.add_argument("--out", type=Path, default=_HERE, help="folder for results.json, table.md and the sheet")
    for command in (training, scoring):
        command.add_argument("--work", type=Path, default=_HERE / "work", help="folder with the stages of the training")
    suggesting = commands.add_parser(
        "suggest", help="suggested strengths, the sweep and spikes against pictures of all pairs; resumes"
    )
    suggesting.add_argument("--out", type=Path, default=_HERE, help="folder for suggestions.json and suggestions.md")
    suggesting.add_argument("--whole-sweep", type=int, default=len(suggestions.SETS), metavar="SETS",
                            help="sets on which all methods are measured, not only the exact sum")  # fmt: skip
    smoke = commands.add_parser("smoke", help="run everything once, at a tiny size; the results mean nothing")
    for command in (training, scoring, suggesting, smoke):
        command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.command == "train":
        size = train.Size(device=chosen.device).longer(chosen.longer)
        store = train.train(chosen.work, size, say)
        train.train_gates(store, say)
        train.train_jointly(store, size, say)
        if chosen.install:
            install(store)
    elif chosen.command == "suggest":
        bench = Bench(Store(FOLDER), chosen.out / "rows.jsonl", say)
        log = chosen.out / "joint_rows.jsonl"
        spiked = spikes.measure(bench, log)
        whole, rest = suggestions.SETS[: chosen.whole_sweep], suggestions.SETS[chosen.whole_sweep :]
        results = [
            *suggestions.measure(bench, log, whole), *suggestions.measure(bench, log, rest, all_methods=False)
        ]  # fmt: skip
        suggestions.publish(results, spiked, chosen.out)
    elif chosen.command == "evaluate":
        report.evaluate(Store(chosen.weights), Store(chosen.work), chosen.out, say)
    else:
        with tempfile.TemporaryDirectory() as folder:
            store = train.train(Path(folder), train.SMOKE, say)
            bench = Bench(store, Path(folder) / "rows.jsonl", say)
            run(bench, Plan(("base", "sum", "lego", "router"), ((("heart", "ember"), 0),), (), (), (1.0,)))


def install(store: Store) -> None:
    """Copy the weights of a training into the package."""
    for path in sorted(store.folder.rglob("*.safetensors")):
        target = FOLDER / path.relative_to(store.folder)
        if "+" not in path.name:  # jointly trained LoRAs are for the comparison only
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


if __name__ == "__main__":
    main()
