"""``python -m benchmarks.llm.small train | evaluate | encoder | smoke``, from the project's root."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from ...common import say
from . import encoder, report, train
from .evaluate import Bench, Plan
from .language import Language

_HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm.small", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the language model and its adapters; can resume")
    scoring = commands.add_parser("evaluate", help="run the comparison on the language model; trains what is missing")
    encoding = commands.add_parser("encoder", help="train adapters of a pretrained MiniLM and compare them")
    for command in (scoring, encoding):
        command.add_argument("--out", type=Path, default=_HERE, help="folder for results.json and table.md")
    for command in (training, scoring, encoding):
        command.add_argument("--work", type=Path, default=_HERE / "work", help="folder with the models")
    smoke = commands.add_parser("smoke", help="run everything once, at a tiny size; the results mean nothing")
    for command in (training, scoring, encoding, smoke):
        command.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.command == "train":
        chosen.work.mkdir(parents=True, exist_ok=True)
        train.base_model(chosen.work, train.Size(), say)
        for seed, task in report.adapters_of(report.PLANS):
            train.adapter(chosen.work, task, seed, train.Size(), say)
    elif chosen.command == "evaluate":
        bench = language(chosen.work, train.Size(), chosen.out / "rows.jsonl")
        report.publish(report.measured(bench, report.PLANS), chosen.out)
    elif chosen.command == "encoder":
        chosen.work.mkdir(parents=True, exist_ok=True)
        bench = sentences(chosen.work, encoder.Size(), chosen.out / "rows.jsonl")
        report.publish(report.measured(bench, report.ENCODER), chosen.out, "encoder_")
    else:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            bench = language(out, train.SMOKE, out / "rows.jsonl", scored=8, tuning=8)
            plan = Plan(("sum", "lego", "calibrated", "peft ties", "mole"), (("reverse", "sort"),), (0, 1), (1.0,))
            report.publish(report.measured(bench, {"smoke": plan}), out)
            say((out / "table.md").read_text())


def language(work: Path, size: train.Size, log: Path, **examples: int) -> Bench:
    """Return the comparison on the language model in `work`; `examples` go to `Language`."""
    work.mkdir(parents=True, exist_ok=True)
    world = Language(train.base_model(work, size, say), **examples)

    def folder(task: str, seed: int) -> Path:
        return train.adapter(work, task, seed, size, say)

    return Bench("language", lambda _: world, folder, log, say)


def sentences(work: Path, size: encoder.Size, log: Path) -> Bench:
    """Return the comparison on the pretrained encoder."""
    model = encoder.Encoder()

    def folder(task: str, seed: int) -> Path:
        return encoder.adapter(model, work, task, seed, size, say)

    return Bench("encoder", encoder.worlds(model, folder, size), folder, log, say)


if __name__ == "__main__":
    main()
