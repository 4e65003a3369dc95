"""The scale in ``lora_adapter_metadata``: applied once, noted, and not described a second time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from legomole import load, merge, save
from legomole.core.adapter import Source
from legomole.core.errors import FormatError
from legomole.core.formats import FORMATS, from_state_dict
from legomole.core.formats.lora_metadata import KEY
from safetensors import safe_open

from ... import lora_files as files

NAME = "transformer.blocks.0.to_q"


def metadata(**config: object) -> dict[str, str]:
    flat = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.target_modules": ["to_q"], **config}
    return {KEY: json.dumps(flat)}


def lora(path: Path, prefix: str = "transformer.", **config: object) -> Path:
    shapes = {f"{prefix}blocks.0.to_q": (8, 6), f"{prefix}blocks.1.to_k": (8, 6)}
    state = files.state_dict(shapes, files.PEFT, alpha=None)
    return files.write(path, state, metadata(**config))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
def test_the_scale_is_applied_and_noted(prefix: str, tmp_path: Path) -> None:
    config = {"transformer.alpha_pattern": {"to_k": 2.0}}
    adapter = load(lora(tmp_path / "style.safetensors", prefix, **config))
    assert [adapter.modules[f"{prefix}blocks.{n}"].scale for n in ("0.to_q", "1.to_k")] == [4.0, 0.5]
    assert len(adapter.notes) == 1
    assert "style: its scale, 0.5 to 4, is in lora_adapter_metadata alone" in adapter.notes[0]


def test_no_note_where_the_scale_is_1_or_in_the_tensors() -> None:
    state = files.state_dict({NAME: (8, 6)}, files.PEFT, alpha=None)
    assert not from_state_dict(state, metadata(**{"transformer.lora_alpha": 4})).notes
    with_alpha = from_state_dict({**state, f"{NAME}.alpha": torch.tensor(2.0)}, metadata())
    assert with_alpha.modules[NAME].scale == 0.5
    assert not with_alpha.notes


@pytest.mark.parametrize("format", ["comfy", "diffusers"])
def test_no_reader_applies_the_scale_twice(format: str, tmp_path: Path) -> None:
    original = load(lora(tmp_path / "a.safetensors"))
    for path in (
        save(original, tmp_path / "converted", format=format),
        save(merge([original], "concat", format=format), tmp_path / "merged"),
    ):
        with safe_open(path, "pt") as file:
            assert KEY not in file.metadata()
        again = load(path)
        assert not again.notes
        for name, part in original.modules.items():
            torch.testing.assert_close(again.modules[name].delta(), part.delta(), rtol=1e-5, atol=1e-6)


def test_the_note_is_in_the_report_of_a_merge(tmp_path: Path) -> None:
    paths = [lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", **{"transformer.lora_alpha": 4})]
    notes = merge(paths, "concat").report.notes
    assert [note for note in notes if KEY in note] == list(load(paths[0]).notes)
    assert not any(KEY in note for note in merge(paths, "concat", weights=[0, 1]).report.notes)


def test_a_configuration_that_cannot_be_read_is_an_error() -> None:
    state = files.state_dict({NAME: (8, 6)}, files.PEFT, alpha=None)
    for format in ("diffusers", "comfy"):
        with pytest.raises(FormatError, match=r"cannot be read[\s\S]*lora_adapter_metadata"):
            FORMATS[format].read(state, {KEY: "{"}, Source(), None)
