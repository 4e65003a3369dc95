"""Suggested strengths and settings of a merge, from the LoRAs' norms, overlaps and singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapter import Adapter
from ..merge.findings.finding import Finding
from ..merge.methods.svd import SVD
from ..merge.rank import Rank
from ..merge.report import MergeReport, inner_products
from ..progress import Progress
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
        choose_method: Suggest method and rank; ``False`` keeps those of the recipe.
        progress: See `merge`.

    Raises:
        MergeError: See `merge`.
    """
    reasons: list[str] = []
    report = _measure(recipe, adapters, progress)
    spiked = _of_kind(report.findings, "spike")
    if spiked and recipe.cap is None:
        recipe = recipe.model_copy(update={"cap": CAP})
        reasons.append(f"cap {CAP:g}: {spiked[0].text}")
        report = _measure(recipe, adapters, progress)  # without the spike, which may hide how loud the rest is
    far = _of_kind(report.findings, "loudness")
    if far and not recipe.equalize:
        recipe = recipe.model_copy(update={"equalize": EQUALIZE})
        reasons.append(f"equalize {EQUALIZE:g}: {far[0].text}")
        report = _measure(recipe, adapters, progress)
    factors, reason = _factors(report, loudness)
    reasons.append(reason)
    method, rank = recipe.method, None
    if choose_method:
        method, rank, reason = _method_and_rank(report)
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


def _measure(recipe: Recipe, adapters: Sequence[Adapter], progress: Progress | None) -> MergeReport:
    """Norms, cosines, findings, and per layer the rank that keeps `ENERGY` of the exact sum."""
    exact = recipe.model_copy(update={"method": "svd", "settings": {}, "dtype": "float32"})
    return merge_aligned(exact, SVD(Rank(ENERGY, "%")), adapters, progress=progress).report


def _factors(report: MergeReport, loudness: Loudness) -> tuple[list[float], str]:
    """Factors on the weights, and the reason."""
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
    clipped = _balanced(cosine, scale).clamp_max(_HIGHEST)
    after = math.sqrt(max(0.0, float(clipped @ inner @ clipped))) / loudest if loudest > 0 else 1.0
    reason = (
        f"strengths times {', '.join(f'{factor:.2f}' for factor in clipped.tolist())}: each LoRA acts in the sum as it "
        f"does alone; the sum is {after:.2f} times as loud as the loudest LoRA, before {before:.2f} times"
    )
    return clipped.tolist(), reason


def _balanced(cosine: Tensor, norms: Tensor) -> Tensor:
    """Factors `s` of at least 0, with ``<sum_j s_j delta_j, delta_i> = |delta_i|^2`` wherever they are above 0.

    With ``D = diag(norms)`` the inner products are ``D C D``, hence ``C (D s) = D 1``. Where LoRAs span the same
    directions the smallest solution divides these among them. LoRAs whose factor would be negative are left out.

    Args:
        cosine: ``C (N, N)``. norms: ``(N,)``, not 0.
    """
    factors, active = torch.zeros_like(norms), torch.ones_like(norms, dtype=torch.bool)
    while active.any():
        part = cosine[active][:, active]
        solved = torch.linalg.pinv(part, rtol=_SAME_SPAN, hermitian=True) @ norms[active] / norms[active]
        factors[:] = 0
        factors[active] = solved
        if bool((solved >= 0).all()):
            break
        active[active.clone()] = solved >= 0
    return factors


def _method_and_rank(report: MergeReport) -> tuple[str, str | None, str]:
    """Method, rank, and the reason."""
    fast = _of_kind(report.findings, "speed_up")
    if fast:
        return "concat", None, f"method concat: {fast[0].text}"
    opposed = _of_kind(report.findings, "opposed")
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


def _of_kind(findings: Sequence[Finding], kind: str) -> list[Finding]:
    return [finding for finding in findings if finding.kind == kind]


def _rounded(weight: float) -> float:
    """Three digits; next to nothing is nothing."""
    return 0.0 if abs(weight) < 0.02 else float(f"{weight:.3g}")
