"""The parts of the benchmark. Each returns the rows of its results, and compares values with those of a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load
from legomole.core.merge.engine import MergeResult, merge
from legomole.core.merge.methods import MergeMethod
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import Statistics
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import Prompt, TrainSettings, prompts_for, train
from legomole.core.train.features import standardise_features
from legomole.core.train.fit import FitRecord
from legomole.core.train.measure import CalibrationSettings, measure_statistics
from torch import Tensor, nn

from ..common import merged_in
from ..speed.cases import CASES, Case
from .device import bandwidth, matmul_rate, peak_gb, reset_peak, seconds
from .models import SIZES, Kind, RandomDenoiser, adapted_layers, build, inputs, loras

_CPU = torch.device("cpu")
_CONCEPTS = (["ember"], ["heart"])


@dataclass(frozen=True)
class Run:
    """A run of the benchmark.

    Args:
        device: Device to measure.
        size: Row of `SIZES`, ``"full"`` or ``"small"``.
        rounds: Number of timed calls; the median counts.
    """

    device: torch.device
    size: str
    rounds: int

    @property
    def full(self) -> bool:
        return self.size == "full"

    @cached_property
    def bandwidth(self) -> float:
        """Memory bandwidth in bytes per second."""
        return bandwidth(self.device, 1 << 30 if self.full else 1 << 20)

    @cached_property
    def matmul_rate(self) -> float:
        """Floating point operations per second of bfloat16 products."""
        return matmul_rate(self.device, torch.bfloat16, 8192 if self.full else 256)

    def row(self, **values: Any) -> dict[str, Any]:
        """Return a row of results with the peak memory since `reset_peak`."""
        peak = peak_gb(self.device)
        return {**values, **({} if peak is None else {"peak_gb": peak})}


def merging(run: Run) -> Iterator[dict[str, Any]]:
    """Merge LoRAs with the layers of SDXL, Flux and an 8B model, from files, on the device and on the CPU."""
    names = ("sdxl-3x32", "sdxl-4x64", "flux-3x32", "llm-3x16") if run.full else ("smoke",)
    for case in (CASES[name] for name in names):
        with tempfile.TemporaryDirectory() as folder:
            paths = case.write(Path(folder))
            for name, method in {"lego": Lego(Rank(case.rank)), "svd": SVD(Rank(case.rank))}.items():
                yield _merge_row(run, case, paths, name, method)


def _merge_row(run: Run, case: Case, paths: Sequence[Path], name: str, method: MergeMethod) -> dict[str, Any]:
    results: dict[torch.device, MergeResult] = {}

    def on(device: torch.device) -> None:
        results[device] = merge([load(path) for path in paths], method, device=device)

    reset_peak(run.device)
    spent = seconds(run.device, lambda: on(run.device), min(run.rounds, 3))
    row = run.row(case=case.name, method=name, seconds=spent)
    if run.device != _CPU:
        row["cpu_seconds"] = seconds(_CPU, lambda: on(_CPU))
        row |= _compare(results[run.device], results[_CPU])
    return row


def _compare(ours: MergeResult, cpu: MergeResult) -> dict[str, float]:
    """Compare two merges of the same LoRAs: norms of differences relative to the norms of the CPU's values."""
    differences: list[float] = []
    equal = 0
    pairs = list(zip(ours.report.modules, cpu.report.modules, strict=True))
    for one, other in pairs:
        if one.clusters == other.clusters:  # otherwise two partitions are about equally good
            equal += 1
            wanted = cpu.adapter.modules[other.name]
            differences.append(_difference(ours.adapter.modules[one.name].delta(), wanted.delta()))
    return {
        "largest_difference": max(differences, default=0.0),
        "layers_with_equal_clusters": equal / len(pairs),
        "largest_difference_of_errors": max(abs(one.error - other.error) for one, other in pairs),
    }


def _difference(X: Tensor, reference: Tensor) -> float:
    X, reference = X.detach().cpu().double(), reference.detach().cpu().double()
    return float((X - reference).norm() / reference.norm().clamp_min(1e-30))


def calibration(run: Run) -> Iterator[dict[str, Any]]:
    """Measure the statistics of an SDXL-shaped model; compare a small model's with those of the CPU."""
    with _denoising("sdxl", run.size, run.device, torch.bfloat16) as (attachment, denoiser, _):
        count = 0

        def counted(done: int, total: int, what: str) -> None:
            nonlocal count
            count = done

        reset_peak(run.device)
        settings = CalibrationSettings(samples=None if run.full else 2)
        spent = seconds(run.device, lambda: _measure(attachment, denoiser, settings, counted))
        yield run.row(model="sdxl", seconds=spent, passes=count)
    small: dict[torch.device, Statistics] = {}
    for device in (run.device, _CPU):
        with _denoising("sdxl", "small", device, torch.float32) as (attachment, denoiser, _):
            # directions of a sketch with nearly equal weight may differ between devices: these inputs are narrow
            small[device] = _measure(attachment, denoiser, CalibrationSettings(samples=2), None)
    pairs = zip(small[run.device].modules.values(), small[_CPU].modules.values(), strict=True)
    largest = max(_difference(one.own[i], other.own[i]) for one, other in pairs for i in other.own)
    yield {"model": "sdxl, small, float32", "largest_difference": largest}


def _measure(
    attachment: Attachment,
    denoiser: RandomDenoiser,
    settings: CalibrationSettings,
    progress: Callable[[int, int, str], None] | None,
) -> Statistics:
    names = {name: name for name, layer in adapted_layers(attachment.model).items() if isinstance(layer, nn.Linear)}
    return measure_statistics(attachment, denoiser, prompts_for(_CONCEPTS), names, settings, progress=progress)


def training(run: Run) -> Iterator[dict[str, Any]]:
    """Train gates of an SDXL-shaped model; compare a small model's losses with those of the CPU."""
    steps = 10 if run.full else 2
    with _denoising("sdxl", run.size, run.device, torch.bfloat16, checkpointing=True) as parts:
        reset_peak(run.device)
        spent = seconds(run.device, lambda: _train(parts, steps))
        yield run.row(model="sdxl", steps=steps, batch=4, seconds=spent)
    records: list[FitRecord] = []
    for device in (run.device, _CPU):
        with _denoising("sdxl", "small", device, torch.float32, checkpointing=True) as parts:
            records.append(_train(parts, 2))
    ours, cpu = (torch.tensor(record.losses) for record in records)
    yield {"model": "sdxl, small, float32", "steps": 2, "largest_difference": _difference(ours, cpu)}


def _train(parts: tuple[Attachment, RandomDenoiser, Mixture], steps: int) -> FitRecord:
    attachment, denoiser, mixture = parts
    settings = TrainSettings(steps=steps, batch=4, examples=8, samples=4)
    return train(attachment, mixture, denoiser, prompts_for(_CONCEPTS), _CONCEPTS, settings).fit


@contextmanager
def _denoising(
    kind: Kind, size: str, device: torch.device, dtype: torch.dtype, *, checkpointing: bool = False
) -> Generator[tuple[Attachment, RandomDenoiser, Mixture]]:
    """Yield a random model with two LoRAs, its denoiser on random prompts, and the mixture."""
    torch.manual_seed(0)
    model = build(kind, SIZES[size], _CPU if size == "small" else device, dtype).to(device)  # equal on all devices
    adapters = loras(model, len(_CONCEPTS), 16 if size == "full" else 2)
    prompts: list[Prompt] = prompts_for(_CONCEPTS)
    text = torch.randn(len(prompts), 77, SIZES[size].text).to(device, dtype)
    side = SIZES[size].side // 2
    denoiser = RandomDenoiser(model, text, (4, side, side))
    mixture = Mixture(tuple(adapters), _gates(len(adapters), GateSettings(), text, _CONCEPTS))
    with attach(model, mixture, checkpointing=checkpointing) as attachment:
        yield attachment, denoiser, mixture


def _gates(n: int, settings: GateSettings | None, text: Tensor | None, words: Sequence[Sequence[str]]) -> GateSet:
    """Return gates that are not trained, with a random detector of concepts if they read the text."""
    if settings is None or settings.reads != "text" or text is None:
        return GateSet(n, settings)
    return GateSet(n, settings, detector=ConceptDetector(torch.randn(n, text.shape[-1]), torch.zeros(n), words))


def mixing(run: Run) -> Iterator[dict[str, Any]]:
    """Time a step of SDXL-, Flux- and Llama-shaped models in bfloat16 with four LoRAs of rank 16, mixed and merged."""
    models: list[tuple[Kind, bool]] = [("sdxl", False), ("flux", False), ("llama", False), ("llama", True)]
    for kind, one_token in models:
        torch.manual_seed(0)
        size = SIZES[run.size]
        model = build(kind, size, run.device, torch.bfloat16)
        arguments = inputs(kind, size, run.device, torch.bfloat16)
        if one_token:
            arguments = {name: x[:, :1] for name, x in arguments.items()}
        adapters = loras(model, 4, 16 if run.full else 2)
        name = f"{kind}, one token" if one_token else kind
        yield from _mixing_rows(run, name, model, arguments, adapters)
        del model


@torch.no_grad()
def _mixing_rows(
    run: Run, name: str, model: nn.Module, arguments: Mapping[str, Tensor], adapters: Sequence[Adapter]
) -> Iterator[dict[str, Any]]:
    n = len(adapters)

    def step() -> Tensor:
        return model(**arguments)

    base = step().float()
    products, moved = _work(model, step, adapters)
    reset_peak(run.device)
    plain = seconds(run.device, step, run.rounds)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    yield run.row(
        model=name,
        gates="merged",
        seconds=plain,
        share_of_bandwidth=weights / plain / run.bandwidth,
        share_of_matmul_rate=products / plain / run.matmul_rate,
    )
    merged = _merged_output(model, adapters, step)
    text = arguments.get("encoder_hidden_states")
    kinds: list[GateSettings | None] = [None, GateSettings(reads="hidden", granularity="block")]
    if text is not None:
        kinds.append(GateSettings(reads="text"))
    for settings in kinds:
        gates = _gates(n, settings, text, [()] * n)
        reset_peak(run.device)
        with attach(model, Mixture(tuple(adapters), gates)) as attachment:
            if settings is not None:
                standardise_features(attachment, step)  # sets the size of the gates, which stay at one
            spent = seconds(run.device, step, run.rounds)
            error = _difference(step(), merged) * float(merged.norm() / (merged - base).norm())
        extra = spent - plain
        yield run.row(
            model=name,
            gates="even" if settings is None else settings.reads,
            seconds=spent,
            ratio=spent / plain,
            extra_bytes=moved,
            share_of_bandwidth_of_the_extra=moved / extra / run.bandwidth if extra > 0 else None,
            error=error,
        )


def _merged_output(model: nn.Module, adapters: Sequence[Adapter], step: Callable[[], Tensor]) -> Tensor:
    """Return the output of the model with the sum of the adapters in its weights."""
    modules = adapters[0].modules
    summed = {
        name: replace(
            part,
            A=torch.cat([adapter.modules[name].A for adapter in adapters]),
            B=torch.cat([adapter.modules[name].B for adapter in adapters], 1),
        )
        for name, part in modules.items()
    }
    with merged_in(model, Adapter(summed), 1.0):
        return step().float()


def _work(model: nn.Module, step: Callable[[], Tensor], adapters: Sequence[Adapter]) -> tuple[int, int]:
    """Return the floating point operations of a step's layers, and the bytes that mixing must move beside a step.

    For each adapted layer mixing reads its factors and its input, writes, scales and reads ``z``, and reads and writes
    the output.
    """
    products = moved = 0
    adapted = adapted_layers(model)
    names = {layer: name for name, layer in adapted.items()}

    def add(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal products, moved
        W = layer.weight
        assert isinstance(W, Tensor)
        positions = y.numel() // W.shape[0]
        products += 2 * positions * W.numel()
        if layer in names:
            parts = [adapter.modules[names[layer]] for adapter in adapters]
            factors = sum(part.A.numel() + part.B.numel() for part in parts)
            z = positions * sum(part.rank for part in parts)
            moved += y.element_size() * (factors + args[0].numel() + 4 * z + 2 * y.numel())

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    step()
    for hook in hooks:
        hook.remove()
    return products, moved


PARTS: dict[str, Callable[[Run], Iterator[dict[str, Any]]]] = {
    "merging": merging,
    "calibration": calibration,
    "training": training,
    "mixing": mixing,
}
