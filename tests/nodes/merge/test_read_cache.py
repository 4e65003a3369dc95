"""The cache of loaded LoRAs, without a model; with one see tests/comfy/test_behaviour.py."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole.core.errors import FormatError
from legomole.nodes.graph_lora import GraphLora
from legomole.nodes.merge import read_cache
from legomole.nodes.merge.read_cache import read
from safetensors.torch import save_file


def write(path: Path, value: float) -> GraphLora:
    factors = {"x.lora_A.weight": torch.full((2, 4), value), "x.lora_B.weight": torch.full((3, 2), value)}
    save_file({f"diffusion_model.{key}": tensor for key, tensor in factors.items()}, path)
    return GraphLora(path, path.stem)


@pytest.fixture
def loras(tmp_path: Path) -> list[GraphLora]:
    return [write(tmp_path / f"{name}.safetensors", value) for name, value in (("one", 1.0), ("two", 2.0))]


def test_other_strengths_use_the_loaded_loras(loras: list[GraphLora]) -> None:
    first = read(loras, None, None)
    assert read([replace(lora, strength_model=0.3, strength_clip=2.0) for lora in loras], None, None) is first


@pytest.mark.parametrize("change", ["order", "fewer", "rank", "content", "time"])
def test_changed_loras_are_loaded_again(loras: list[GraphLora], change: str) -> None:
    first = read(loras, None, None)
    path = loras[1].content
    assert isinstance(path, Path)
    if change == "order":
        loras = loras[::-1]
    elif change == "fewer":
        loras = loras[:1]
    elif change == "rank":
        loras = [loras[0], replace(loras[1], convert_rank=4)]
    elif change == "content":
        write(path, 5.0)
    else:
        os.utime(path, ns=(0, 0))
    again = read(loras, None, None)
    assert again is not first
    assert again.cache is not first.cache
    if change == "content":
        assert again.adapters[1].modules["diffusion_model.x"].A[0, 0] == 5.0


def test_missing_file_has_its_own_error(loras: list[GraphLora]) -> None:
    read(loras, None, None)
    path = loras[0].content
    assert isinstance(path, Path)
    path.unlink()
    for _ in range(2):
        with pytest.raises(FormatError, match="no such file"):
            read(loras, None, None)


def test_loras_made_in_the_graph_are_distinguished() -> None:
    contents = [
        {"diffusion_model.x.lora_A.weight": torch.ones(2, 4), "diffusion_model.x.lora_B.weight": torch.ones(3, 2)}
    ]
    contents.append({key: tensor.clone() for key, tensor in contents[0].items()})
    one, two = (GraphLora(content, "trained") for content in contents)
    first = read([one], None, None)
    assert read([replace(one, strength_model=2.0)], None, None) is first
    assert read([two], None, None) is not first


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTimer]:
    """The timers of the cache, which run out when a test calls `FakeTimer.run_out`."""
    created: list[FakeTimer] = []

    def create(*arguments: Any) -> FakeTimer:
        created.append(FakeTimer(*arguments))
        return created[-1]

    monkeypatch.setattr(read_cache.threading, "Timer", create)
    return created


class FakeTimer:
    def __init__(self, seconds: float, function: Callable[..., None], arguments: list[Any]) -> None:
        self.seconds, self._function, self._arguments = seconds, function, arguments
        self.cancelled = False

    def start(self) -> None: ...

    def cancel(self) -> None:
        self.cancelled = True

    def run_out(self) -> None:
        self._function(*self._arguments)


def test_loras_that_are_not_used_for_a_while_are_dropped(loras: list[GraphLora], timers: list[FakeTimer]) -> None:
    loaded = weakref.ref(read(loras, None, None))
    gc.collect()
    assert loaded() is not None
    assert timers[-1].seconds == read_cache.EXPIRES_AFTER
    timers[-1].run_out()
    gc.collect()
    assert loaded() is None


def test_every_use_starts_the_time_again(loras: list[GraphLora], timers: list[FakeTimer]) -> None:
    first = read(loras, None, None)
    assert read(loras, None, None) is first
    assert [timer.cancelled for timer in timers] == [True, False]


def test_the_timer_of_other_loras_drops_nothing(loras: list[GraphLora], timers: list[FakeTimer]) -> None:
    """One that runs out while other LoRAs are loaded is too late to be cancelled."""
    read(loras, None, None)
    second = read(loras[::-1], None, None)
    timers[0].run_out()
    assert read(loras[::-1], None, None) is second


def test_other_loras_take_the_place_of_the_first(loras: list[GraphLora]) -> None:
    first = weakref.ref(read(loras, None, None))
    read(loras[::-1], None, None)
    gc.collect()
    assert first() is None


def test_the_time_runs_out(loras: list[GraphLora], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a real timer."""
    monkeypatch.setattr(read_cache, "EXPIRES_AFTER", 0.05)
    loaded = weakref.ref(read(loras, None, None))
    deadline = time.monotonic() + 30
    while loaded() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
        gc.collect()
    assert loaded() is None
