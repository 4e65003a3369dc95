"""The weight of each adapter, and of each of its modules, in a merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..adapter import Adapter, is_text_encoder
from ..errors import MergeError, name_some
from ..layers.parts import PARTS_TEXT, layers_matching, unknown_terms


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a merge; lists are in the order of its adapters.

    Args:
        model: Weight of each adapter.
        text_encoder: Weight of its text encoder modules.
        modules: Weight of each of its layers, by name: of those with a low-rank update or a diff.
        used: Whether the adapter takes part in the merge: one without any layer does if it has a weight.
    """

    model: tuple[float, ...]
    text_encoder: tuple[float, ...]
    modules: tuple[Mapping[str, float], ...]
    used: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None,
        text_encoder_weights: Sequence[float] | None,
        module_weights: Sequence[Mapping[str, float]] | None,
        normalize: bool,
    ) -> Weights:
        """Check the weights of a merge and apply the patterns, see `merge`.

        Raises:
            MergeError: Weights that do not fit the adapters, a pattern that matches nothing, a value that is not
                finite, or no weight other than 0.
        """
        model = _checked(adapters, weights, normalize)
        text_encoder = model if text_encoder_weights is None else _checked(adapters, text_encoder_weights, normalize)
        patterns = module_weights or [{}] * len(adapters)
        if len(patterns) != len(adapters):
            raise MergeError(
                "Every LoRA needs one table of module weights.", expected=len(adapters), found=len(patterns)
            )
        modules = tuple(map(_layer_weights, adapters, model, text_encoder, patterns))
        used = tuple(
            any(values.values()) if values else bool(weight or te_weight)
            for values, weight, te_weight in zip(modules, model, text_encoder, strict=True)
        )
        if not any(used):
            raise MergeError(
                "No module is left to merge: every weight is 0.",
                remedy="give at least one LoRA a weight; rules for layers (--only, module weights) may leave out all "
                "of its modules, which `legomole inspect --modules` lists",
            )
        return cls(model, text_encoder, modules, used)

    def scaled(self, factors: Sequence[float]) -> Weights:
        """The weights times a factor per adapter."""
        return Weights(
            tuple(weight * factor for weight, factor in zip(self.model, factors, strict=True)),
            tuple(weight * factor for weight, factor in zip(self.text_encoder, factors, strict=True)),
            tuple(
                {name: weight * factor for name, weight in table.items()}
                for table, factor in zip(self.modules, factors, strict=True)
            ),
            self.used,
        )

    def notes(self, adapters: Sequence[Adapter]) -> Iterator[str]:
        """Sentences for the report on adapters that are left out, in whole or in part."""
        for i, adapter in enumerate(adapters):
            zeros = [name for name, value in self.modules[i].items() if value == 0]
            if not self.used[i]:
                yield f"{adapter.label} has weight 0 and was left out"
            elif zeros:
                yield f"{len(zeros)} modules of {adapter.label} have weight 0 and were left out: {name_some(zeros)}"
            te_weight = self.text_encoder[i]
            if self.used[i] and te_weight != self.model[i] and any(map(is_text_encoder, adapter.modules)):
                yield f"{adapter.label} has weight {te_weight:g} in the text encoders"


def adapters_matching(pattern: str, adapters: Sequence[Adapter]) -> list[int]:
    """Positions of the adapters that have a layer which a pattern matches: those a rule for all LoRAs applies to."""
    return [i for i, adapter in enumerate(adapters) if layers_matching(pattern, adapter.layers)]


def _checked(adapters: Sequence[Adapter], weights: Sequence[float] | None, normalize: bool) -> tuple[float, ...]:
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(adapters):
        raise MergeError("Every LoRA needs one weight.", expected=len(adapters), found=len(weights))
    for adapter, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight):
            raise MergeError(
                "A weight is not a finite number.", file=adapter.source.path or None, expected="e.g. 0.8", found=weight
            )
    total = sum(map(abs, weights)) or 1.0
    return tuple(weight / total for weight in weights) if normalize else tuple(weights)


def _layer_weights(
    adapter: Adapter, weight: float, te_weight: float, patterns: Mapping[str, float]
) -> dict[str, float]:
    """Weight of every layer of an adapter. A pattern that matches nothing is an error, not a no-op."""
    values = {name: te_weight if is_text_encoder(name) else weight for name in adapter.layers}
    for pattern, factor in patterns.items():
        if not math.isfinite(factor):
            raise MergeError("A module weight is not a finite number.", module=pattern, found=factor)
        # a negated pattern may match nothing: then the adapter has only layers that it excepts
        for name in matched_layers(adapter, pattern, may_be_none=pattern.startswith("!")):
            values[name] *= factor
    return values


def matched_layers(adapter: Adapter, pattern: str, *, may_be_none: bool = False) -> list[str]:
    """The layers of an adapter that a pattern matches, see `layers_matching`.

    Raises:
        MergeError: A term matches nothing, or the whole pattern unless it `may_be_none`.
    """
    names = list(adapter.layers)
    matched, unknown = layers_matching(pattern, names), unknown_terms(pattern, names)
    if unknown or not (matched or may_be_none):
        raise MergeError(
            "A module pattern matches nothing.",
            file=adapter.source.path or None,
            expected=f"a pattern of names like {name_some(names, 3)}, or a part: {PARTS_TEXT}",
            found=", ".join(unknown) or pattern,
            remedy="list the module names with `legomole inspect --modules`",
        )
    return matched
