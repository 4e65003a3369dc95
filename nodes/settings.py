"""The settings of merge methods as widgets, read from their dataclasses, and rules for layer weights."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..core.errors import MergeError
from ..core.fields import Converted
from ..core.merge.methods import MergeMethod
from ..core.merge.statistics import Statistics
from ..core.recipes.method_settings import build_method

AUTO, ON, OFF = "auto", "on", "off"

RANK_HELP = (
    "Rank of the result: a number (16), a multiple of the LoRAs' mean rank (1x, 1.5x), or the share of their sum's "
    "energy to keep, with a rank per layer (95%). auto is 95%."
)
# Field of a method -> tooltip.
_TOOLTIPS = {
    "rank": RANK_HELP,
    "geometry": "How units are compared. rank-one: by their effect on the model; best for most. paper: by their raw "
    "factors, as published.",
    "centroid": "What replaces the units of a cluster: their mean (as published) or their sum. auto: sum for rank-one, "
    "mean for paper.",
    "parameter_reweight": "Scale each merged unit to the mean size of its cluster, because averaging shrinks it. auto: "
    "on for paper, off for rank-one.",
    "output_reweight": "Scale the result by sqrt(mean rank of the LoRAs / merged rank). auto: on for paper, off for "
    "rank-one.",
    "norm": "The size that parameter_reweight uses: the largest entry (inf) or the length (l2).",
    "starts": "Random starts of the clustering, besides the deterministic one. They rarely improve it.",
    "seed": "Random seed. The same seed gives the same file.",
    "density": "Share of each LoRA's entries to keep; 1 keeps all.",
    "lam": "How much it matters to change little where a prompt asks for none of the LoRAs. 0 ignores it.",
    "mu": "calibrated: how much prompts that ask for several LoRAs matter. np: how much the other LoRAs are kept away "
    "from the protected one. 0: not at all.",
    "joint_scale": "Factor on the LoRAs' sum for prompts that ask for several of them.",
    "protect": "Number of the LoRA to protect, in their order: the others are kept away from its input directions.",
    "sign_election": "Which sign is kept where LoRAs disagree: that of their sum (total), or the most frequent one.",
}


@dataclass(frozen=True)
class Setting:
    """A setting of a merge method as a widget.

    Args:
        name: Name of the field and of the widget.
        kind: ``rank``, ``choice``, ``share`` (0 .. 1), ``number`` (0 or more) or ``integer``.
        default: Default value of the widget.
        choices: The options of a ``choice``.
    """

    name: str
    kind: Literal["rank", "choice", "share", "number", "integer"]
    default: Any
    choices: tuple[str, ...] = ()

    @property
    def tooltip(self) -> str:
        return _TOOLTIPS[self.name]


def works_without_statistics(method: type[MergeMethod]) -> bool:
    """Return whether a method can be used without statistics, so that widgets alone can set it up."""
    fields = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    return "statistics" not in fields or fields["statistics"].default is None


def settings_of(method: type[MergeMethod]) -> list[Setting]:
    """Return a method's settings. An optional field gets the choice ``auto``. Statistics have a socket instead."""
    hints = get_type_hints(method)
    return [
        _setting(field, hints[field.name])
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
        if field.name != "statistics"
    ]


def _setting(field: dataclasses.Field[Any], hint: Any) -> Setting:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional, hint = type(None) in options, options[0]
    if get_origin(hint) is Converted:
        return Setting(field.name, "rank", str(field.default))
    if hint is int or hint is float:
        kind = "integer" if hint is int else "share" if field.name == "density" else "number"
        return Setting(field.name, kind, field.default)
    choices = (ON, OFF) if hint is bool else tuple(get_args(hint))
    return Setting(
        field.name,
        "choice",
        AUTO if field.default is None else field.default,
        (AUTO, *choices) if optional else choices,
    )


def setting_values(method: type[MergeMethod], widgets: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the values of widgets to those of `build_method`; without ``auto``, so that the method decides."""
    values: dict[str, Any] = {}
    for setting in settings_of(method):
        value = widgets.get(setting.name, setting.default)
        if setting.choices[-2:] == (ON, OFF):
            value = {ON: True, OFF: False}.get(value, AUTO)
        if value != AUTO or setting.kind == "rank":
            values[setting.name] = value
    return values


def method_from_widgets(
    methods: Mapping[str, type[MergeMethod]],
    widgets: Mapping[str, Any],
    statistics: Statistics | None = None,
    *,
    why_none: str = "",
) -> MergeMethod:
    """Build the chosen merge method.

    Args:
        methods: Name -> method, to choose from.
        widgets: Values of the widgets: ``method``, and its settings.
        statistics: The statistics, if any.
        why_none: Why none were measured.

    Raises:
        MergeError: The method needs statistics and there are none, or it does not use any.
        RecipeError: A setting has an invalid value.
    """
    name = widgets["method"]
    values = setting_values(methods[name], widgets)
    fields = dataclasses.fields(methods[name])  # type: ignore[arg-type]
    if statistics is not None and not any(field.name == "statistics" for field in fields):
        raise MergeError(
            f"The method {name} uses no statistics.",
            remedy="choose calibrated, use LEGO Merge, or disconnect statistics",
        )
    if statistics is None and not works_without_statistics(methods[name]):
        raise MergeError(
            f"The method {name} needs statistics.",
            expected="MODEL and CLIP connected, or the statistics output of Calibrate",
            found=why_none or "nothing connected",
            remedy="connect MODEL and CLIP, and choose light or thorough for keep the base model",
        )
    return build_method(name, values if statistics is None else {**values, "statistics": statistics})
