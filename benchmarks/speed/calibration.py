"""Cost of measuring statistics beside the model: ``python -m benchmarks.speed.calibration``, from the project's root.

The layers have the widths of SDXL's U-Net and of Flux, three random LoRAs, and inputs of as many tokens as pictures of
256 pixels. They compute nothing themselves: peak memory and seconds are what measuring (with the LoRAs' own share of a
forward pass) needs beside the model. Full statistics of whole models do not fit into the memory of this machine, so the
rows ``thorough`` are measured on one transformer block; their file size is that of all layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.merge.statistics import Statistics
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.core.train.examples import target_gates
from legomole.core.train.measure import CalibrationSettings, Kind, KindPasses, measure_passes
from legomole.core.train.prompts import Prompt, prompts_for
from torch import Tensor, nn

from ..common import write
from .cases import CASES, Layer

_HERE = Path(__file__).parent
_PARTS = {"sdxl-3x32": "middle_block_1_transformer_blocks_0_", "flux-3x16": "double_blocks_0_"}
_WORDS = [["ember style"], ["heart"], ["watercolour"]]


@dataclass(frozen=True)
class Row:
    """Cost of one measurement.

    Args:
        case: Case of `CASES`. mode: ``light`` or ``thorough``.
        layers: Number of layers that were measured.
        peak_mb_over_model: Peak resident memory above the model and its LoRAs, in MB.
        file_mb: Size of the statistics of all layers of the model, in MB.
        model_evaluations: Forward passes.
        seconds_beside_the_model: Wall time on the threads of this process.
    """

    case: str
    mode: str
    layers: int
    peak_mb_over_model: float
    file_mb: float
    model_evaluations: int
    seconds_beside_the_model: float


class IdleLinear(nn.Linear):
    """A linear layer that computes nothing."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False, device="meta")
        self.weight = nn.Parameter(torch.zeros(1).expand(d_out, d_in), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features)


class Shapes(nn.Module):
    """Layers by name. A pass calls each once; layers that share an input in the real model get the same tensor."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.shapes = layers
        for name, d_out, d_in in layers:
            self.add_module(name, IdleLinear(d_in, d_out))

    def forward(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Tensor] = {}
        for name, _, d_in in self.shapes:
            source = _source(name)
            if source not in inputs:
                if source != "text":
                    inputs = {key: x for key, x in inputs.items() if key == "text"}
                inputs[source] = torch.randn(1, _tokens(name, d_in), d_in, generator=generator)
            self.get_submodule(name)(inputs[source])


def _source(name: str) -> str:
    """Layers with the same source read the same tensor."""
    if name.endswith(("attn2_to_k", "attn2_to_v")):
        return "text"
    return name.rpartition("_to_")[0] if name.endswith(("attn1_to_q", "attn1_to_k", "attn1_to_v")) else name


def _tokens(name: str, d_in: int) -> int:
    """Number of tokens at 256 pixels."""
    if "mod" in name.rpartition("_blocks_")[2]:
        return 1  # modulations read one vector
    if name.startswith("lora_unet_single"):
        return 384
    if "_txt_" in name:
        return 128
    return 77 if _source(name) == "text" else 256 if "double" in name or d_in in (640, 2560) else 64


def run(case: str, mode: str) -> Row:
    """Measure a case in this process."""
    chosen = CASES[case]
    layers = [layer for layer in chosen.layers if mode == "light" or _PARTS[case] in layer[0]]
    loras = [chosen.lora(seed) for seed in range(chosen.n)]
    names = [name for name, _, _ in layers]
    adapters = tuple(Adapter({name: lora.modules[name] for name in names}) for lora in loras)
    del loras
    settings = CalibrationSettings.model_validate({"mode": mode, "widest": 1 << 20})
    model = Shapes(layers)
    kinds = sorted({prompt.named for prompt in prompts_for(_WORDS)})
    first, measured = settings.samples_per_kind(chosen.n, len(kinds))
    count = 0

    def forward(seed: int) -> Callable[[], None]:
        def call() -> None:
            nonlocal count
            count += 1
            model(seed)

        return call

    passes: dict[Kind, KindPasses] = {}
    for n, named in enumerate(kinds):
        gates = target_gates([Prompt("", named)], chosen.n, settings.compose)[0].tolist()
        runs = [forward(1000 * n + i) for i in range(first + measured)]
        passes[named] = KindPasses(gates, runs[:first], runs[first:])
    with attach(model, Mixture(adapters)) as attachment, tempfile.TemporaryDirectory() as folder:
        before = _reset_peak()
        start = time.perf_counter()
        moments = measure_passes(attachment, passes, {name: name for name in names}, settings)
        seconds = time.perf_counter() - start
        peak = _status("VmHWM") - before
        path = Path(folder) / "statistics.safetensors"
        Statistics(moments).save(path)
        size = path.stat().st_size if mode == "light" else full_size(list(chosen.layers), len(kinds))
    return Row(case, mode, len(moments), round(peak / 1e6), round(size / 1e6), count, round(seconds, 1))


def full_size(layers: list[Layer], kinds: int) -> int:
    """Bytes of full statistics of all layers."""
    width_of = {_source(name): d_in for name, _, d_in in layers}
    return sum(4 * kinds * d_in**2 for d_in in width_of.values())


def _reset_peak() -> int:
    """Reset the peak of the resident memory, and return the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    """A memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """Measure every case in a process of its own."""
    for case in _PARTS:
        for mode in ("light", "thorough"):
            command = [sys.executable, "-m", "benchmarks.speed.calibration", "--child", case, mode]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(result.stdout.splitlines()[-1])
            print(row, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_HERE / "calibration.json")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(vars(run(*options.child))))
        return
    write(options.out, {"rows": list(rows(options.out))})


if __name__ == "__main__":
    main()
