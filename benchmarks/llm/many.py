"""Merge many adapters of an 8B model: time and peak memory. `python benchmarks/llm/many.py`.

Writes PEFT adapters of rank 8 for all 224 linear layers of a Llama of 8 billion weights (bfloat16, 42 MB each), merges
some of them in a separate process, and samples that process's memory (Linux). The naive baseline, used by scripts that
sum full weight matrices, runs on the same files in another process, for one layer of every shape, and is extrapolated:
it loads all factors as float32, as PEFT does, adds ``B A`` of every adapter, and computes a randomised SVD of the sum.
Everything runs in one thread.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank
from safetensors.torch import load_file

RANK = 8
_WIDTH, _KEYS, _HIDDEN = 4096, 1024, 14336
SHAPES = {  # layer of a block -> (d_out, d_in)
    "self_attn.q_proj": (_WIDTH, _WIDTH),
    "self_attn.k_proj": (_KEYS, _WIDTH),
    "self_attn.v_proj": (_KEYS, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH),
    "mlp.gate_proj": (_HIDDEN, _WIDTH),
    "mlp.up_proj": (_HIDDEN, _WIDTH),
    "mlp.down_proj": (_WIDTH, _HIDDEN),
}


def write_adapter(folder: Path, seed: int, blocks: int, divide: int = 1) -> Path:
    """Write a random adapter in PEFT's format; `divide` shrinks the layers, for tests."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"model.layers.{block}.{name}": LowRank(
            (torch.randn(RANK, d_in // divide, generator=generator) / (d_in // divide) ** 0.5).bfloat16(),
            (torch.randn(d_out // divide, RANK, generator=generator) * 0.02).bfloat16(),
            2.0 * RANK,
        )
        for block in range(blocks)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return save(Adapter(modules), folder, format="peft")


@dataclass(frozen=True)
class ProcessCost:
    """Cost of a process.

    Args:
        resident: Peak resident memory in GB.
        own: Peak resident memory without pages of mapped files, in GB.
        seconds: Processor time.
        output: What the process printed.
    """

    resident: float
    own: float
    seconds: float
    output: str


def measure(command: Sequence[str], threads: int = 1) -> ProcessCost:
    """Run Python with some arguments in a number of threads, and measure its cost."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=env)
    resident = own = 0.0
    while process.poll() is None:
        status = re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        values = {name: int(value) * 1024 / 1e9 for name, value in status}  # empty once it has ended
        resident, own = max(resident, values.get("VmHWM", 0)), max(own, values.get("RssAnon", 0))
        time.sleep(0.02)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ProcessCost(resident, own, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, output)


def naive(folders: Sequence[Path], rank: int) -> None:
    """Run the baseline on one layer of every shape, and print the seconds for all layers."""
    start = time.process_time()
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    factors = [{name: tensor.float() for name, tensor in file.items()} for file in files]
    seconds = time.process_time() - start
    blocks = len(factors[0]) // (2 * len(SHAPES))
    for name in SHAPES:
        start = time.process_time()
        A, B = (f"base_model.model.model.layers.0.{name}.lora_{factor}.weight" for factor in "AB")
        delta = torch.zeros(factors[0][B].shape[0], factors[0][A].shape[1])
        for adapter in factors:
            delta.addmm_(adapter[B], adapter[A], alpha=2)
        torch.svd_lowrank(delta, rank, niter=4)  # an exact SVD takes minutes per layer
        seconds += blocks * (time.process_time() - start)
        del delta
    print(f"{seconds:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 48, 150])
    parser.add_argument("--methods", nargs="+", default=["svd", "lego"])
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the model; 32 have 224 layers")
    parser.add_argument("--divide", type=int, default=1, help="factor by which layers are smaller")
    parser.add_argument("--rank", type=int, default=16, help="rank of the result")
    parser.add_argument("--folder", type=Path, help="folder to keep the adapters in; default a temporary one")
    parser.add_argument("--naive", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.naive:
        naive(options.naive, options.rank)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        adapters = [folder / f"adapter-{i:03}" for i in range(max(options.adapters))]
        for i, path in enumerate(adapters):
            if not path.exists():
                write_adapter(path, i, options.blocks, options.divide)
        each = sum(file.stat().st_size for file in adapters[0].iterdir()) / 1e9
        print(
            f"{options.blocks * len(SHAPES)} layers, {each * 1000:.1f} MB per adapter, result of rank {options.rank}\n"
        )
        print("| adapters | files | method | resident | its own | processor seconds | memory, naive = 1 | time |")
        print("|---|---|---|---|---|---|---|---|")
        for n in options.adapters:
            names = [str(path) for path in adapters[:n]]
            costs = {}
            for method in options.methods:
                out = str(Path(temporary) / f"merged-{n}-{method}")
                costs[method] = measure(
                    ["-m", "legomole", "merge", *names, "--method", method, "--rank", str(options.rank), "-o", out]
                )
            baseline = measure_naive(names, options.rank)
            for method, cost in {**costs, "naive": baseline}.items():
                _print_row(n, each, method, cost, baseline)


def measure_naive(names: Sequence[str], rank: int) -> ProcessCost:
    """Run the baseline in a separate process; the seconds are those for all layers."""
    cost = measure([__file__, "--rank", str(rank), "--naive", *names])
    return ProcessCost(cost.resident, cost.own, float(cost.output), "")


def _print_row(n: int, each: float, method: str, cost: ProcessCost, baseline: ProcessCost) -> None:
    print(
        f"| {n} | {n * each:.2f} GB | {method} | {cost.resident:.2f} GB | {cost.own:.2f} GB | {cost.seconds:.0f} "
        f"| {cost.own / baseline.own:.2f} | {cost.seconds / baseline.seconds:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
