"""find(): all findings of a merge, the most severe first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ...adapter import Adapter, is_finite
from ...errors import name_some
from ..report import ModuleReport
from .examined import Examined
from .finding import Finding, most_severe_first
from .measure import LayerValues
from .names import different_bases, sliders, speed_ups, wan_noise_halves
from .pairs import contained, duplicates, opposed
from .size import loud_text_encoders, loudness
from .spectrum import dead_layers, overflows, spikes, unused_rank

_OF_VALUES = (
    *(overflows, spikes, loudness, duplicates, contained, opposed, loud_text_encoders, dead_layers, unused_rank),
)
_OF_NAMES = (wan_noise_halves, different_bases, speed_ups, sliders)


def find(
    adapters: Sequence[Adapter],
    weights: Sequence[Mapping[str, float]],
    modules: Sequence[ModuleReport],
    values: Mapping[str, LayerValues],
) -> tuple[Finding, ...]:
    """Return all findings that need no base model, the most severe first.

    Args:
        adapters: The adapters of a merge. Those without any weight are left out.
        weights: Per adapter, the weight of each module.
        modules: Reports of the merged modules.
        values: Layer -> its values.
    """
    examined = Examined(adapters, [_without_signs(module, weights) for module in modules], values)
    used = [adapter for adapter, table in zip(adapters, weights, strict=True) if any(table.values())]
    found: Iterable[Finding] = (
        *(finding for look in _OF_VALUES for finding in look(examined)),
        *(finding for look in _OF_NAMES for finding in look(used)),
    )
    return most_severe_first([*found])


def _without_signs(module: ModuleReport, weights: Sequence[Mapping[str, float]]) -> ModuleReport:
    """The report with the cosines of the LoRAs themselves, where weights are negative."""
    signs = [1.0 if weights[i][module.name] > 0 else -1.0 for i in module.adapters]
    if min(signs) > 0:
        return module
    rows = (
        tuple(a * b * c for b, c in zip(signs, row, strict=True)) for a, row in zip(signs, module.cosine, strict=True)
    )
    return replace(module, cosine=tuple(rows))


def without_broken_layers(adapters: Sequence[Adapter]) -> tuple[list[Adapter], tuple[Finding, ...]]:
    """Leave out layers with NaN or infinity, which no merge accepts, and return a finding for each LoRA with some."""
    sound: list[Adapter] = []
    found: list[Finding] = []
    for adapter in adapters:
        broken = [*_broken_layers(adapter)]
        if broken:
            modules = {name: part for name, part in adapter.modules.items() if name not in broken}
            diffs = {name: diff for name, diff in adapter.diffs.items() if is_finite(diff)}
            found.append(_not_finite(adapter, broken))
            adapter = replace(adapter, modules=modules, diffs=diffs)
        sound.append(adapter)
    return sound, tuple(found)


def _broken_layers(adapter: Adapter) -> Iterator[str]:
    for name, part in adapter.modules.items():
        if not (is_finite(part.A) and is_finite(part.B)):
            yield name
    yield from (name for name, diff in adapter.diffs.items() if not is_finite(diff))


def _not_finite(adapter: Adapter, broken: Sequence[str]) -> Finding:
    return Finding(
        "not_finite", (adapter.label,), tuple(broken), float(len(broken)), 1.0,
        f"{adapter.label} contains NaN or infinite numbers in {len(broken)} layer{'s' * (len(broken) != 1)} "
        f"({name_some(broken)}), left out here",
        "use another checkpoint: the training diverged, and a merge refuses this one",
    )  # fmt: skip
