"""``python -m benchmarks.llm --data FOLDER --work FOLDER``, from the project's root; see README.md."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..common import ResultLog
from . import report, train
from .data import TASKS
from .evaluate import ROWS, Bench
from .world import Size, World

_HERE = Path(__file__).parent
_COUNTS = (8, 4, 2)
_TRAINING = train.Training()
_GAIN = 0.1  # by which an adapter alone must be better than the base model on dev prompts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the clones of the data")
    parser.add_argument("--model", type=Path, help="folder of the pretrained Llama: as saved, or with one GGUF file")
    parser.add_argument("--work", type=Path, required=True, help="folder for hidden states, adapters and the log")
    parser.add_argument("--out", type=Path, default=_HERE, help="folder for results.json, table.md and the plot")
    parser.add_argument("--methods", nargs="+", default=list(ROWS))
    parser.add_argument("--counts", type=int, nargs="+", default=_COUNTS, help="numbers of adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--report", action="store_true", help="only write tables of the rows in the log")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    log = ResultLog(chosen.work / "log.jsonl")
    if not chosen.report:
        if chosen.data is None or chosen.model is None:
            parser.error("--data and --model are needed, except with --report")
        chosen.work.mkdir(parents=True, exist_ok=True)
        world = World(chosen.model, chosen.data, chosen.work, Size(), say)
        measure(world, chosen.work, log, chosen.counts, chosen.methods, chosen.seeds)
    report.publish(log, chosen.out)


def measure(
    world: World, work: Path, log: ResultLog, counts: Sequence[int], methods: Sequence[str], seeds: Sequence[int],
    training: train.Training = _TRAINING, gain: float = _GAIN,
) -> None:  # fmt: skip
    """Train what is missing and measure all rows that the log lacks."""

    def folder(task: str, seed: int) -> Path:
        return train.adapter(world.model, world.task(task), seed, work / f"{task}-{seed}", training, say)

    bench = Bench(world, folder, log, say)
    tasks = learnt(bench, max(counts), gain)
    bench.base(tasks)
    for seed in seeds:
        for task in tasks:
            bench.alone(task, seed)
    for n in counts:
        for method in methods:
            for seed in seeds:
                bench.test(method, tasks[:n], seed)
    for seed in seeds:
        for task in tasks:
            bench.elsewhere(task, seed)


def learnt(bench: Bench, count: int, gain: float) -> list[str]:
    """The first tasks in the order of `TASKS` whose adapter alone beats the base model by `gain` on dev prompts."""
    tasks: list[str] = []
    for task in TASKS:
        if len(tasks) == count:
            break
        scores = bench.gain(task.name)
        if scores["alone"] - scores["base"] >= gain - 1e-9:
            tasks.append(task.name)
    return tasks


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
