"""Regions and steps on the tiny models, compared with runs without them; see regions.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .test_mixing import ROUNDING

pytestmark = pytest.mark.comfy

VISIBLE = 0.01  # relative to the largest change of the latent by the LoRAs

BASES = ["flux", "sd3", "sd15"]


@pytest.fixture(scope="module")
def measured(measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measure("regions.py")


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, measured: dict[str, Any]) -> dict[str, Any]:
    return measured[request.param]


def test_a_mask_of_ones_is_no_mask_bit_for_bit(base: dict[str, Any]) -> None:
    assert base["masks"]["ones"] == 0
    assert base["masks"]["nearly ones"] < ROUNDING


def test_a_mask_of_zeros_switches_the_lora_off(base: dict[str, Any]) -> None:
    assert base["masks"]["zeros"] < ROUNDING
    assert base["masks"]["all zeros"] < ROUNDING


@pytest.mark.parametrize("case", ["left", "both", "soft"])
def test_parts_of_the_picture_differ_from_all_of_it_and_from_none(base: dict[str, Any], case: str) -> None:
    assert base["masks"][case] > VISIBLE


def test_the_prompts_of_guidance_in_one_batch_and_in_two_passes(base: dict[str, Any]) -> None:
    assert base["masks"]["two passes"] < ROUNDING


def test_the_model_is_restored_and_a_run_repeated_bit_for_bit(base: dict[str, Any]) -> None:
    assert base["masks"]["base after"] == 0
    assert base["masks"]["again"] == 0


def test_one_mask_per_picture_equals_single_runs(base: dict[str, Any]) -> None:
    assert base["batch"]["single runs"] < ROUNDING
    for count in (3, 4):  # 4: as many as samples of both prompts, but not as pictures
        assert f"one mask, or 2, one per picture of the batch\n  found:    {count}" in base["batch"][f"{count} masks"]


def test_inpainting(base: dict[str, Any]) -> None:
    """Outside of the noise mask the latent is kept; inside, the region of the LoRA beside it still counts."""
    case = base["samplers"]
    assert case["inpainting keeps"] < 1e-5
    assert case["inpainting"] > VISIBLE
    assert case["inpainting beside"] > VISIBLE


def test_a_run_in_two_samplers_equals_one_run(base: dict[str, Any]) -> None:
    assert base["samplers"]["two samplers"] < ROUNDING


def test_a_second_pass_at_another_size_has_the_mask_at_that_size(base: dict[str, Any]) -> None:
    assert base["samplers"]["second pass"] < ROUNDING
    assert base["samplers"]["second pass differs"] > VISIBLE


def test_an_area_of_conditioning_gets_its_part_of_the_mask(base: dict[str, Any]) -> None:
    """The same as the area sampled as a picture of its own with the mask cropped by hand, and not with all of it."""
    assert base["samplers"]["area"] < ROUNDING
    assert base["samplers"]["area is cut"] > VISIBLE


def test_several_areas_beside_a_prompt_for_all(base: dict[str, Any]) -> None:
    case = base["areas_and_guidance"]
    assert case["areas one by one"] < ROUNDING
    assert case["areas of ones"] == 0
    assert case["areas differ"] > VISIBLE


@pytest.mark.parametrize("case", ["first half", "last half", "with a region", "of the schedule"])
def test_steps_equal_two_samplers_with_and_without_the_lora(base: dict[str, Any], case: str) -> None:
    """Percentages are of the whole schedule, also when a sampler runs its end alone."""
    assert base["steps"][case] < ROUNDING
    assert base["steps"]["differs"] > VISIBLE
    assert base["steps"]["all"] == 0


def test_parts_of_the_picture_whose_place_is_unknown_are_an_error(base: dict[str, Any]) -> None:
    case = base["tiles"]
    assert "A region cannot be laid on a part of the picture whose place is not known." in case["with"]
    assert case["without"] == ""
    assert float(case["base after"]) == 0


def test_automatic_regions_divide_the_picture_and_need_words(base: dict[str, Any]) -> None:
    """Through the hook of ComfyUI's attention, with two prompts of guidance and two pictures."""
    assert base["automatic"]["differs"] > VISIBLE
    assert "Automatic regions follow the words of the LoRAs" in base["automatic"]["no words"]


def test_regions_beside_a_controlnet(measured: dict[str, Any]) -> None:
    case = measured["sd15"]["control"]
    assert case["ones"] == 0
    assert case["zeros"] < ROUNDING
    assert case["left"] > VISIBLE
    assert case["controlled"] > VISIBLE
