"""Settings of merge methods as widgets, rules for layer weights, and connected LoRAs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.merge.methods import METHODS
from legomole.core.recipes.method_settings import build_method
from legomole.nodes.graph_lora import GraphLora, connected_loras
from legomole.nodes.settings import setting_values, settings_of, works_without_statistics

WITHOUT_STATISTICS = [name for name, method in METHODS.items() if works_without_statistics(method)]


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_default_values_of_widgets_are_the_methods_defaults(name: str) -> None:
    method = METHODS[name]
    built = build_method(name, setting_values(method, {}))
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        if field.default is not dataclasses.MISSING:
            assert getattr(built, field.name) == field.default


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_every_widget_has_a_tooltip_and_offers_its_default(name: str) -> None:
    for setting in settings_of(METHODS[name]):
        assert setting.tooltip
        assert setting.kind != "choice" or setting.default in setting.choices


def test_legos_switches_are_on_off_or_auto() -> None:
    lego = METHODS["lego"]
    values = {"parameter_reweight": "on", "output_reweight": "off", "centroid": "auto", "rank": "95%"}
    built = build_method("lego", setting_values(lego, values))
    assert (built.parameter_reweight, built.output_reweight, built.centroid) == (True, False, None)  # type: ignore[attr-defined]
    assert str(built.rank) == "95%"  # type: ignore[attr-defined]


def test_auto_rank_reaches_the_method() -> None:
    assert str(build_method("svd", setting_values(METHODS["svd"], {"rank": "auto"})).rank) == "95%"  # type: ignore[attr-defined]


def test_connected_loras_are_in_socket_order_with_stacks_opened() -> None:
    """lora10 comes after lora2; a stack's entries take the place of the stack."""
    first, last = GraphLora(Path("f"), "first"), GraphLora(Path("l"), "last")
    state = {"a": torch.ones(1)}
    blank = [("None", 1.0, 1.0), (None, 1.0, 1.0), ("", 1.0, 1.0), None, ()]
    stack = [("dir/one.safetensors", 0.5, 0.25), *blank, ["two.safetensors", 1, 1]]
    values = {"lora10": last, "lora2": stack, "lora1": state, "lora0": first, "lora3": None}
    loras = connected_loras(values, lambda name: Path("/loras", name))
    assert [lora.label for lora in loras] == ["first", "lora1 (trained)", "one", "two", "last"]
    assert loras[1].content is state
    assert loras[2].content == Path("/loras/dir/one.safetensors")
    assert (loras[2].strength_model, loras[2].strength_clip) == (0.5, 0.25)


@pytest.mark.parametrize("values", [{}, {"lora0": None}, {"lora0": []}])
def test_nothing_connected_is_an_error(values: dict) -> None:
    with pytest.raises(MergeError, match="No LoRA is connected"):
        connected_loras(values, Path)


def test_something_else_is_an_error() -> None:
    with pytest.raises(MergeError, match="This is not a LoRA"):
        connected_loras({"lora0": 3}, Path)


@pytest.mark.parametrize("entry", ["one.safetensors", ("one.safetensors",), ("one.safetensors", None, 1.0), 3])
def test_stack_of_something_else_is_an_error(entry: object) -> None:
    with pytest.raises(MergeError, match=r"not an entry of a LORA_STACK(.|\n)*lora0"):
        connected_loras({"lora0": [entry]}, Path)
