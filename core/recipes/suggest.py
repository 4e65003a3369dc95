"""Suggested strengths and settings of a merge, from norms, overlaps and singular values, and from measured inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapter import Adapter
from ..merge.account import Kind, batch_inner
from ..merge.findings.finding import Finding
from ..merge.merged import Merged
from ..merge.methods.calibrated import JOINT_SCALE
from ..merge.methods.svd import SVD
from ..merge.pool import Pool
from ..merge.rank import Rank
from ..merge.report import MergeReport, inner_products
from ..merge.statistics import Statistics
from ..progress import Progress
from .method_settings import takes_statistics
from .recipe import Recipe
from .run import merge_aligned

Loudness = Literal["each", "loudest"]

CAP, EQUALIZE = 8.0, 0.5
"""Settings that are suggested for a spike, and where the loudness is far apart: halfway, on a logarithmic scale."""
ENERGY = 95.0
"""Share of the sum's energy, in percent, that a suggested rank keeps in every layer."""
SMALL = 64
"""Rank up to which the exact sum is suggested: a file of that size is usual for one LoRA."""
_SAME_SPAN = 0.05  # eigenvalues of the table of cosines up to which LoRAs count as one
_HIGHEST = 1.5  # factor on a strength, at most: LoRAs are trained for a strength of 1


@dataclass(frozen=True)
class Suggestion:
    """Strengths and settings for a merge.

    Args:
        weights: Weight of each input. text_encoder_weights: Those of its text encoder modules.
        method: Name of the method. rank: Its rank as text; ``None`` if it has none, or the given one stays.
        cap, equalize: See `merge`.
        reasons: A sentence for each of them.
    """

    weights: tuple[float, ...]
    text_encoder_weights: tuple[float | None, ...]
    method: str
    rank: str | None
    cap: float | None
    equalize: float
    reasons: tuple[str, ...]

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the suggested weights and settings."""
        inputs = [
            entry.model_copy(update={"weight": weight, "text_encoder_weight": te_weight})
            for entry, weight, te_weight in zip(recipe.inputs, self.weights, self.text_encoder_weights, strict=True)
        ]
        settings = recipe.settings if self.method == recipe.method else {}
        settings = {**settings, **({} if self.rank is None else {"rank": self.rank})}
        update = {"inputs": inputs, "method": self.method, "settings": settings}
        return recipe.model_copy(update={**update, "cap": self.cap, "equalize": self.equalize})

    def text(self, labels: Sequence[str]) -> str:
        """The suggestion for people: strengths in a line, and the reasons."""
        pairs = ", ".join(f"{label} {weight:g}" for label, weight in zip(labels, self.weights, strict=True))
        return "\n".join([f"suggested: {pairs}", *(f"  {reason}" for reason in self.reasons)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def suggest(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    loudness: Loudness = "each",
    *,
    statistics: Statistics | None = None,
    choose_method: bool = True,
    progress: Progress | None = None,
) -> Suggestion:
    """Suggest strengths and settings for a recipe. Nothing is merged.

    Args:
        recipe: The merge. Its weights are multiplied by factors; a cap or equalize that it gives stays.
        adapters: The recipe's inputs under common names, in order.
        loudness: ``each``: every LoRA has the same share in the sum as it has alone, ``<sum, delta_i> = |delta_i|^2``,
            so that what several LoRAs have in common counts once. ``loudest``: the sum has the norm of the loudest
            LoRA.
        statistics: Statistics measured with these adapters; positions refer to them. With ``each``, strengths of a
            method without statistics are those whose sum is predicted to be nearest to what prompts for several LoRAs
            want, see `_factors_on_inputs`; a calibrated merge fits that target itself.
        choose_method: Suggest method and rank; ``False`` keeps those of the recipe.
        progress: See `merge`.

    Raises:
        MergeError: See `merge`.
    """
    reasons: list[str] = []
    report, inner_on_inputs = _measure(recipe, adapters, statistics, progress)
    spiked = of_kind(report.findings, "spike")
    if spiked and recipe.cap is None:
        recipe = recipe.model_copy(update={"cap": CAP})
        reasons.append(f"cap {CAP:g}: {spiked[0].text}")
        # without the spike, which may hide how loud the rest is
        report, inner_on_inputs = _measure(recipe, adapters, statistics, progress)
    far = of_kind(report.findings, "loudness")
    if far and not recipe.equalize:
        recipe = recipe.model_copy(update={"equalize": EQUALIZE})
        reasons.append(f"equalize {EQUALIZE:g}: {far[0].text}")
        report, inner_on_inputs = _measure(recipe, adapters, statistics, progress)
    factors, reason = _factors(report, loudness)
    reasons.append(reason)
    method, rank = recipe.method, None
    if choose_method:
        method, rank, reason = _method_and_rank(report)
        reasons.append(reason)
    if inner_on_inputs and loudness == "each" and not takes_statistics(method):
        factors, reason = _factors_on_inputs(inner_on_inputs, factors)
        reasons.append(reason)
    return Suggestion(
        tuple(_rounded(entry.weight * f) for entry, f in zip(recipe.inputs, factors, strict=True)),
        tuple(
            None if entry.text_encoder_weight is None else _rounded(entry.text_encoder_weight * f)
            for entry, f in zip(recipe.inputs, factors, strict=True)
        ),
        method,
        rank,
        recipe.cap,
        recipe.equalize,
        tuple(reasons),
    )


InnerOnInputs = Sequence[tuple[Kind, Tensor]]
"""Inner products on measured inputs of a layer, ``(N, N)`` float64, with the kind of the prompts, for all layers."""


def _measure(
    recipe: Recipe, adapters: Sequence[Adapter], statistics: Statistics | None, progress: Progress | None
) -> tuple[MergeReport, InnerOnInputs]:
    """Norms, cosines, findings, and per layer the rank that keeps `ENERGY` of the exact sum; and on measured inputs."""
    exact = recipe.model_copy(update={"method": "svd", "settings": {}, "dtype": "float32"})
    method = _MeasuringSVD(SVD(Rank(ENERGY, "%")), statistics)
    report = merge_aligned(exact, method, adapters, progress=progress).report
    inner: list[tuple[Kind, Tensor]] = []
    for positions, by_kind in (method.inner[name] for name in sorted(method.inner)):
        place = torch.tensor(positions)
        for kind, table in by_kind.items():
            inner.append((kind, torch.zeros(len(adapters), len(adapters), dtype=torch.float64)))
            inner[-1][1][place[:, None], place] = table
    return report, inner


@dataclass
class _MeasuringSVD:
    """`SVD` that also keeps inner products on measured inputs; batches may come from several threads."""

    svd: SVD
    statistics: Statistics | None
    inner: dict[str, tuple[tuple[int, ...], Mapping[Kind, Tensor]]] = field(default_factory=dict[str, Any])

    def __call__(self, pool: Pool) -> Merged:
        if self.statistics is not None:
            tables = batch_inner(pool, self.statistics)
            self.inner |= {name: (pool.adapters, table) for name, table in tables.items()}
        return self.svd(pool)


def _factors(report: MergeReport, loudness: Loudness) -> tuple[list[float], str]:
    """Factors on the weights, and the reason."""
    if len(report.inputs) == 1:
        return [1.0], "one LoRA keeps its strength"
    inner = inner_products(report.modules, len(report.inputs))
    norms = inner.diagonal().clamp_min(0).sqrt()
    total, loudest = math.sqrt(max(0.0, float(inner.sum()))), float(norms.max())
    before = total / loudest if loudest > 0 else 1.0
    if loudness == "loudest":
        factor = min(_HIGHEST, 1 / before) if before > 0 else 1.0
        reason = f"strengths times {factor:.2f}: the sum was {before:.2f} times as loud as the loudest LoRA alone"
        return [factor] * len(report.inputs), reason
    cosine = torch.eye(len(norms), dtype=torch.float64)
    alive = norms > 0
    scale = torch.where(alive, norms, 1)
    cosine = torch.where(alive[:, None] & alive, inner / (scale[:, None] * scale), cosine)
    clipped = _balanced(cosine, scale, scale).clamp_max(_HIGHEST)
    after = math.sqrt(max(0.0, float(clipped @ inner @ clipped))) / loudest if loudest > 0 else 1.0
    reason = (
        f"strengths times {', '.join(f'{factor:.2f}' for factor in clipped.tolist())}: each LoRA acts in the sum as it "
        f"does alone; the sum is {after:.2f} times as loud as the loudest LoRA, before {before:.2f} times"
    )
    return clipped.tolist(), reason


def _factors_on_inputs(inner: InnerOnInputs, factors: Sequence[float]) -> tuple[list[float], str]:
    """Factors on the weights with the least predicted error on prompts that name several LoRAs, and the reason.

    The error of a layer is ``|sum_j s_j delta_j - wanted|^2 / |wanted|^2`` on its measured inputs, with
    ``wanted = 1.2 sum_i f_i delta_i`` over the LoRAs that the prompts name; `s` minimises its mean over layers and
    kinds of prompts. With two LoRAs that is ``1.2 f``; a third one, which a prompt for two of the three does not name,
    lowers it. Where no prompt named several, those that name one are used, without the 1.2.

    Args:
        inner: See `InnerOnInputs`. factors: ``f (N,)``, which count once what LoRAs have in common.

    Source: `Calibrated`, with one coefficient per adapter, for the prompts that name several alone.
    """
    f = torch.tensor(factors, dtype=torch.float64)
    scale = JOINT_SCALE if any(len(kind) > 1 for kind, _ in inner) else 1.0
    Q, b, count = torch.zeros(len(f), len(f), dtype=torch.float64), torch.zeros_like(f), 0
    for kind, table in inner:
        if len(kind) > 1 if scale != 1 else len(kind) == 1:
            wanted = torch.zeros_like(f)
            wanted[list(kind)] = scale * f[list(kind)]
            size = float(wanted @ table @ wanted)
            if size > 0:
                Q, b, count = Q + table / size, b + table @ wanted / size, count + 1
    norms = Q.diagonal().clamp_min(0).sqrt()
    alive = norms > 0
    if not count:
        return list(factors), "the measured prompts name no LoRA: the strengths stay"
    divisor = torch.where(alive, norms, 1)
    cosine = torch.where(alive[:, None] & alive, Q / (divisor[:, None] * divisor), torch.eye(len(f)).to(Q))
    solved = _balanced(cosine, divisor, b / divisor).clamp_max(_HIGHEST)
    solved = torch.where(alive, solved, f)

    def error(s: Tensor) -> float:
        return math.sqrt(max(0.0, 1 + float(s @ Q @ s - 2 * s @ b) / count))

    named = "several LoRAs" if scale != 1 else "one LoRA"
    return solved.tolist(), (
        f"strengths times {', '.join(f'{value:.2f}' for value in solved.tolist())} in all: on prompts for {named} the "
        f"sum is predicted to be {error(solved):.0%} away from what they want, with the given strengths "
        f"{error(torch.ones_like(f)):.0%}"
    )


def _balanced(cosine: Tensor, norms: Tensor, wanted: Tensor) -> Tensor:
    """Factors `s` of at least 0, with ``<sum_j s_j delta_j, delta_i> = wanted_i norms_i`` wherever they are above 0.

    With ``D = diag(norms)`` the inner products are ``D C D``, hence ``C (D s) = wanted``. Where LoRAs span the same
    directions the smallest solution divides these among them. LoRAs whose factor would be negative are left out.

    Args:
        cosine: ``C (N, N)``. norms: ``(N,)``, not 0. wanted: ``(N,)``.
    """
    factors, active = torch.zeros_like(norms), torch.ones_like(norms, dtype=torch.bool)
    while active.any():
        part = cosine[active][:, active]
        solved = torch.linalg.pinv(part, rtol=_SAME_SPAN, hermitian=True) @ wanted[active] / norms[active]
        factors[:] = 0
        factors[active] = solved
        if bool((solved >= 0).all()):
            break
        active[active.clone()] = solved >= 0
    return factors


def _method_and_rank(report: MergeReport) -> tuple[str, str | None, str]:
    """Method, rank, and the reason."""
    fast = of_kind(report.findings, "speed_up")
    if fast:
        return "concat", None, f"method concat: {fast[0].text}"
    opposed = of_kind(report.findings, "opposed")
    if opposed:
        return "ties", None, f"method ties, which elects a sign where LoRAs disagree: {opposed[0].text}"
    whole = max((sum(module.ranks_in) for module in report.modules), default=0)
    needed = sum(module.rank_out for module in report.modules) / max(1, len(report.modules))
    if 2 * needed <= whole:
        text = f"rank {needed:.3g} on average keeps {ENERGY:g}% of their sum, of {whole}"
        return "svd", f"{ENERGY:g}%", f"method svd at {ENERGY:g}%: the LoRAs need few directions, {text}"
    if whole <= SMALL:
        return "concat", None, f"method concat: the exact sum has rank {whole}, which is small enough to keep all of it"
    text = f"the exact sum would have rank {whole}"
    return "svd", f"{ENERGY:g}%", f"method svd at {ENERGY:g}%: the nearest to the sum, and {text}"


def of_kind(findings: Sequence[Finding], kind: str) -> list[Finding]:
    """The findings of one kind, in order."""
    return [finding for finding in findings if finding.kind == kind]


def _rounded(weight: float) -> float:
    """Three digits; next to nothing is nothing."""
    return 0.0 if abs(weight) < 0.02 else float(f"{weight:.3g}")
