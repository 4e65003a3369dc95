"""A short soak test. ``python -m benchmarks.reliability soak`` runs hundreds of prompts against fresh servers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .server import Server

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # benchmarks are not part of the package; appended, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks.reliability import prompts, soak  # noqa: E402

pytestmark = pytest.mark.comfy

NUMBERS = (0, 3, 6, 7, 9, 11)  # no LoRA; a file that changes, applied and mixed; mixes by delta, by output, in regions


def test_images_do_not_depend_on_earlier_prompts(comfy: Server, files: dict[str, str]) -> None:
    """In order, with a failing prompt in between, and in reverse order after ComfyUI has unloaded everything."""
    prompts.write_files(comfy.base)
    run = soak.SoakResults()
    soak.queue_images(comfy, NUMBERS[:2], run)
    soak.refuse(comfy, prompts.refused(1), run)
    soak.queue_images(comfy, NUMBERS[2:], run)
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    for number in reversed(NUMBERS):
        soak.compare(number, soak.sample(comfy, prompts.picture(number)), run)
    assert run.defects == []
    assert run.compared == len(NUMBERS)
    assert len({*map(tuple, run.pictures.values())}) == len(NUMBERS)  # the images do differ
    assert len(run.memory) == len(NUMBERS) + 1

    soak.compare(NUMBERS[0], "another", run)
    assert len(run.defects) == 1
