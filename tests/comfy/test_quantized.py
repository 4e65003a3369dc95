"""Quantised and offloaded models, and those of other packs' loaders; see quantized.py, which ComfyUI's Python runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.comfy

ROUNDING = 3e-5  # relative to the largest change of the latent by the LoRAs
# On a CPU ComfyUI dequantises the weights of these formats, and multiplies in the dtype of the activations.
EXACT = ("float8_e4m3fn", "mxfp8", "nvfp4")
# ComfyUI also quantises the inputs of layers of these.
ROUNDED_INPUTS = ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")


@pytest.fixture(scope="module")
def measured(measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    cases = (*EXACT, *ROUNDED_INPUTS, "offloaded", "weight_dtype fp8", "packed", "without weights")
    return measure("quantized.py", *cases)


@pytest.mark.parametrize("format", [*EXACT, *ROUNDED_INPUTS])
def test_mix_is_as_exact_as_the_model(measured: dict[str, Any], format: str) -> None:
    """Compared with loaders on the dequantised weights. On the quantised ones loaders round what they patch."""
    case = measured[format]
    assert case["quantised layers"] == 13
    assert case["mix"] < (ROUNDING if format in EXACT else 2 * case["base"])
    assert case["mix"] < 0.8 * case["stock"]
    assert case["base after"] == case["base"]


@pytest.mark.parametrize("format", [*EXACT, *ROUNDED_INPUTS])
def test_apply_is_the_stock_loader(measured: dict[str, Any], format: str) -> None:
    assert measured[format]["apply"] == 0


@pytest.mark.parametrize("format", [*EXACT, *ROUNDED_INPUTS])
def test_loras_are_read_as_for_the_dequantised_model(measured: dict[str, Any], format: str) -> None:
    """Also a DoRA, whose update depends on the weights."""
    assert measured[format]["read flux_kohya"] == 0
    assert measured[format]["read dora"] < 1e-6


@pytest.mark.parametrize("format", [*EXACT, *ROUNDED_INPUTS])
def test_calibration_and_training(measured: dict[str, Any], format: str) -> None:
    """Training dequantises the formats whose kernels have no backward pass."""
    case = measured[format]
    assert case["statistics"] < (1e-6 if format in EXACT else case["base"])
    assert case["losses"] < 1e-6
    assert case["gates"] < 1e-4


def test_offloaded_weights(measured: dict[str, Any]) -> None:
    case = measured["offloaded"]
    assert case["offloaded layers"] > 20
    assert case["mix"] < ROUNDING
    assert case["mix after a loader"] < ROUNDING
    assert case["statistics"] < 1e-6
    assert case["base"] == 0


def test_weights_cast_to_fp8_by_the_loader(measured: dict[str, Any]) -> None:
    case = measured["weight_dtype fp8"]
    assert case["mix"] < ROUNDING
    assert case["statistics"] < 1e-6
    assert case["loss"] < 1e-6


def test_layers_of_another_pack_that_unpack_their_weights(measured: dict[str, Any]) -> None:
    """As those of ComfyUI-GGUF; what cannot be done is said."""
    case = measured["packed"]
    assert case["mix"] < ROUNDING
    assert case["read"] == 0
    assert case["statistics"] < 1e-5
    assert "only another pack can unpack those" in case["dora"]
    assert "This model cannot be copied for training." in case["training"]


def test_layers_without_weights_are_refused(measured: dict[str, Any]) -> None:
    """As those of Nunchaku."""
    case = measured["without weights"]
    assert "use the LoRA loader of the pack that loaded the model" in case["mix"]
    assert "use the LoRA loader of the pack that loaded the model" in case["apply"]


@pytest.mark.slow  # compiling takes ten seconds for each format; test_mixing.py compiles a model that is not quantised
def test_torch_compile(measure: Callable[..., dict[str, Any]]) -> None:
    compiled = measure("quantized.py", "compiled")["compiled"]
    assert len(compiled) == 3
    assert all(value < ROUNDING for value in compiled.values())
