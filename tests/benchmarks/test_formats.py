"""Merges, conversions and compressions between dialects of all families, read by a real ComfyUI and by diffusers."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from legomole.benchmarks.formats.cases import Case, merge_all, read_by_comfyui, read_by_diffusers
from legomole.benchmarks.formats.models import MODELS
from legomole.core.layers.families import FAMILIES

from ..comfy.server import find

SHARE = 4  # one case of so many; python -m benchmarks.formats makes all of them


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("formats")
    return [
        case
        for family in FAMILIES
        for case in merge_all(
            family,
            folder,
            every_pair=False,
            only=lambda what, family=family: zlib.crc32(f"{family.name} {what}".encode()) % SHARE == 0,
        )
    ]


def test_every_family_has_a_model() -> None:
    assert {family.name for family in FAMILIES} == MODELS.keys()


def test_only_what_fits_two_families_is_refused(cases: list[Case]) -> None:
    refused = [f"{case.what}: {case.refused}" for case in cases if case.refused]
    assert all(text.startswith("convert for diffusers: transformer. original_only: ") for text in refused), refused
    assert len(cases) > 300


def test_comfyui_reads_the_sum(cases: list[Case], tmp_path: Path) -> None:
    found = find()
    if isinstance(found, str):
        pytest.skip(found)
    assert (
        read_by_comfyui([case for case in cases if case.reader == "comfy" and not case.refused], tmp_path, *found) == []
    )


def test_diffusers_reads_what_is_for_it(cases: list[Case]) -> None:
    pytest.importorskip("diffusers")
    assert read_by_diffusers([case for case in cases if case.reader == "diffusers" and not case.refused]) == []
