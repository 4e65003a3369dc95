"""Rules for the weight of single layers, as text: ``[N:]PATTERN=FACTOR``, see `core.layers.parts` for patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import MergeError

_FORM = "[N:]PATTERN=FACTOR, e.g. *attn2*=0.5, or 2:text-encoder=0 for the second LoRA alone"


@dataclass(frozen=True)
class LayerRule:
    """Factor on the weight of the layers that a pattern matches.

    Args:
        adapter: Position of the LoRA that the rule is for; ``None``: all.
        pattern: Shell patterns of layer names, names of parts and ranges of blocks, see `layers_matching`.
        factor: Any finite number.
    """

    adapter: int | None
    pattern: str
    factor: float


def parse_layer_rules(
    rules: str | Iterable[str], count: int, layers: Sequence[Iterable[str]] | None = None
) -> list[dict[str, float]]:
    """Read rules, as the `module_weights` of `merge`: pattern -> factor for each LoRA, sorted by pattern.

    Rules with one pattern multiply, whether they are for all LoRAs or for one, as factors of different patterns do
    where both match a layer.

    Args:
        rules: One rule per item; or a text with one per line, where blank lines and ``#`` comments are skipped.
        count: Number of LoRAs.
        layers: The layer names of each LoRA. A rule for all is then for those LoRAs that it matches a layer of; if
            there is none, for all, so that `merge` refuses the pattern.

    Raises:
        MergeError: Not a rule, a LoRA that does not exist, or a factor that is not finite.
    """
    tables: list[dict[str, float]] = [{} for _ in range(count)]
    names = None if layers is None else [list(each) for each in layers]
    for rule in read_layer_rules(rules, count):
        for i in _positions(rule, count, names):
            tables[i][rule.pattern] = tables[i].get(rule.pattern, 1.0) * rule.factor
    return [dict(sorted(table.items())) for table in tables]


def read_layer_rules(rules: str | Iterable[str], count: int) -> list[LayerRule]:
    """The rules one by one, see `parse_layer_rules`."""
    return [_rule(text, count) for text in (_lines(rules) if isinstance(rules, str) else rules)]


def factors_by_pattern(rules: Iterable[LayerRule], adapter: int | None) -> dict[str, float]:
    """Pattern -> factor of the rules for one LoRA alone, or with ``None`` of the rules for all, sorted by pattern.

    The order in which factors are multiplied can change the last digit of a weight. A recipe stores them sorted.
    """
    factors: dict[str, float] = {}
    for rule in rules:
        if rule.adapter == adapter:
            factors[rule.pattern] = factors.get(rule.pattern, 1.0) * rule.factor
    return dict(sorted(factors.items()))


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        rule = line.partition("#")[0].strip()
        if rule:
            yield rule


def _rule(text: str, count: int) -> LayerRule:
    match = re.fullmatch(r"\s*(?:(\d+)\s*:)?\s*([^\s:=]+)\s*=\s*([^\s=]+)\s*", text)
    factor = None if match is None else _number(match[3])
    if match is None or factor is None:
        raise MergeError("This is not a rule for layer weights.", expected=_FORM, found=text)
    if not math.isfinite(factor):
        raise MergeError("The factor of a layer rule is not a finite number.", expected="e.g. 0.5", found=text)
    if match[1] is None:
        return LayerRule(None, match[2], factor)
    if not 1 <= int(match[1]) <= count:
        raise MergeError(
            "A layer rule is for a LoRA that does not exist.",
            expected=f"a number from 1 to {count}, or none for all LoRAs",
            found=text,
        )
    return LayerRule(int(match[1]) - 1, match[2], factor)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _positions(rule: LayerRule, count: int, layers: Sequence[Sequence[str]] | None) -> Iterable[int]:
    if rule.adapter is not None:
        return [rule.adapter]
    if layers is None:
        return range(count)
    from ..layers.parts import layers_matching  # here, because it loads torch, which the command line's parser avoids

    matched = [i for i, names in enumerate(layers) if layers_matching(rule.pattern, names)]
    return matched or range(count)
