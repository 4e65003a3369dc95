"""What a merge method lets the user set, read from its dataclass, and the text form of per-layer weights."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..core.adapter import Adapter
from ..core.errors import MergeError
from ..core.fields import Converted
from ..core.merge.methods import MergeMethod
from ..core.merge.statistics import Statistics
from ..core.merge.weights import adapters_matching
from ..core.recipes import recipe

AUTO, ON, OFF = "auto", "on", "off"


RANK_HELP = (
    "The merged rank: a number (16), a multiple of the inputs' rank (1x, 1.5x), a share of the energy of their sum "
    "(95%, chosen per layer), or auto (95%)."
)

# What a field of a method means to the person at the widget.
_TOOLTIPS = {
    "rank": RANK_HELP,
    "geometry": "How units are compared. rank-one: by what they do to the model, whatever the trainer's scale, sign or "
    "rotation. paper: by their raw factors, as published.",
    "centroid": "What a cluster becomes: the mean of its members (as published) or their sum. auto: sum for rank-one, "
    "mean for paper.",
    "parameter_reweight": "Rescale each merged unit to the mean size of its members, against norm decay. auto: on for "
    "paper, off for rank-one.",
    "output_reweight": "Multiply the result by sqrt(inputs' rank / merged rank), against growing variance. auto: on "
    "for paper, off for rank-one.",
    "norm": "How parameter_reweight measures size: by the largest entry (inf) or by length (l2).",
    "starts": "Random starts of the clustering beside the deterministic one. They rarely find a better one.",
    "seed": "Of the random draws. The same seed gives the same file.",
    "density": "Share of each LoRA's entries that is kept; 1 keeps all.",
    "lam": "How much leaving the base model alone counts.",
    "mu": "How much prompts that name several LoRAs count.",
    "joint_scale": "How much louder than their sum LoRAs should be where a prompt names several.",
    "sign_election": "Which sign wins where LoRAs disagree: that of their sum (total) or the most frequent one.",
}


@dataclass(frozen=True)
class Setting:
    """One widget.

    Args:
        name: Of the field, and of the widget.
        kind: ``rank``, ``choice``, ``share`` (0 .. 1), ``number`` (0 or more) or ``integer``.
        default: What the widget starts with.
        choices: For ``choice``.
    """

    name: str
    kind: Literal["rank", "choice", "share", "number", "integer"]
    default: Any
    choices: tuple[str, ...] = ()

    @property
    def tooltip(self) -> str:
        return _TOOLTIPS[self.name]


def has_widgets(method: type[MergeMethod]) -> bool:
    """Whether widgets can say all a method needs (not so for one that needs measured statistics)."""
    fields = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    return "statistics" not in fields or fields["statistics"].default is None


def settings(method: type[MergeMethod]) -> list[Setting]:
    """The method's fields as widgets; an optional field gets the choice ``auto``. Statistics come from a socket."""
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


def chosen(method: type[MergeMethod], widgets: Mapping[str, Any]) -> dict[str, Any]:
    """The widgets' values as `recipe.build_method` takes them; ``auto`` leaves the choice to the method."""
    values: dict[str, Any] = {}
    for setting in settings(method):
        value = widgets.get(setting.name, setting.default)
        if setting.choices[-2:] == (ON, OFF):
            value = {ON: True, OFF: False}.get(value, AUTO)
        if value != AUTO or setting.kind == "rank":
            values[setting.name] = value
    return values


def built(
    methods: Mapping[str, type[MergeMethod]], widgets: Mapping[str, Any], statistics: Statistics | None = None
) -> MergeMethod:
    """The method that a choice among `methods` and its settings' widgets ask for.

    Args:
        methods: To choose from. widgets: ``method``, and the settings of that one.
        statistics: What is connected, for a method that takes them.

    Raises:
        MergeError: The method needs statistics and there are none, or it cannot use any.
    """
    name = widgets["method"]
    values = chosen(methods[name], widgets)
    takes = any(field.name == "statistics" for field in dataclasses.fields(methods[name]))  # type: ignore[arg-type]
    if statistics is not None and not takes:
        raise MergeError(
            f"The method {name} takes no statistics.",
            remedy="choose calibrated, use LEGO Merge, or disconnect statistics",
        )
    if statistics is None and not has_widgets(methods[name]):
        raise MergeError(
            f"The method {name} needs statistics.",
            expected="the statistics output of Calibrate",
            found="nothing connected",
            remedy="add a Calibrate node with the same LoRAs and connect it",
        )
    return recipe.build_method(name, values if statistics is None else {**values, "statistics": statistics})


def module_weights(text: str, adapters: list[Adapter]) -> list[dict[str, float]]:
    """Read per-layer weights, one rule a line: ``*attn2* = 0.5`` for every LoRA, ``2: *attn2* = 0.5`` for the second.

    Empty lines and ``#`` comments are skipped.

    Args:
        adapters: The LoRAs. A rule without a number goes to those that have such layers.

    Raises:
        MergeError: A line that is no rule, a LoRA that is not there.
    """
    rules: list[dict[str, float]] = [{} for _ in adapters]
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(?:(\d+)\s*:\s*)?([^\s:]+?)\s*=\s*([-+.\w]+)", line)
        try:
            number, pattern, factor = match[1], match[2], float(match[3])  # type: ignore[index]
        except (TypeError, ValueError):
            raise MergeError(
                "This is not a rule for layer weights.",
                expected="lines like  *attn2* = 0.5  or  2: *attn2* = 0.5",
                found=line,
                remedy="write one rule a line: [number of the LoRA:] pattern of layer names = factor",
            ) from None
        if number is not None:
            if not 1 <= int(number) <= len(adapters):
                raise MergeError(
                    "A rule for layer weights names a LoRA that is not there.",
                    expected=f"1 .. {len(adapters)}",
                    found=line,
                )
            rules[int(number) - 1][pattern] = factor
            continue
        for i in adapters_matching(pattern, adapters) or range(
            len(adapters)
        ):  # matching nothing anywhere is the engine's error to raise
            rules[i][pattern] = factor
    return rules
