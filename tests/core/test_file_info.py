"""What a file says about itself, in the words of different trainers and of strangers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from legomole.core.errors import FormatError
from legomole.core.file_info import About, about, of_file
from safetensors.torch import save_file

PICTURE = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("said", "family"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD 1"),
        ({"modelspec.architecture": "stable-diffusion-3-medium/lora"}, "SD 3"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"ss_base_model_version": "sd_v1"}, "SD 1"),
        ({"ss_base_model_version": "flux1"}, "Flux"),
        ({"ss_base_model_version": "flux2"}, "Flux 2"),
        ({"modelspec.architecture": "something new"}, "something new"),
        ({}, ""),
    ],
)
def test_base_models_have_short_names(said: dict[str, str], family: str) -> None:
    assert about(said).base == family


def test_trigger_phrase_comes_before_tags() -> None:
    tags = json.dumps({"10_ember": {"ember": 20, "fire": 7}, "2_more": {"fire": 15, "a": 1, "b": 2, "c": 3, "d": 4}})
    # fire 22, ember 20, then d 4, c 3, b 2: five
    assert about({"ss_tag_frequency": tags}).words == ("fire", "ember", "d", "c", "b")
    said = {"ss_tag_frequency": tags, "modelspec.trigger_phrase": " ember style, ,burning,ember style"}
    assert about(said).words == ("ember style", "burning")


@pytest.mark.parametrize(
    "tags", ["{", "[1]", '{"a": 1}', '{"a": {"b": "x"}}', '{"a": {"b": [1]}}', "[" * 100_000, '{"a": {"b": 1e999}}']
)
def test_tags_that_are_none_say_nothing(tags: str) -> None:
    assert about({"ss_tag_frequency": tags}).words == ()


@pytest.mark.parametrize(
    "picture",
    [
        "https://example.org/a.png",
        "data:text/html;base64,PGI+",
        "data:image/svg+xml;base64,PGI+",
        PICTURE + '" onerror="x',
        PICTURE + "A" * 500_000,
    ],
)
def test_only_small_embedded_pictures_are_shown(picture: str) -> None:
    assert about({"modelspec.thumbnail": PICTURE}).thumbnail == PICTURE
    assert about({"modelspec.thumbnail": picture}).thumbnail == ""


def test_long_words_are_cut() -> None:
    found = about(
        {"modelspec.title": "x" * 999, "modelspec.trigger_phrase": "y" * 999, "ss_base_model_version": "z" * 999}
    )
    assert found == About("x" * 200, "z" * 200, ("y" * 200,), "")


def test_of_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"modelspec.title": "A", "modelspec.thumbnail": PICTURE})
    assert of_file(file) == About("A", "", (), PICTURE)
    file.write_bytes(b"no")
    with pytest.raises(FormatError):
        of_file(file)
