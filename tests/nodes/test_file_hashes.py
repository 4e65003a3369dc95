"""Hashes that are computed beside a merge belong to the files that were merged."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole.core.errors import FormatError
from legomole.core.formats import hashes
from legomole.core.merge.methods import METHODS
from legomole.nodes import file_hashes
from legomole.nodes.graph_lora import GraphLora
from legomole.nodes.loaded_loras import read_files
from legomole.nodes.merge.recorded import merge_loaded
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which hashes are kept, empty at first."""
    monkeypatch.setattr(file_hashes, "_kept", hashes.KeptHashes())
    return tmp_path / "hashes.json"


@pytest.fixture
def loras(tmp_path: Path) -> list[GraphLora]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for value, path in enumerate(paths, 1):
        factors = {"x.lora_A.weight": torch.full((2, 4), value), "x.lora_B.weight": torch.full((3, 2), value)}
        save_file({f"diffusion_model.{key}": tensor.float() for key, tensor in factors.items()}, path)
    return [GraphLora(path, path.stem) for path in paths]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hashes are computed when this event is set."""
    event, compute = threading.Event(), hashes.sha256

    def late(*paths: Path) -> str:
        assert event.wait(60)
        return compute(*paths)

    monkeypatch.setattr(hashes, "sha256", late)
    yield event
    event.set()


def sha256(lora: GraphLora) -> str:
    assert isinstance(lora.content, Path)
    return hashlib.sha256(lora.content.read_bytes()).hexdigest()


def test_loras_are_loaded_before_their_hashes_are_known(loras: list[GraphLora], hold: threading.Event) -> None:
    loaded = read_files(loras)
    assert [adapter.source.sha256 for adapter in (*loaded.adapters, *loaded.originals)] == [""] * 4
    hold.set()
    hashed = loaded.hashed()
    wanted = [sha256(lora) for lora in loras]
    assert [adapter.source.sha256 for adapter in (*hashed.adapters, *hashed.originals)] == wanted * 2
    assert hashed.cache is loaded.cache
    assert hashed.hashed() is hashed


def test_a_merge_has_the_hashes_in_its_recipe(loras: list[GraphLora]) -> None:
    merged, _ = merge_loaded(loras, read_files(loras), METHODS["concat"]())
    assert merged.recipe is not None
    assert [entry.sha256 for entry in merged.recipe.inputs] == [sha256(lora) for lora in loras]


def test_a_file_that_changes_before_it_is_hashed_is_an_error(loras: list[GraphLora], hold: threading.Event) -> None:
    """The hash would not be that of the loaded values."""
    loaded = read_files(loras)
    content: Any = loras[1].content
    content.write_bytes(content.read_bytes() + b" ")
    hold.set()
    with pytest.raises(FormatError, match="changed while it was read"):
        loaded.hashed()


def test_hashes_are_kept_in_the_file(loras: list[GraphLora], kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_SETTLED", -(10**12))  # the files were written just now
    file_hashes.keep_in(kept)
    content: Any = loras[0].content
    assert file_hashes.sha256_of(content) == sha256(loras[0]) == hashes.KeptHashes(kept).find(content)


def test_values_that_are_not_finite_are_found_by_the_merge(tmp_path: Path) -> None:
    factors = {"x.lora_A.weight": torch.full((2, 4), torch.nan), "x.lora_B.weight": torch.ones(3, 2)}
    save_file({f"diffusion_model.{key}": tensor for key, tensor in factors.items()}, tmp_path / "broken.safetensors")
    lora = GraphLora(tmp_path / "broken.safetensors", "broken")
    with pytest.raises(FormatError, match="NaN or infinite"):
        merge_loaded([lora], read_files([lora]), METHODS["concat"]())
