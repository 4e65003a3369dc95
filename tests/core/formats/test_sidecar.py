"""Files beside a LoRA file, as other programs write them, and malformed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole.core.formats.sidecar import Sidecar, preview_image, read_sidecar, trigger_words
from safetensors.torch import save_file

# as Civitai's API answers, shortened
VERSION = {
    "name": "v1.0",
    "baseModel": "Flux.1 D",
    "trainedWords": ["ember style, burning", " glowing ", "burning"],
    "model": {"name": "Ember", "type": "LORA", "tags": ["style"]},
    "files": [{"name": "ember.safetensors", "hashes": {"SHA256": "AB12"}}],
}


def write(folder: Path, **files: Any) -> Path:
    """Write files beside ``ember.safetensors``: ``civitai_info={..}``."""
    for kind, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"ember.{kind.replace('_', '.')}").write_text(text, encoding="utf-8")
    return folder / "ember.safetensors"


def test_civitai_info(tmp_path: Path) -> None:
    assert read_sidecar(write(tmp_path, civitai_info=VERSION)) == Sidecar(
        title="Ember", base="Flux.1 D", words=("ember style", "burning", "glowing"), tags=("style",), sha256="ab12"
    )


def test_metadata_json_comes_first_and_is_completed(tmp_path: Path) -> None:
    """The user's own entries; a nested answer of Civitai gives the rest."""
    own = {"model_name": "My ember", "base_model": "", "tags": [], "notes": "at 0.8\nwith heart", "civitai": VERSION}
    assert read_sidecar(write(tmp_path, metadata_json=own, civitai_info={"trainedWords": ["other"]})) == Sidecar(
        title="My ember",
        base="Flux.1 D",
        words=("other",),
        tags=("style",),
        sha256="ab12",
        notes="at 0.8\nwith heart",
    )


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "3", '"x"', "[" * 5000, '{"trainedWords": 1, "tags": [2, {}], "model": [], "files": {}, "notes": {}}',
     '{"files": [1, {"hashes": 2}], "trainedWords": ["", " , "], "civitai": "x"}'],
)  # fmt: skip
def test_malformed_descriptions_count_as_missing(tmp_path: Path, content: str) -> None:
    assert read_sidecar(write(tmp_path, metadata_json=content, civitai_info=content)) == Sidecar()


def test_bytes_that_are_no_text_and_large_files_count_as_missing(tmp_path: Path) -> None:
    file = write(tmp_path, metadata_json=json.dumps({"notes": "x" * (4 << 20)}))
    file.with_name("ember.civitai.info").write_bytes(b"\xff\xfe\x00")
    assert read_sidecar(file) == Sidecar()


def test_preview_image(tmp_path: Path) -> None:
    file = write(tmp_path)
    assert preview_image(file) is None
    for name in ("ember.png", "ember.preview.jpeg"):  # the first name in the order of preference wins
        (tmp_path / name).touch()
        assert preview_image(file) == tmp_path / name
    dotted = tmp_path / "style.v1.safetensors"
    (tmp_path / "style.v1.preview.webp").touch()
    assert preview_image(dotted) == tmp_path / "style.v1.preview.webp"


def test_trigger_words_beside_the_file_come_first(tmp_path: Path) -> None:
    file = write(tmp_path)
    save_file({"a": torch.zeros(1)}, file, {"modelspec.trigger_phrase": "fire"})
    assert trigger_words(file) == ("fire",)
    write(tmp_path, civitai_info=VERSION)
    assert trigger_words(file) == ("ember style", "burning", "glowing")
