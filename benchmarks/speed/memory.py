"""Peak memory of `legomole merge` on a pair of SDXL LoRAs: `python benchmarks/speed/memory.py`.

Writes two rank-32 float16 LoRAs for all 722 linear layers of SDXL's U-Net that kohya trains to a temporary folder,
merges them in a separate process, and compares that process's peak resident memory with the size of inputs and output.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank

# part of the U-Net -> (width, number of transformer blocks)
_PARTS = {
    **{f"input_blocks_{i}_1": (640, 2) for i in (4, 5)},
    **{f"input_blocks_{i}_1": (1280, 10) for i in (7, 8)},
    "middle_block_1": (1280, 10),
    **{f"output_blocks_{i}_1": (1280, 10) for i in (0, 1, 2)},
    **{f"output_blocks_{i}_1": (640, 2) for i in (3, 4, 5)},
}
_TEXT = 2048  # width of the text conditioning


def sdxl_layers() -> Iterator[tuple[str, int, int]]:
    """Yield ``(kohya name, d_out, d_in)`` of the 722 layers."""
    for part, (width, depth) in _PARTS.items():
        yield from ((f"lora_unet_{part}_{name}", width, width) for name in ("proj_in", "proj_out"))
        for block in range(depth):
            name = f"lora_unet_{part}_transformer_blocks_{block}"
            for attention, source in (("attn1", width), ("attn2", _TEXT)):
                yield f"{name}_{attention}_to_q", width, width
                yield f"{name}_{attention}_to_k", width, source
                yield f"{name}_{attention}_to_v", width, source
                yield f"{name}_{attention}_to_out_0", width, width
            yield f"{name}_ff_net_0_proj", 8 * width, width
            yield f"{name}_ff_net_2", width, 4 * width


def write_lora(path: Path, rank: int, seed: int) -> Path:
    """Write a random SDXL LoRA in float16, with alpha half the rank."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: LowRank(
            (torch.randn(rank, d_in, generator=generator) / d_in**0.5).half(),
            (torch.randn(d_out, rank, generator=generator) * 0.02).half(),
            rank / 2,
        )
        for name, d_out, d_in in sdxl_layers()
    }
    return save(Adapter(modules), path, format="kohya")


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run `legomole`; return its peak resident memory in MB, mapped file pages included, and the seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "legomole", *arguments], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="lego")
    parser.add_argument("--rank", default="32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        a, b = (write_lora(Path(folder) / f"{name}.safetensors", 32, seed) for seed, name in enumerate("ab"))
        out = Path(folder) / "out.safetensors"
        rank = [] if options.method in ("concat", "linear") else ["--rank", options.rank]
        peak, seconds = measure(["merge", str(a), str(b), "--method", options.method, *rank, "-o", str(out)])
        files = sum(path.stat().st_size for path in (a, b, out)) / 1e6
        modules = sum(1 for _ in sdxl_layers())
    print(f"{options.method}, {modules} layers: files {files:.0f} MB, peak {peak:.0f} MB, {seconds:.1f} s")
    print(f"peak minus files: {peak - files:.0f} MB (the bound is 1000 MB)")
    sys.exit(peak - files > 1000)


if __name__ == "__main__":
    main()
