"""Many adapters of an 8B model into one: time and peak memory, beside the naive way. `python benchmarks/llm/many.py`.

Writes PEFT adapters of rank 8 for all 224 linear layers of a Llama of 8 billion weights (bfloat16, 42 MB each), merges
some of them in a process of its own, and samples that process's memory (Linux). The naive way, which scripts take that
sum full weight matrices, is done on the same files for one layer of every shape in another process and counted up: read
all factors into memory as float32, which is how PEFT loads them, add ``B A`` of every adapter, and take the randomised
SVD of the sum. All in one thread.
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
SHAPES = {  # (d_out, d_in) of a block's layers
    "self_attn.q_proj": (_WIDTH, _WIDTH),
    "self_attn.k_proj": (_KEYS, _WIDTH),
    "self_attn.v_proj": (_KEYS, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH),
    "mlp.gate_proj": (_HIDDEN, _WIDTH),
    "mlp.up_proj": (_HIDDEN, _WIDTH),
    "mlp.down_proj": (_WIDTH, _HIDDEN),
}


def write_adapter(folder: Path, seed: int, blocks: int, divide: int = 1) -> Path:
    """A random adapter, as PEFT writes it; of layers smaller by a factor, to try things out."""
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
class Measured:
    """A process: its largest resident gigabytes, with and without pages of mapped files, its processor seconds, and
    what it printed."""

    resident: float
    own: float
    seconds: float
    output: str


def measure(command: Sequence[str], threads: int = 1) -> Measured:
    """Run Python with these arguments, in so many threads, and watch it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=env)
    resident = own = 0.0
    while process.poll() is None:
        found = re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        values = {name: int(value) * 1024 / 1e9 for name, value in found}  # empty as it ends
        resident, own = max(resident, values.get("VmHWM", 0)), max(own, values.get("RssAnon", 0))
        time.sleep(0.02)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Measured(resident, own, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, output)


def naive(folders: Sequence[Path], rank: int) -> None:
    """One layer of every shape; prints the seconds for all layers."""
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
        torch.svd_lowrank(delta, rank, niter=4)  # an exact one takes minutes a layer
        seconds += blocks * (time.process_time() - start)
        del delta
    print(f"{seconds:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 48, 150])
    parser.add_argument("--methods", nargs="+", default=["svd", "lego"])
    parser.add_argument("--blocks", type=int, default=32, help="of the model; 32 make 224 layers")
    parser.add_argument("--divide", type=int, default=1, help="layers smaller by this factor")
    parser.add_argument("--rank", type=int, default=16, help="of the result")
    parser.add_argument("--folder", type=Path, help="keep the adapters there; default a temporary folder")
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
            f"{options.blocks * len(SHAPES)} layers, {each * 1000:.1f} MB an adapter, result of rank {options.rank}\n"
        )
        print("| adapters | files | method | resident | of it own | processor seconds | memory, naive = 1 | time |")
        print("|---|---|---|---|---|---|---|---|")
        for n in options.adapters:
            names = [str(path) for path in adapters[:n]]
            done = {}
            for method in options.methods:
                out = str(Path(temporary) / f"merged-{n}-{method}")
                done[method] = measure(
                    ["-m", "legomole", "merge", *names, "--method", method, "--rank", str(options.rank), "-o", out]
                )
            plain = measured_naive(names, options.rank)
            for method, found in {**done, "naive": plain}.items():
                _row(n, each, method, found, plain)


def measured_naive(names: Sequence[str], rank: int) -> Measured:
    """The naive way in a process of its own, its seconds those of all layers."""
    done = measure([__file__, "--rank", str(rank), "--naive", *names])
    return Measured(done.resident, done.own, float(done.output), "")


def _row(n: int, each: float, method: str, done: Measured, plain: Measured) -> None:
    print(
        f"| {n} | {n * each:.2f} GB | {method} | {done.resident:.2f} GB | {done.own:.2f} GB | {done.seconds:.0f} "
        f"| {done.own / plain.own:.2f} | {done.seconds / plain.seconds:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
