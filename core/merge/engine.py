"""merge(): several adapters in, one adapter and a report out."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter, check_finite, is_text_encoder
from ..errors import MergeError, name_some
from ..lowrank import LowRank
from ..memory import report_out_of_memory
from ..progress import Progress
from .cache import GramCache
from .methods import METHODS, MergeMethod
from .report import MergeReport, ModuleReport
from .tasks import Batch, BatchMerger, BatchResult, batches, overflow
from .threads import run_in_threads

BatchRunner = Callable[[BatchMerger, Sequence[Batch]], Iterable[BatchResult]]
"""Does the work on every batch and gives the results in their order."""


@dataclass(frozen=True, eq=False)
class MergeResult:
    """The merged adapter and the account of how it came about."""

    adapter: Adapter
    report: MergeReport


def merge(
    adapters: Sequence[Adapter],
    method: MergeMethod,
    weights: Sequence[float] | None = None,
    *,
    text_encoder_weights: Sequence[float] | None = None,
    module_weights: Sequence[Mapping[str, float]] | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    each: BatchRunner | None = None,
    cache: GramCache | None = None,
) -> MergeResult:
    """Merge adapters that name their modules alike (see `align`) into one.

    Args:
        adapters: One or more. A module that only some have is merged from those.
        method: A row of `METHODS`, instantiated.
        weights: One finite number per adapter, default 1; negative subtracts, 0 leaves the adapter out.
        text_encoder_weights: Per adapter, the weight of its text encoder modules; default the same as `weights`.
        module_weights: Per adapter, shell patterns of module names and a factor on its weight there, e.g.
            ``{"*attn2*": 0.5, "*single_blocks*": 0}``. Every pattern that matches counts.
        normalize: Divide the weights by the sum of their magnitudes: an average instead of a sum.
        dtype: Dtype of the merged factors and diffs; default the widest factor dtype of the adapters that take part.
        device: Where to compute. The result is on the CPU.
        progress: Called with (modules done, modules in all, name of the last). May raise to cancel.
        each: Does the work elsewhere; default here, see `threads.run_in_threads`.
        cache: Kept by the caller from merge to merge: one of the same factors is faster.

    Returns:
        The merged adapter (scale 1: no alpha) and its report.

    Raises:
        MergeError: No adapters, weights that do not fit, modules of different shape under one name, a rank no module
            can reach, a device without float64 (MPS), or a result that overflows `dtype`.
        FormatError: NaN or infinity in an input.
    """
    if not adapters:
        raise MergeError("There is nothing to merge.", expected="at least one LoRA", found="none")
    weights = _checked_weights(adapters, weights, normalize)
    te_weights = (
        weights if text_encoder_weights is None else _checked_weights(adapters, text_encoder_weights, normalize)
    )
    per_module = [
        _module_weights(adapter, weight, te_weight, patterns)
        for adapter, weight, te_weight, patterns in zip(
            adapters, weights, te_weights, module_weights or [{}] * len(adapters), strict=True
        )
    ]
    used = [
        any(values.values()) if values else bool(weight or te_weight)  # one that only carries extras has no modules
        for values, weight, te_weight in zip(per_module, weights, te_weights, strict=True)
    ]
    if not any(used):
        raise MergeError("No module is left to merge: every weight is 0.", remedy="give at least one LoRA a weight")
    todo = batches(adapters, per_module, getattr(method, "batch", None))
    _check_rank(method, todo)
    dtype = dtype or _widest([adapter for adapter, takes_part in zip(adapters, used, strict=True) if takes_part])
    work = BatchMerger(method, per_module, dtype, _checked_device(device), cache)
    own = run_in_threads(work, adapters, todo)

    total = sum(len(batch.names) for batch in todo)
    modules: dict[str, LowRank] = {}
    reports: dict[str, ModuleReport] = {}
    remarks: dict[str, str] = {}
    with closing(own):  # or threads would go on where `progress` cancels
        for batch, done in zip(todo, own if each is None else each(work, todo), strict=True):
            modules.update(done.modules)
            remarks.update(done.remarks)
            reports.update((report.name, report) for report in done.reports)
            if progress is not None:
                progress(len(modules), total, batch.names[-1])
    with torch.no_grad(), report_out_of_memory():
        diffs, extras, passed_on, dropped = _leftovers(adapters, per_module, used, dtype)
    report = MergeReport(
        inputs=tuple(adapter.label for adapter in adapters),
        weights=tuple(weights),
        method=next((name for name, row in METHODS.items() if isinstance(method, row)), type(method).__name__),
        modules=tuple(reports[name] for name in sorted(reports)),
        passed_on=tuple(passed_on),
        dropped=tuple(dropped),
        notes=(
            *_weight_notes(adapters, weights, te_weights, per_module, used),
            *_strength_notes(method, weights),
            *_notes(reports, remarks),
        ),
    )
    return MergeResult(Adapter({name: modules[name] for name in sorted(modules)}, diffs, extras), report)


def matching(pattern: str, adapters: Sequence[Adapter]) -> list[int]:
    """Positions of the adapters that have layers a module pattern matches: those a pattern meant for all is for."""
    return [
        i for i, adapter in enumerate(adapters) if any(fnmatch.fnmatchcase(name, pattern) for name in adapter.layers)
    ]


def _checked_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None, normalize: bool) -> list[float]:
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(adapters):
        raise MergeError("Every LoRA needs one weight.", expected=len(adapters), found=len(weights))
    for adapter, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight):
            raise MergeError(
                "A weight is not a finite number.", file=adapter.source.path or None, expected="e.g. 0.8", found=weight
            )
    if normalize:
        size = sum(abs(weight) for weight in weights) or 1.0
        weights = [weight / size for weight in weights]
    return weights


def _module_weights(
    adapter: Adapter, weight: float, te_weight: float, patterns: Mapping[str, float]
) -> dict[str, float]:
    """Weight of every module that has a delta or a diff. A pattern that matches nothing is an error, not a no-op."""
    values = {name: te_weight if is_text_encoder(name) else weight for name in adapter.layers}
    for pattern, factor in patterns.items():
        if not math.isfinite(factor):
            raise MergeError("A module weight is not a finite number.", module=pattern, found=factor)
        matched = [name for name in values if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise MergeError(
                "A module pattern matches nothing.",
                file=adapter.source.path or None,
                expected=f"a pattern of names like {name_some(adapter.modules, 3)}",
                found=pattern,
                remedy="list the module names with `legomole inspect --modules`",
            )
        for name in matched:
            values[name] *= factor
    return values


def _checked_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "mps":
        raise MergeError(
            "Merges need float64, which Apple's MPS does not have.",
            expected="the device cpu, or cuda",
            found=str(device),
            remedy="merge on the CPU: --device cpu (device='cpu' in Python)",
        )
    return device


def _check_rank(method: MergeMethod, todo: Sequence[Batch]) -> None:
    rank = getattr(method, "rank", None)
    largest = max((sum(batch.ranks) for batch in todo), default=0)
    if todo and rank is not None and rank.unit == "" and rank.value > largest:
        raise MergeError(
            "The rank is larger than all the LoRAs' ranks together.",
            expected=f"at most {largest} (at {largest} the merge is the exact sum)",
            found=f"{rank}",
            remedy="lower the rank; more cannot add anything",
        )


def _widest(adapters: Sequence[Adapter]) -> torch.dtype:
    dtype = adapters[0].dtype
    for adapter in adapters[1:]:
        dtype = torch.promote_types(dtype, adapter.dtype)
    return dtype


def _leftovers(
    adapters: Sequence[Adapter], per_module: Sequence[Mapping[str, float]], used: Sequence[bool], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str], list[str]]:
    """What is not low rank: diffs are summed with the weights, extras are carried, conflicts are named."""
    diffs: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    passed_on: list[str] = []
    dropped: list[str] = []
    first: dict[str, str] = {}
    for i, adapter in enumerate(adapters):
        for name, tensor in adapter.diffs.items():
            weight = per_module[i][name.rpartition(".")[0]]
            if weight == 0:
                continue
            check_finite(tensor, name, adapter.source.path)
            part = weight * tensor.float()
            if name in diffs and diffs[name].shape != part.shape:
                raise MergeError(
                    "The LoRAs do not fit the same base model: one parameter has different shapes.",
                    module=name,
                    found=f"{tuple(diffs[name].shape)} and {tuple(part.shape)} in {adapter.label}",
                )
            diffs[name] = diffs[name] + part if name in diffs else part
            passed_on.append(f"{name} (added, times {weight:g}, from {adapter.label})")
        for name, tensor in adapter.extras.items() if used[i] else ():
            if name not in extras:
                extras[name] = tensor
                first[name] = adapter.label
                passed_on.append(f"{name} (unchanged, from {adapter.label})")
            elif extras[name].shape != tensor.shape or not torch.equal(extras[name], tensor):
                dropped.append(f"{name} of {adapter.label}: it cannot be added, and {first[name]} has another one")
    return {name: _narrowed(name, part, dtype) for name, part in diffs.items()}, extras, passed_on, dropped


def _narrowed(name: str, diff: Tensor, dtype: torch.dtype) -> Tensor:
    result = diff.to(dtype)
    if not torch.isfinite(result).all():
        raise overflow(name, dtype, float(diff.abs().max()))
    return result


def _weight_notes(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    te_weights: Sequence[float],
    per_module: Sequence[Mapping[str, float]],
    used: Sequence[bool],
) -> Iterator[str]:
    for adapter, weight, te_weight, values, counts in zip(adapters, weights, te_weights, per_module, used, strict=True):
        silenced = [name for name, value in values.items() if value == 0]
        if not counts:
            yield f"{adapter.label} has weight 0 and was left out"
        elif silenced:
            yield f"{len(silenced)} modules of {adapter.label} have weight 0 and were left out: {name_some(silenced)}"
        if counts and te_weight != weight and any(map(is_text_encoder, adapter.modules)):
            yield f"{adapter.label} has weight {te_weight:g} in the text encoders"


def _strength_notes(method: MergeMethod, weights: Sequence[float]) -> Iterator[str]:
    measured = getattr(getattr(method, "statistics", None), "strengths", ())
    if measured and any(not math.isclose(a, b, rel_tol=0.01) for a, b in zip(measured, weights, strict=False)):
        yield (
            f"the statistics were measured at strengths {', '.join(f'{s:g}' for s in measured)}, the weights are "
            f"{', '.join(f'{w:g}' for w in weights)}: measure again if that is far apart"
        )


def _notes(reports: Mapping[str, ModuleReport], remarks: Mapping[str, str]) -> Iterator[str]:
    silent = [report.name for report in reports.values() if not any(report.norms)]
    if silent:
        yield f"{len(silent)} modules are zero in every LoRA: {name_some(silent)}"
    for remark in sorted(set(remarks.values())):
        names = sorted(name for name in remarks if remarks[name] == remark)
        yield f"{len(names)} modules {remark}: {name_some(names)}"
