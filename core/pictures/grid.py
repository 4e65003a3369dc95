"""A grid of pictures over two axes: what is changed from cell to cell, checked before anything is painted.

Cells that come out alike are equal, so that each is painted once: a method without a rank has no rank here, the plain
model no strengths, and with all strengths at 0 every method is the plain model.
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

PLAIN, MIX, CALIBRATED_LEGO = "none", "mole", "lego calibrated"
CHOICES = (PLAIN, *METHODS, CALIBRATED_LEGO, MIX)
"""What a cell may be painted with: nothing, a merge method, LEGO with statistics, the LoRAs mixed by gates."""
NOTHING = "nothing"
AXES = ("method", "rank", "strength", *(f"strength {n}" for n in range(1, 9)), "seed", "prompt", NOTHING)
"""What an axis may change: `strength` is a factor on all LoRAs, `strength n` one on the n-th."""
_MOST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Setup:
    """What is put on the model.

    Args:
        method: One of `CHOICES`. rank: As `Rank` writes it; ``""`` where the method has none.
        factors: One per LoRA, on its own strength; empty for the plain model.
    """

    method: str
    rank: str = ""
    factors: tuple[float, ...] = ()

    @property
    def merges(self) -> bool:
        """Whether it is one of the merge methods."""
        return self.method not in (PLAIN, MIX)

    @property
    def calibrated(self) -> bool:
        """Whether it needs statistics."""
        return self.method == CALIBRATED_LEGO or (self.merges and _required(self.row, "statistics"))

    @property
    def row(self) -> str:
        """The merge method's name in ``METHODS``."""
        return "lego" if self.method == CALIBRATED_LEGO else self.method

    def text(self) -> str:
        """In words: ``lego, rank 1x, strengths x 1, 0.5``."""
        parts = [self.method, *([f"rank {self.rank}"] if self.rank else [])]
        if any(factor != 1 for factor in self.factors):
            even = len(set(self.factors)) == 1
            shown = self.factors[:1] if even else self.factors
            parts.append(f"strength{'s' * (not even)} x {', '.join(f'{factor:g}' for factor in shown)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Cell:
    """One picture: what is on the model, the sampler's seed, and the prompt."""

    setup: Setup
    seed: int
    prompt: str


@dataclass(frozen=True)
class Axis:
    """What changes along one side.

    Args:
        kind: One of `AXES`. values: As written.
    """

    kind: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, side: str, kind: str, text: str) -> Axis:
        """Read what a user wrote.

        Args:
            side: ``x`` or ``y``, for errors. kind: One of `AXES`.
            text: Values between commas or lines; prompts one per line. Of no matter to an axis of `NOTHING`.

        Raises:
            MergeError: No values, or one that is none of this kind.
        """
        if kind == NOTHING:
            return cls(kind, ("",))
        lines = text.splitlines() if kind == "prompt" else text.replace("\n", ",").split(",")
        values = tuple(value for line in lines if (value := line.strip()))
        if not values:
            raise MergeError(
                f"The {side} axis has no values.",
                expected=f"values of {kind}, {'one a line' if kind == 'prompt' else 'separated by commas'}",
                found="nothing",
                remedy=f"write some into {side}_values, or let the axis change nothing",
            )
        for value in values:
            _READ["strength" if kind.startswith("strength") else kind](value, f"{side} axis")
        return cls(kind, values)

    def title(self, labels: Sequence[str]) -> str:
        """What it changes, for people; `labels` are the LoRAs'."""
        number = _number(self.kind)
        return "" if self.kind == NOTHING else self.kind if number is None else f"{self.kind} ({labels[number]})"


def cells(
    x: Axis, y: Axis, *, method: str, rank: str, seed: int, prompt: str, loras: int, statistics: bool
) -> list[list[Cell]]:
    """The grid, row by row (y) and column by column (x).

    Args:
        method, rank, seed, prompt: What the axes do not change.
        loras: How many there are. statistics: Whether there are statistics of theirs.

    Raises:
        MergeError: Both axes change the same, a LoRA that is not there, or a method that lacks what it needs.
    """
    if x.kind == y.kind != NOTHING:
        raise MergeError(
            f"Both axes change the same: {x.kind}.",
            expected="two different axes",
            remedy="let the y axis change something else, or nothing",
        )
    for axis in (x, y):
        number = _number(axis.kind)
        if number is not None and number >= loras:
            raise MergeError(
                "An axis changes the strength of a LoRA that is not there.",
                expected=f"{loras} LoRA{'s' * (loras != 1)}",
                found=axis.kind,
                remedy="connect more LoRAs, or choose another axis",
            )
    same = {"method": method, "rank": rank, "seed": str(seed), "prompt": prompt}
    grid = [
        [_cell({**same, y.kind: down, x.kind: across}, loras, statistics) for across in x.values] for down in y.values
    ]
    return grid


def groups(grid: Sequence[Sequence[Cell]]) -> dict[Setup, list[Cell]]:
    """The different cells by what is on the model, in the order they come; each is painted once."""
    found: dict[Setup, dict[Cell, None]] = {}
    for row in grid:
        for cell in row:
            found.setdefault(cell.setup, {})[cell] = None
    return {setup: list(members) for setup, members in found.items()}


def account(grid: Sequence[Sequence[Cell]], seconds: Mapping[Cell, float], remarks: Mapping[Setup, str]) -> str:
    """What was painted, cell by cell, for people.

    Args:
        grid: Row by row.
        seconds: How long each different cell took. remarks: What to say of a setup where it first comes.
    """
    place: dict[Cell, str] = {}
    several = len({cell.prompt for cell in seconds}) > 1
    count = sum(map(len, grid))
    lines = [f"{count} cell{'s' * (count != 1)}, {len(seconds)} painted in {sum(seconds.values()):.1f} s"]
    said: set[Setup] = set()
    for i, row in enumerate(grid, 1):
        for j, cell in enumerate(row, 1):
            here = f"row {i}, column {j}"
            if cell in place:
                lines.append(f"  {here}: the same as {place[cell]}")
                continue
            place[cell] = here
            parts = [cell.setup.text(), f"seed {cell.seed}", *([f'"{cell.prompt}"'] if several else [])]
            remark = "" if cell.setup in said else remarks.get(cell.setup, "")
            said.add(cell.setup)
            lines.append(f"  {here}: {', '.join(parts)}: {seconds[cell]:.1f} s{remark and f'; {remark}'}")
    return "\n".join(lines)


def _cell(chosen: Mapping[str, str], loras: int, statistics: bool) -> Cell:
    """A cell of these values by kind of axis; what no axis changes has the widgets' value."""
    every = float(chosen.get("strength", 1))
    factors = tuple(every * float(chosen.get(f"strength {n + 1}", 1)) for n in range(loras))
    setup = Setup(_method(chosen["method"], "method"), "", factors)
    if setup.merges and _takes(setup.row, "rank"):
        setup = replace(setup, rank=_rank(chosen["rank"], "rank"))
    if setup.method != PLAIN and not loras:
        raise MergeError(
            f"No LoRA is connected, and {setup.method} needs some.",
            expected="at least one on the loras inputs",
            found="none",
        )
    if setup.calibrated and not statistics:
        raise MergeError(
            f"The method {setup.method} needs statistics.",
            expected="the statistics output of Calibrate",
            found="nothing connected",
            remedy="add a Calibrate node with the same LoRAs and connect it",
        )
    if not any(factors):
        setup = Setup(PLAIN)
    return Cell(Setup(PLAIN) if setup.method == PLAIN else setup, _seed(chosen["seed"], "seed"), chosen["prompt"])


def _number(kind: str) -> int | None:
    """Which LoRA an axis of ``strength n`` changes, from 0."""
    _, space, number = kind.partition(" ")
    return int(number) - 1 if space else None


def _takes(method: str, setting: str) -> bool:
    return any(field.name == setting for field in dataclasses.fields(METHODS[method]))  # type: ignore[arg-type]


def _required(method: str, setting: str) -> bool:
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(METHODS[method])}  # type: ignore[arg-type]
    return setting in fields and is_required(fields[setting])


def _method(text: str, where: str) -> str:
    if text not in CHOICES:
        raise MergeError("There is no such method.", module=where, expected=", ".join(CHOICES), found=text)
    return text


def _rank(text: str, where: str) -> str:
    try:
        return str(Rank.parse(text))
    except MergeError as error:
        raise error.at(None, where) from None


def _strength(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MergeError("This is not a strength.", module=where, expected="numbers such as 0.5, 1, 1.5", found=text)
    return value


def _seed(text: str, where: str) -> int:
    if not text.isdecimal() or int(text) > _MOST_SEED:
        raise MergeError("This is not a seed.", module=where, expected=f"whole numbers, 0 .. {_MOST_SEED}", found=text)
    return int(text)


def _prompt(text: str, where: str) -> str:
    return text


_READ: dict[str, Callable[[str, str], object]] = {
    "method": _method,
    "rank": _rank,
    "strength": _strength,
    "seed": _seed,
    "prompt": _prompt,
}
