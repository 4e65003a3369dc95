"""Time of the first merge in ComfyUI and of the next: ``python -m benchmarks.speed.click``, from the project's root.

Starts a real ComfyUI (see CONTRIBUTING.md) with three random SDXL LoRAs of rank 32, merges them by LEGO Merge without a
model, then again at two other ranks. The second start finds the hashes that the first one has kept. Seconds are those
from the server's message that the prompt began to the one that it succeeded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.comfy.graph import Graph
from tests.comfy.server import Server, find, lay_out

from .cases import CASES

_ROOT = Path(__file__).parents[2]
_RANKS = (32, 24, 16)


def merge_graph(names: Sequence[str], rank: int) -> Graph:
    """Return the graph of a merge without a model, whose report is shown."""
    graph = Graph()
    graph.nodes.clear()  # the base model
    merged = graph.lego(*map(graph.load, names), with_model=False, rank=str(rank))
    graph.add("PreviewAny", source=[merged[0], 1])
    return graph


def click(server: Server, names: Sequence[str], rank: int) -> tuple[float, float]:
    """Merge, and return the wall time and the server's processor time in seconds."""
    before = _processor_time(server.process.pid)
    run = server.run(merge_graph(names, rank).nodes)
    start, end = (run.of(kind)[0]["timestamp"] for kind in ("execution_start", "execution_success"))
    return (end - start) / 1000, _processor_time(server.process.pid) - before


def _processor_time(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.click", description=__doc__)
    parser.add_argument("--case", choices=CASES, default="sdxl-3x32")
    parser.add_argument("--work", type=Path, help="folder to keep the LoRAs in; default a temporary one")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    found = find()
    if isinstance(found, str):
        raise SystemExit(found)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        paths = CASES[options.case].write(work)
        base = Path(temporary) / "comfyui"
        base.mkdir()
        lay_out(base, _ROOT)
        for path in paths:
            path.read_bytes()  # fills the page cache
            (base / "models" / "loras" / path.name).symlink_to(path.absolute())
        for start in ("first start", "second start"):
            server = Server(*found, base, threads=options.threads)
            try:
                times = [click(server, [path.name for path in paths], rank) for rank in _RANKS]
            finally:
                server.close()
            print(
                start, *(f"rank {r}: {w:.2f} s, cpu {c:.2f}" for r, (w, c) in zip(_RANKS, times, strict=True)), sep="; "
            )


if __name__ == "__main__":
    main()
