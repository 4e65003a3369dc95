"""The dialog of a row of LoRA List, in the real page and in both renderers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from ..comfy.server import Server
from .browser import sent
from .conftest import DOT, HOSTILE
from .test_lora_list import LIST, add, names

pytestmark = [pytest.mark.comfy, pytest.mark.page]


def test_information_about_a_file(board: Any, renderer: str, comfy: Server) -> None:
    """It comes from the file's metadata and the files beside it, and is shown as text."""
    add(board, "ember", "moon")
    file = comfy.loras / "widget_moon.safetensors"
    known = {
        0: {
            "File": "widget_ember.safetensors",
            "Base model": "flux1",
            "Made with": "sd-scripts",
            "Trigger words": "ember styleburningember style, burning",
        },
        1: {
            "Title": HOSTILE,
            "Base model": "Pony",
            "Trigger words": "moonnightmoon, night",
            "Tags": "style",
            "Notes": "Use it\nat 0.7.",
            "SHA-256": hashlib.sha256(file.read_bytes()).hexdigest(),
        },
    }
    pictures = [DOT, "/api/legomole/lora/preview?name=widget_moon.safetensors"]
    for i, texts in known.items():
        board.locator(".lm-info").nth(i).click()
        board.wait_for_function("() => document.querySelector('.lm-dialog code')?.textContent.length === 64")
        shown = board.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll('.lm-dialog dt')].map(
                name => [name.textContent, name.nextElementSibling.textContent]))"""
        )
        assert texts.items() <= shown.items()
        assert board.locator(".lm-dialog img").get_attribute("src") == pictures[i]
        board.wait_for_function("() => document.querySelector('.lm-dialog img').naturalWidth === 1")
        board.keyboard.press("Escape")
        board.wait_for_selector(".lm-dialog", state="detached")
    assert board.title() != "owned"
    assert names(board) == "ember moon"


def test_words_of_a_row_are_written_in_its_dialog(board: Any, renderer: str) -> None:
    add(board, "ember")
    board.locator(".lm-info").first.click()
    field = board.locator(".lm-dialog input[type=text]")
    field.wait_for()
    assert field.get_attribute("placeholder") == "ember style, burning"
    field.fill(" glowing ember ")
    field.press("Tab")
    row = lambda: json.loads(sent(board, LIST)["loras"])[0]  # noqa: E731
    assert row()["words"] == "glowing ember"
    field.fill("")
    field.press("Tab")
    assert "words" not in row()
    board.keyboard.press("Escape")
    board.wait_for_selector(".lm-dialog", state="detached")
