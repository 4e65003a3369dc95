"""`legomole demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from legomole.core.formats import load
from PIL import Image

from .command import done, run, squeezed


def test_demo_paints_every_way_and_says_what_one_sees(monkeypatch):
    """Few pictures; what they show is for the benchmark. The files are there, and the merge is a LoRA."""
    pytest.importorskip("diffusers")
    from legomole.nano import demo

    monkeypatch.setattr(demo, "ROWS", {kind: pairs[:1] for kind, pairs in demo.ROWS.items()})
    monkeypatch.setattr(demo, "_EACH", 1)
    text = squeezed(done("demo", "there"))
    assert "What you see" in text
    assert {part.rank for part in load("there/lego.safetensors").modules.values()} == {4}
    with Image.open("there/demo.png") as picture:
        assert picture.width > 6 * 128
        assert len(picture.getcolors(1 << 20)) > 1000
    scores = json.loads(done("demo", "there", "--json"))["scores"]
    assert list(scores) == ["no LoRA", "heart LoRA", "ember LoRA", "sum", "LEGO", "MoLE"]
    assert all(set(row) == {"both", "subject", "style", "neither"} for row in scores.values())


def test_demo_refuses_a_file_in_the_place_of_its_folder_and_what_is_no_comfyui():
    pytest.importorskip("diffusers")
    Path("there").write_text("mine")
    assert "The demo's folder is a file" in squeezed(run("demo", "there").stderr)
    assert "not ComfyUI's folder" in squeezed(run("demo", "--comfyui", "there").stderr)
    assert Path("there").read_text() == "mine"
