"""XY comparisons: a grid of images over two axes, validated before anything is sampled.

Cells that must give the same image are equal, so that each image is sampled once: a method without a rank has no rank
here, the plain model has no strengths, and with all strengths at 0 every method is the plain model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MergeError
from ..fields import is_required
from ..merge.methods import METHODS
from ..merge.rank import Rank
from ..recipes.sweep import Candidate, Sweep

PLAIN, MIX, CALIBRATED_LEGO = "none", "mole", "lego calibrated"
METHOD_CHOICES = (PLAIN, *METHODS, CALIBRATED_LEGO, MIX)
"""Methods of a cell: the plain model, the merge methods, LEGO with statistics, a mixture with gates."""
NOTHING, SWEEP = "nothing", "sweep"
AXIS_KINDS = (
    *("method", "rank", "strength", *(f"strength {n}" for n in range(1, 9))),
    *("cap", "equalize", "seed", "prompt", SWEEP, NOTHING),
)
"""Settings that an axis may vary: `strength` is a factor on all LoRAs' strengths, `strength n` on the n-th LoRA's;
`SWEEP` varies method, rank and strength at once, by the best candidates of a sweep."""
_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class ModelSetup:
    """How the LoRAs are combined on the model.

    Args:
        method: One of `METHOD_CHOICES`.
        rank: Rank as `Rank` prints it; ``""`` for methods without one.
        strength_factors: One factor per LoRA, on its own strength; empty for the plain model.
        cap, equalize: Of a merge, see `core.merge.engine.merge`.
    """

    method: str
    rank: str = ""
    strength_factors: tuple[float, ...] = ()
    cap: float | None = None
    equalize: float = 0.0

    @property
    def is_merge(self) -> bool:
        """Whether the LoRAs are merged, as opposed to mixed or left out."""
        return self.method not in (PLAIN, MIX)

    @property
    def needs_statistics(self) -> bool:
        """Whether the method needs calibration statistics."""
        return self.method == CALIBRATED_LEGO or (self.is_merge and _requires_setting(self.merge_method, "statistics"))

    @property
    def merge_method(self) -> str:
        """Name of the merge method in ``METHODS``."""
        return "lego" if self.method == CALIBRATED_LEGO else self.method

    def describe(self) -> str:
        """Return a description such as ``lego, rank 1x, strengths x 1, 0.5``."""
        parts = [self.method, *([f"rank {self.rank}"] if self.rank else [])]
        if any(factor != 1 for factor in self.strength_factors):
            even = len(set(self.strength_factors)) == 1
            shown = self.strength_factors[:1] if even else self.strength_factors
            parts.append(f"strength{'s' * (not even)} x {', '.join(f'{factor:g}' for factor in shown)}")
        parts += [] if self.cap is None else [f"cap {self.cap:g}"]
        parts += [f"equalize {self.equalize:g}"] if self.equalize else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Cell:
    """One image: the setup of the model, the sampler's seed, and the prompt."""

    setup: ModelSetup
    seed: int
    prompt: str


@dataclass(frozen=True)
class Axis:
    """A setting that varies along one side of the grid.

    Args:
        kind: One of `AXIS_KINDS`.
        values: Values as the user wrote them, or names of the candidates of a sweep.
        candidates: Settings of each value, of a sweep.
    """

    kind: str
    values: tuple[str, ...]
    candidates: tuple[Mapping[str, str], ...] = ()

    @property
    def settings(self) -> Sequence[Mapping[str, str]]:
        """What each value sets."""
        return self.candidates or [{self.kind: value} for value in self.values]

    @classmethod
    def of_sweep(cls, swept: Sweep) -> Axis:
        """An axis with the best candidates of a sweep."""
        best = swept.best()
        cap = {} if swept.cap is None else {"cap": f"{swept.cap:g}"}
        names = [f"{candidate.label}, strength x {candidate.strength:g}" for candidate in best]
        return cls(SWEEP, tuple(names), tuple({**_settings(candidate), **cap} for candidate in best))

    @classmethod
    def parse(cls, side: str, kind: str, text: str) -> Axis:
        """Parse and check a user's list of values.

        Args:
            side: ``x`` or ``y``, for errors.
            kind: One of `AXIS_KINDS`.
            text: Values separated by commas or line breaks; prompts by line breaks only. Ignored if `kind` is
                `NOTHING` or `SWEEP`.

        Raises:
            MergeError: If there are no values, or one is not of this kind.
        """
        if kind in (NOTHING, SWEEP):
            return cls(kind, ("",))
        lines = text.splitlines() if kind == "prompt" else text.replace("\n", ",").split(",")
        values = tuple(value for line in lines if (value := line.strip()))
        if not values:
            raise MergeError(
                f"The {side} axis has no values.",
                expected=f"values of {kind}, {'one per line' if kind == 'prompt' else 'separated by commas'}",
                found="nothing",
                remedy=f"enter values in {side}_values, or choose an axis that changes nothing",
            )
        for value in values:
            _PARSERS["strength" if kind.startswith("strength") else kind](value, f"{side} axis")
        return cls(kind, values)

    def title(self, labels: Sequence[str]) -> str:
        """Return a title for the sheet; `labels` are those of the LoRAs."""
        number = _lora_index(self.kind)
        return "" if self.kind == NOTHING else self.kind if number is None else f"{self.kind} ({labels[number]})"


def grid_of_cells(
    x: Axis, y: Axis, *, method: str, rank: str, seed: int, prompt: str, loras: int, statistics: bool
) -> list[list[Cell]]:
    """Return the cells of the grid, row by row (y) and column by column (x).

    Args:
        x: Axis from column to column.
        y: Axis from row to row.
        method, rank, seed, prompt: Values of the settings that no axis varies.
        loras: Number of LoRAs.
        statistics: Whether there are calibration statistics.

    Raises:
        MergeError: If both axes vary the same setting, an axis names a missing LoRA, or a method lacks LoRAs or
            statistics.
    """
    both = sorted(set(x.settings[0]) & set(y.settings[0]) - {NOTHING})
    if both:
        raise MergeError(
            f"Both axes change the same setting: {', '.join(both)}.",
            expected="two different axes",
            remedy="choose another setting for the y axis, or nothing",
        )
    for axis in (x, y):
        number = _lora_index(axis.kind)
        if number is not None and number >= loras:
            raise MergeError(
                "An axis changes the strength of a LoRA that is not there.",
                expected=f"{loras} LoRA{'s' * (loras != 1)}",
                found=axis.kind,
                remedy="connect more LoRAs, or choose another axis",
            )
    fixed = {"method": method, "rank": rank, "seed": str(seed), "prompt": prompt}
    return [
        [_cell({**fixed, **y_settings, **x_settings}, loras, statistics) for x_settings in x.settings]
        for y_settings in y.settings
    ]


def cells_by_setup(grid: Sequence[Sequence[Cell]]) -> dict[ModelSetup, list[Cell]]:
    """Group the distinct cells by the setup of the model, in the order of the grid."""
    groups: dict[ModelSetup, dict[Cell, None]] = {}
    for row in grid:
        for cell in row:
            groups.setdefault(cell.setup, {})[cell] = None
    return {setup: list(cells) for setup, cells in groups.items()}


def describe_cells(
    grid: Sequence[Sequence[Cell]], seconds: Mapping[Cell, float], remarks: Mapping[ModelSetup, str]
) -> str:
    """Return a report of the grid, one line per cell.

    Args:
        grid: Cells, row by row.
        seconds: Sampling time of each distinct cell.
        remarks: Remark on a setup, appended to its first cell.
    """
    place: dict[Cell, str] = {}
    several_prompts = len({cell.prompt for cell in seconds}) > 1
    count = sum(map(len, grid))
    lines = [f"{count} cell{'s' * (count != 1)}, {len(seconds)} sampled in {sum(seconds.values()):.1f} s"]
    remarked: set[ModelSetup] = set()
    for i, row in enumerate(grid, 1):
        for j, cell in enumerate(row, 1):
            here = f"row {i}, column {j}"
            if cell in place:
                lines.append(f"  {here}: the same as {place[cell]}")
                continue
            place[cell] = here
            parts = [cell.setup.describe(), f"seed {cell.seed}", *([f'"{cell.prompt}"'] if several_prompts else [])]
            remark = "" if cell.setup in remarked else remarks.get(cell.setup, "")
            remarked.add(cell.setup)
            lines.append(f"  {here}: {', '.join(parts)}: {seconds[cell]:.1f} s{remark and f'; {remark}'}")
    return "\n".join(lines)


def _cell(settings: Mapping[str, str], loras: int, statistics: bool) -> Cell:
    """Build a cell from a value for every setting; strengths may be missing."""
    overall = float(settings.get("strength", 1))
    factors = tuple(overall * float(settings.get(f"strength {n + 1}", 1)) for n in range(loras))
    setup = ModelSetup(_parse_method(settings["method"], "method"), "", factors)
    if setup.is_merge and _has_setting(setup.merge_method, "rank"):
        setup = replace(setup, rank=_parse_rank(settings["rank"], "rank"))
    if setup.is_merge:
        cap, equalize = _parse_cap(settings.get("cap", "0"), "cap"), settings.get("equalize", "0")
        setup = replace(setup, cap=cap or None, equalize=_parse_share(equalize, "equalize"))
    if setup.method != PLAIN and not loras:
        raise MergeError(
            f"No LoRA is connected, and {setup.method} needs at least one.",
            expected="at least one on the loras inputs",
            found="none",
        )
    if setup.needs_statistics and not statistics:
        raise MergeError(
            f"The method {setup.method} needs statistics.",
            expected="the statistics output of Calibrate",
            found="nothing connected",
            remedy="add a Calibrate node with the same LoRAs and connect it",
        )
    if setup.method == PLAIN or not any(factors):
        setup = ModelSetup(PLAIN)
    return Cell(setup, _parse_seed(settings["seed"], "seed"), settings["prompt"])


def _settings(candidate: Candidate) -> dict[str, str]:
    method = CALIBRATED_LEGO if candidate.method == "lego" else candidate.method
    rank = {"rank": candidate.rank} if candidate.rank else {}
    return {"method": method, "strength": f"{candidate.strength:g}", **rank}


def _lora_index(kind: str) -> int | None:
    """Index of the LoRA that an axis of ``strength n`` changes."""
    _, space, number = kind.partition(" ")
    return int(number) - 1 if space else None


def _has_setting(method: str, setting: str) -> bool:
    return any(field.name == setting for field in dataclasses.fields(METHODS[method]))  # type: ignore[arg-type]


def _requires_setting(method: str, setting: str) -> bool:
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(METHODS[method])}  # type: ignore[arg-type]
    return setting in fields and is_required(fields[setting])


def _parse_method(text: str, where: str) -> str:
    if text not in METHOD_CHOICES:
        raise MergeError("There is no such method.", module=where, expected=", ".join(METHOD_CHOICES), found=text)
    return text


def _parse_rank(text: str, where: str) -> str:
    try:
        return str(Rank.parse(text))
    except MergeError as error:
        raise error.at(None, where) from None


def _parse_strength(text: str, where: str) -> float:
    value = _number(text)
    if not math.isfinite(value):
        raise MergeError("This is not a strength.", module=where, expected="numbers such as 0.5, 1, 1.5", found=text)
    return value


def _parse_cap(text: str, where: str) -> float:
    value = _number(text)
    if not (value == 0 or (value >= 1 and math.isfinite(value))):
        raise MergeError("This is not a cap.", module=where, expected="numbers from 1 on such as 8, or 0", found=text)
    return value


def _parse_share(text: str, where: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise MergeError("This is not a share.", module=where, expected="numbers from 0 to 1", found=text)
    return value


def _number(text: str) -> float:
    """A number; NaN for other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _parse_seed(text: str, where: str) -> int:
    if not text.isdecimal() or int(text) > _LARGEST_SEED:
        raise MergeError(
            "This is not a seed.", module=where, expected=f"whole numbers, 0 .. {_LARGEST_SEED}", found=text
        )
    return int(text)


def _parse_prompt(text: str, where: str) -> str:
    return text


_PARSERS: dict[str, Callable[[str, str], object]] = {
    "method": _parse_method,
    "rank": _parse_rank,
    "strength": _parse_strength,
    "cap": _parse_cap,
    "equalize": _parse_share,
    "seed": _parse_seed,
    "prompt": _parse_prompt,
}
