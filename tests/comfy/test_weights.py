"""Patched weights, key by key, compared with the stock loader's; see weights.py, which ComfyUI's own Python runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.comfy

ROUNDING = 2e-5  # relative to the largest change of a weight: factors in float32, patching in float64


@pytest.fixture(scope="module")
def measured(measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measure("weights.py")


@pytest.mark.parametrize("pair", ["flux", "sd15", "sd3", "fused alone"])
@pytest.mark.parametrize("geometry", ["rank-one", "paper"])
def test_full_rank_lego_is_the_stock_chain(measured: dict[str, Any], pair: str, geometry: str) -> None:
    """k = P without reweighting: two LoRAs of different ranks and dialects, strengths 0.7 and -1.3, nothing dropped."""
    assert measured[pair][geometry] < ROUNDING
    assert measured[pair]["dropped"] == []


def test_full_rank_lego_is_the_stock_chain_in_the_text_encoder(measured: dict[str, Any]) -> None:
    assert measured["sd15"]["rank-one text encoder"] < ROUNDING


def test_fused_layers_are_split_only_if_another_lora_splits_them(measured: dict[str, Any]) -> None:
    qkv, q = "diffusion_model.double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_q"
    assert qkv in measured["fused alone"]["modules"]
    assert q in measured["flux"]["modules"]
    assert qkv not in measured["flux"]["modules"]


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora", "full", "glora", "oft", "boft"])
def test_other_adapters_at_full_rank_equal_comfyuis_own(measured: dict[str, Any], kind: str) -> None:
    assert measured[kind]["difference"] < ROUNDING
    assert "100.0%" in measured[kind]["notes"][0]


def test_full_differences_are_summed_with_their_strengths(measured: dict[str, Any]) -> None:
    case = measured["summed differences"]
    assert case["difference"] < ROUNDING
    assert len(case["diffs"]) == 2
    assert not case["notes"]


def test_every_key_is_merged_passed_on_or_listed(measured: dict[str, Any]) -> None:
    case = measured["everything"]
    assert case["difference"] < ROUNDING
    assert case["keys"] == [
        "diffusion_model.final_layer.linear.weight",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.bias",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    ]
    unknown, text = sorted(case["dropped"])
    assert unknown.startswith("diffusion_model.no_such_layer.lora_up.weight of trained: the model has no such layer")
    assert text.startswith("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight of trained: it belongs to a")


def test_value_set_for_some_rows_is_set_for_those_rows(measured: dict[str, Any]) -> None:
    assert measured["replaced rows"]["difference"] < ROUNDING


def test_rows_without_a_name_are_fused_into_their_layer(measured: dict[str, Any]) -> None:
    assert measured["unnamed rows"]["difference"] < ROUNDING
    assert "diffusion_model.single_blocks.0.linear1" in measured["unnamed rows"]["modules"]


def test_update_of_a_dora_is_computed_from_the_unpatched_model(measured: dict[str, Any]) -> None:
    assert measured["patched base"]["difference"] < ROUNDING
