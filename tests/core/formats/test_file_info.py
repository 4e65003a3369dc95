"""What files say about themselves, in the words of different trainers, and of untrusted files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from legomole.core.errors import FormatError
from legomole.core.formats.file_info import FileInfo, file_info, read_file_info
from safetensors.torch import save_file

PICTURE = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sd-xl-v1-base"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd-v1"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux-1-dev"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
        ({"modelspec.architecture": "something/new"}, "something/new"),
        ({}, ""),
    ],
)
def test_base_models_are_named_in_the_words_of_the_file(metadata: dict[str, str], base: str) -> None:
    assert file_info(metadata).base == base


def test_trigger_words_come_before_tags() -> None:
    tags = json.dumps({"10_ember": {"ember": 20, "fire": 7, "1girl": 20}, "2_more": {"fire": 15, "a": 1, "b": 4}})
    # fire 22, ember 20, 1girl 20, then b 4 and a 1, which only some images have
    assert file_info({"ss_tag_frequency": tags}).words == ("fire", "ember")
    metadata = {"ss_tag_frequency": tags, "modelspec.trigger_phrase": " ember style, ,burning,ember style"}
    assert file_info(metadata).words == ("ember style", "burning")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"ss_tag_frequency": '{"1_p3r5on": {"p3r5on": 1}}'}, ("p3r5on",)),  # as ai-toolkit writes it
        ({"ss_trigger_words": "ohwx man, ohwx"}, ("ohwx man", "ohwx")),
        ({"trigger_words": '["ohwx man", "ohwx"]'}, ("ohwx man", "ohwx")),
        ({"trigger_words": "[ohwx"}, ("[ohwx",)),
        ({"modelspec.trigger_phrase": "ohwx", "ss_trigger_words": "ohwx, man"}, ("ohwx", "man")),
        ({"ss_tag_frequency": '{"1_a": {"1girl": 9, "solo": 9}}'}, ()),
        ({"trigger_words": "7"}, ("7",)),
    ],
)
def test_trigger_words_of_several_trainers(metadata: dict[str, str], words: tuple[str, ...]) -> None:
    assert file_info(metadata).words == words


@pytest.mark.parametrize(
    "tags", ["{", "[1]", '{"a": 1}', '{"a": {"b": "x"}}', '{"a": {"b": [1]}}', "[" * 100_000, '{"a": {"b": 1e999}}']
)
def test_malformed_tags_are_ignored(tags: str) -> None:
    assert file_info({"ss_tag_frequency": tags}).words == ()


@pytest.mark.parametrize(
    "thumbnail",
    [
        "https://example.org/a.png",
        "data:text/html;base64,PGI+",
        "data:image/svg+xml;base64,PGI+",
        PICTURE + '" onerror="x',
        PICTURE + "A" * 500_000,
    ],
)
def test_only_small_embedded_thumbnails_are_shown(thumbnail: str) -> None:
    assert file_info({"modelspec.thumbnail": PICTURE}).thumbnail == PICTURE
    assert file_info({"modelspec.thumbnail": thumbnail}).thumbnail == ""


def test_long_texts_are_shortened() -> None:
    info = file_info(
        {"modelspec.title": "x" * 999, "modelspec.trigger_phrase": "y" * 999, "ss_base_model_version": "z" * 999}
    )
    assert info == FileInfo("x" * 200, "z" * 200, ("y" * 200,), "")


def test_read_file_info(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"modelspec.title": "A", "modelspec.thumbnail": PICTURE})
    assert read_file_info(file) == FileInfo("A", "", (), PICTURE)
    file.write_bytes(b"no")
    with pytest.raises(FormatError):
        read_file_info(file)
