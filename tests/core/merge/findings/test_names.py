"""Findings in names and metadata."""

from __future__ import annotations

from dataclasses import replace

import pytest
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import MergeError
from legomole.core.merge.findings.names import (
    different_bases,
    refuse_noise_halves,
    sliders,
    speed_up_word,
    speed_ups,
    wan_noise_halves,
)

from .hand_made import adapter, found, part


def lora(path: str, **metadata: str) -> Adapter:
    return Adapter({}, source=Source(path), metadata=metadata)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("sdxl_lightning_4step_lora.safetensors", "lightning"),
        ("Hyper-SDXL-8steps-lora.safetensors", "hyper-sdxl"),
        ("Hyper-FLUX.1-dev-8steps-lora.safetensors", "hyper-flux"),
        ("loras/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", "lcm"),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "dmd2"),
        ("sd_xl_turbo_lora_v1.safetensors", "turbo"),
        ("FLUX.1-Turbo-Alpha.safetensors", "turbo"),
        ("Qwen-Image-Lightning-8steps-V1.0.safetensors", "lightning"),
        ("Wan2.1_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors", "lightx2v"),
        ("turbo.safetensors", "turbo"),
    ],
)
def test_speed_ups(path: str, word: str):
    assert speed_up_word(lora(path)) == word
    (finding,) = speed_ups([lora("style.safetensors"), lora(path)])
    assert "concat" in finding.remedy
    assert finding.level == "note"


@pytest.mark.parametrize(
    "path",
    [
        "lightning_bolt.safetensors",
        "hyperrealism_sdxl.safetensors",
        "turbocharged_car.safetensors",
        "my_style_z_image_turbo.safetensors",
        "lcmlike.safetensors",
        "admd2x.safetensors",
    ],
)
def test_subjects_that_sound_alike(path: str):
    assert speed_up_word(lora(path)) == ""


def test_a_title_in_the_metadata_counts():
    assert speed_up_word(lora("x.safetensors", **{"modelspec.title": "LCM LoRA"})) == "lcm"
    assert speed_up_word(lora("x.safetensors", ss_output_name="portrait")) == ""


def test_sliders():
    assert [f.loras for f in sliders([lora("age_slider_v2.safetensors"), lora("backslidersong.safetensors")])] == [
        ("age_slider_v2",)
    ]


@pytest.mark.parametrize(
    ("high", "low"),
    [("wan22_style_high_noise", "wan22_style_low_noise"), ("WAN2.2-HIGH-cat", "Wan2.2-low-cat"), ("a_HN", "a_LN")],
)
def test_halves_of_wan(high: str, low: str):
    pair = [lora(f"{name}.safetensors") for name in (high, low)]
    (finding,) = wan_noise_halves(pair)
    assert finding.loras == (high, low)
    assert finding.level == "fault"
    with pytest.raises(MergeError, match="high and the low noise half"):
        refuse_noise_halves(pair)


@pytest.mark.parametrize(
    ("one", "other"),
    [("wan_high_noise_a", "wan_high_noise_b"), ("high_key_photo", "low_key_photo"), ("wan22_a", "wan22_low_b")],
)
def test_not_halves_of_wan(one: str, other: str):
    assert [*wan_noise_halves([lora(f"{name}.safetensors") for name in (one, other)])] == []
    refuse_noise_halves([lora(f"{name}.safetensors") for name in (one, other)])


def test_different_bases():
    a = lora("a.safetensors", ss_base_model_version="sdxl_base_v1-0")
    b = lora("b.safetensors", **{"modelspec.architecture": "flux-1-dev/lora"})
    (finding,) = different_bases([a, b])
    assert finding.loras == ("a", "b")
    assert "a for SDXL, b for FLUX.1" in finding.text


def test_one_base_in_two_spellings():
    a = lora("a.safetensors", ss_base_model_version="sdxl_base_v1-0")
    b = lora("b.safetensors", **{"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    assert [*different_bases([a, b, lora("c.safetensors")])] == []


def test_unknown_bases_differ_by_name_and_not_by_folder():
    a, b, c = (
        lora(f"{i}.safetensors", **{"modelspec.architecture": name}) for i, name in enumerate(("x/m", "y/m", "n"))
    )
    assert [*different_bases([a, b])] == []
    assert len([*different_bases([a, c])]) == 1


def test_a_merge_reports_them_for_loras_with_a_weight():
    slow, fast = adapter("style", part(1)), adapter("lcm-lora", part(1, first=4))
    assert [f.loras for f in found("speed_up", [slow, fast])] == [("lcm-lora",)]
    assert found("speed_up", [slow, fast], [1, 0]) == []
    assert found("speed_up", [slow, replace(fast, source=Source("other.safetensors"))]) == []
