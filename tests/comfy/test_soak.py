"""A soak of seconds; ``python -m benchmarks.reliability soak`` is one of hundreds of prompts against fresh servers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .server import Server

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks.reliability import prompts, soak  # noqa: E402

pytestmark = pytest.mark.comfy

NUMBERS = (0, 3, 6, 7, 9, 11)  # plain; a file that changes, applied and mixed; a mix by weights, by outputs, in regions


def test_pictures_do_not_depend_on_what_came_before(comfy: Server, files: dict[str, str]) -> None:
    """Forwards, with a wrong prompt between, and backwards after ComfyUI has dropped all that it holds."""
    prompts.write_files(comfy.base)
    found = soak.SoakResults()
    soak.queue_images(comfy, NUMBERS[:2], found)
    soak.refuse(comfy, prompts.refused(1), found)
    soak.queue_images(comfy, NUMBERS[2:], found)
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    for number in reversed(NUMBERS):
        soak.compare(number, soak.sample(comfy, prompts.picture(number)), found)
    assert found.defects == []
    assert found.compared == len(NUMBERS)
    assert len({*map(tuple, found.pictures.values())}) == len(NUMBERS)  # and they are not all one picture
    assert len(found.memory) == len(NUMBERS) + 1

    soak.compare(NUMBERS[0], "another", found)
    assert len(found.defects) == 1
