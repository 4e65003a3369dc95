"""Sweep: candidate merges, ranked by what they are predicted to keep, before any picture is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from ..adapter import Adapter
from ..errors import MergeError
from ..merge.account import ModuleEffects, Prediction, batch_effects, predict
from ..merge.merged import Merged
from ..merge.methods import MergeMethod
from ..merge.pool import Pool
from ..merge.rank import Rank
from ..merge.statistics import Statistics
from ..progress import Progress
from .method_settings import build_method, takes_statistics
from .recipe import Recipe
from .run import merge_aligned
from .suggest import CAP, of_kind

STRENGTHS, CALIBRATED_STRENGTHS = (0.7, 1.0, 1.2, 1.5), (1.0, 1.2)
"""Factors on the user's weights. A calibrated merge fits the strength that prompts want itself."""
PICTURES = 6
"""Number of candidates that are worth a picture."""
_METHODS = (("concat", 0), ("svd", 1), ("lego", 1), ("calibrated", 1), ("calibrated", 2))
"""Methods, with their rank in units of the given one; 0 for methods without a rank."""
_PER_METHOD = 2  # strengths of one method and rank among the best: neighbours give nearly the same picture


@dataclass(frozen=True)
class Candidate:
    """One way to merge.

    Args:
        method: Name in ``METHODS``. One that takes statistics gets them.
        rank: Its rank as text; ``""`` for a method without a rank.
        strength: Factor on all weights.
        prediction: What it keeps.
        score: Predicted loss, see `loss`: lower is better.
    """

    method: str
    rank: str
    strength: float
    prediction: Prediction
    score: float

    @property
    def label(self) -> str:
        """Method and rank, such as ``lego calibrated 1x``."""
        calibrated = " calibrated" if self.method == "lego" else ""
        return f"{self.method}{calibrated}{self.rank and f' {self.rank}'}"

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this method, rank and strength."""
        factor = self.strength
        inputs = [
            entry.model_copy(
                update={
                    "weight": entry.weight * factor,
                    "text_encoder_weight": None
                    if entry.text_encoder_weight is None
                    else entry.text_encoder_weight * factor,
                }
            )
            for entry in recipe.inputs
        ]
        settings = {"rank": self.rank} if self.rank else {}
        return recipe.model_copy(update={"inputs": inputs, "method": self.method, "settings": settings})


@dataclass(frozen=True)
class Sweep:
    """Candidates for a merge, the best one first.

    Args:
        labels: Labels of the LoRAs. weights: Their weights, on which strengths are factors.
        cap: Limit of singular values with which all candidates were merged, see `merge`.
        candidates: The candidates.
        reasons: Sentences on settings that differ from the given ones.
    """

    labels: tuple[str, ...]
    weights: tuple[float, ...]
    cap: float | None
    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...] = ()

    def apply(self, recipe: Recipe, number: int = 0) -> Recipe:
        """Return the recipe of the candidate at a position of the list."""
        return self.candidates[number].apply(recipe).model_copy(update={"cap": self.cap})

    def best(self, count: int = PICTURES) -> tuple[Candidate, ...]:
        """The first candidates of the list, but no more than two strengths of one method and rank."""
        chosen: list[Candidate] = []
        for candidate in self.candidates:
            if sum(other.label == candidate.label for other in chosen) < _PER_METHOD and len(chosen) < count:
                chosen.append(candidate)
        return tuple(chosen)

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text: a row of column names, and a row per candidate."""
        alone = [f"[{i + 1}] {label}" for i, label in enumerate(self.labels)]
        head = ("merge", "strength", "predicted", *alone, "joint", "base")
        return [head, *(self._row(candidate) for candidate in self.candidates)]

    def _row(self, candidate: Candidate) -> tuple[str, ...]:
        prediction = candidate.prediction
        errors = (*prediction.alone, prediction.joint, prediction.base)
        cells = ("-" if error is None else f"{error:.2f}" for error in errors)
        return candidate.label, f"{candidate.strength:g}", f"{candidate.score:.3f}", *cells

    def text(self) -> str:
        """The table for people, with the columns of the LoRAs by number."""
        head, *rows = self.rows()
        head = tuple(name.partition(" ")[0] for name in head)
        width = max(len(row[0]) for row in (head, *rows))
        lines = [f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in (head, *rows)]
        numbered = [f"  [{i + 1}] {label}: weight {w:g}" for i, (label, w) in enumerate(self._inputs())]
        title = (
            f"sweep: {len(rows)} merges by predicted loss (lower is better); errors relative to what prompts want that "
            "ask for one LoRA, several, or none"
        )
        return "\n".join([title, *numbered, *(f"  {reason}" for reason in self.reasons), *(f"  {x}" for x in lines)])

    def _inputs(self) -> list[tuple[str, float]]:
        return list(zip(self.labels, self.weights, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def loss(prediction: Prediction) -> float:
    """The error by which candidates are ranked: on prompts that name several LoRAs, else the mean of those for one.

    On the tuning pairs of the nano benchmark any weight on the other errors ranks merges worse by their pictures.
    """
    if prediction.joint is not None:
        return prediction.joint
    alone = [error for error in prediction.alone if error is not None]
    return sum(alone) / len(alone) if alone else 0.0


def sweep(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    statistics: Statistics,
    *,
    device: Any = "cpu",
    progress: Progress | None = None,
) -> Sweep:
    """Predict what candidate merges of a recipe's inputs keep, and rank them. No merge is kept.

    Candidates are the exact sum, and SVD, calibrated LEGO and calibrated merges of the recipe's rank, and calibrated
    merges of twice that rank, each at several strengths times the recipe's weights. Where an input has a spectral spike
    all are capped.

    Args:
        recipe: The merge; its method is not used, its rank is.
        adapters: The recipe's inputs under common names, in order.
        statistics: Measured with these adapters; positions refer to them, see `Statistics.of`.
        device: Device to compute on.
        progress: Called with (layers done, layers in all, description). May raise an exception to cancel.

    Raises:
        MergeError: See `merge`; or statistics of none of the layers.
    """
    method = _MeasuringMethod(_candidate_methods(recipe, adapters, statistics), statistics)
    reasons: list[str] = []
    plain = recipe.model_copy(update={"method": "concat", "settings": {}, "dtype": "float32"})
    report = merge_aligned(plain, method, adapters, device=device, progress=progress).report
    spiked = of_kind(report.findings, "spike")
    if spiked and recipe.cap is None:
        plain = plain.model_copy(update={"cap": CAP})
        reasons.append(f"cap {CAP:g}: {spiked[0].text}")
        method.effects.clear()
        report = merge_aligned(plain, method, adapters, device=device, progress=progress).report
    if not method.effects:
        raise MergeError(
            "The statistics have none of the layers that these LoRAs change.",
            expected="statistics measured with these LoRAs on the model's layers",
            found=f"{len(statistics.modules)} other layers",
            remedy="measure them again; layers of text encoders alone cannot be predicted",
        )
    candidates = [
        Candidate(name, rank, strength, prediction, loss(prediction))
        for name, rank in method.methods
        for strength in _strengths(name, recipe)
        for prediction in [method.predict((name, rank), strength, len(adapters))]
    ]
    return Sweep(
        report.inputs,
        report.weights,
        plain.cap,
        tuple(sorted(candidates, key=lambda candidate: candidate.score)),
        tuple(reasons),
    )


def _strengths(method: str, recipe: Recipe) -> tuple[float, ...]:
    if recipe.normalize:  # such weights add up to 1 at every strength
        return (1.0,)
    return CALIBRATED_STRENGTHS if takes_statistics(method) else STRENGTHS


def _candidate_methods(
    recipe: Recipe, adapters: Sequence[Adapter], statistics: Statistics
) -> dict[tuple[str, str], MergeMethod]:
    """The methods by name and rank."""
    given = Rank.parse(recipe.settings.get("rank", "1x"))
    methods: dict[tuple[str, str], MergeMethod] = {}
    for name, times in _METHODS:
        rank = str(_multiplied(given, times, adapters)) if times else ""
        settings = {"rank": rank} if rank else {}
        settings |= {"statistics": statistics} if takes_statistics(name) else {}
        methods[name, rank] = build_method(name, settings)
    return methods


def _multiplied(rank: Rank, times: int, adapters: Sequence[Adapter]) -> Rank:
    """Twice a rank at most the highest possible one; a share of the energy stays."""
    if times == 1 or rank.unit == "%":
        return rank
    if rank.unit == "x":
        return Rank(min(rank.value * times, max(rank.value, len(adapters))), "x")
    names = {name for adapter in adapters for name in adapter.modules}
    highest = max(sum(a.modules[name].rank for a in adapters if name in a.modules) for name in names)
    return Rank(min(rank.value * times, max(rank.value, highest)))


@dataclass
class _MeasuringMethod:
    """A merge method that also measures all candidates in every batch; batches may come from several threads."""

    methods: Mapping[tuple[str, str], MergeMethod]
    statistics: Statistics
    effects: dict[str, ModuleEffects] = field(default_factory=dict[str, ModuleEffects])
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, pool: Pool) -> Merged:
        results = {" ".join(key): method(pool) for key, method in self.methods.items()}
        effects = batch_effects(pool, results, self.statistics)
        with self._lock:
            self.effects |= effects
        return next(iter(results.values()))

    def predict(self, key: tuple[str, str], strength: float, adapters: int) -> Prediction:
        name = " ".join(key)
        accounts = [
            {name: {kind: effect.error(strength) for kind, effect in self.effects[layer].get(name, {}).items()}}
            for layer in sorted(self.effects)
        ]
        (prediction,) = predict(accounts, adapters)
        return prediction
