"""Patched weights, key by key: ours against the stock loader's. The numbers come from ComfyUI's own Python."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .server import Server

pytestmark = pytest.mark.comfy

ROUNDING = 2e-5  # of the largest change of a weight: float32 factors, float64 patching


@pytest.fixture(scope="module")
def measured(comfy: Server, files: dict[str, str]) -> dict[str, Any]:
    script = Path(__file__).with_name("weights.py")
    done = subprocess.run(
        [comfy.python, script, comfy.folder, comfy.base], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("pair", ["flux", "sd15", "sd3", "fused alone"])
@pytest.mark.parametrize("geometry", ["rank-one", "paper"])
def test_full_rank_lego_is_the_stock_chain(measured: dict[str, Any], pair: str, geometry: str) -> None:
    """k = P without reweighting: two LoRAs of other ranks and dialects, strengths 0.7 and -1.3, nothing dropped."""
    assert measured[pair][geometry] < ROUNDING
    assert measured[pair]["dropped"] == []


def test_full_rank_lego_is_the_stock_chain_in_the_text_encoder(measured: dict[str, Any]) -> None:
    assert measured["sd15"]["rank-one text encoder"] < ROUNDING


def test_fused_layers_are_cut_only_where_another_lora_splits_them(measured: dict[str, Any]) -> None:
    qkv, q = "diffusion_model.double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_q"
    assert qkv in measured["fused alone"]["modules"]
    assert q in measured["flux"]["modules"]
    assert qkv not in measured["flux"]["modules"]


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora", "full", "glora", "oft", "boft"])
def test_other_adapters_at_full_rank_are_what_comfyui_makes_of_them(measured: dict[str, Any], kind: str) -> None:
    assert measured[kind]["difference"] < ROUNDING
    assert "100.0%" in measured[kind]["notes"][0]


def test_every_key_is_merged_carried_or_named(measured: dict[str, Any]) -> None:
    found = measured["everything"]
    assert found["difference"] < ROUNDING
    assert found["keys"] == [
        "diffusion_model.final_layer.linear.weight",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.bias",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    ]
    unknown, text = sorted(found["dropped"])
    assert unknown.startswith("diffusion_model.no_such_layer.lora_up.weight of trained: the model has no such layer")
    assert text.startswith("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight of trained: it belongs to a")


def test_value_set_for_some_rows_stays_with_them(measured: dict[str, Any]) -> None:
    assert measured["replaced rows"]["difference"] < ROUNDING


def test_rows_without_a_name_are_folded_into_their_layer(measured: dict[str, Any]) -> None:
    assert measured["unnamed rows"]["difference"] < ROUNDING
    assert "diffusion_model.single_blocks.0.linear1" in measured["unnamed rows"]["modules"]


def test_dora_is_measured_against_the_unpatched_model(measured: dict[str, Any]) -> None:
    assert measured["patched base"]["difference"] < ROUNDING
