"""The demo model in a real ComfyUI: the stock loaders read it, and it gives the same images as in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from legomole.core.formats import load
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.rank import Rank
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.nano import sampling
from legomole.nano.comfyui import SCALE, SHIFT, folded
from legomole.nano.model import Prompts
from legomole.nano.oracle import judge
from legomole.nano.store import Store

from .nano import COUNT, EMBER, HEART, SEED, TEXT, NanoGraph
from .server import Server

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("nano")]


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


@pytest.fixture
def expected(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Returns the latents that `sampling.sample` gives for ComfyUI's noise."""

    def noise(count: int, seed: int, **_: Any) -> Tensor:
        return folded(torch.randn(count, 16, 16, 16, generator=torch.Generator().manual_seed(seed)))

    monkeypatch.setattr(sampling, "noise", noise)
    prompts = Prompts()

    def run(text: str = TEXT, experts: Sequence[object] = ()) -> Tensor:
        if not experts:
            return sampling.sample(store.transformer, prompts, [text] * COUNT, SEED)
        with attach(store.transformer, Mixture(tuple(experts))):  # type: ignore[arg-type]
            return sampling.sample(store.transformer, prompts, [text] * COUNT, SEED)

    return run


def assert_alike(store: Store, sampled: tuple, latents: Tensor) -> None:
    """Assert that the latents agree, and the first image up to rounding to 8 bits."""
    picture, latent = sampled
    torch.testing.assert_close(2 * SCALE * (latent - SHIFT), latents, rtol=0, atol=2e-4)
    rgb = ((store.pictures(latents[:1])[0] + 1) * 127.5).permute(1, 2, 0)
    torch.testing.assert_close(torch.from_numpy(picture).float(), rgb, rtol=0, atol=1.01)


def test_the_model_gives_the_same_images_in_comfyui(store, sample, expected):
    text = "the mushroom, drawn in blueprint style"
    graph = NanoGraph()
    latents = expected(text)
    assert_alike(store, sample(graph, graph.sampled(text)), latents)
    assert judge(store.oracle, store.pictures(latents), [("mushroom", "blueprint")] * COUNT).both.sum() >= 3


def test_loras_on_stock_loaders_give_the_same_images(store, sample, expected):
    """The LoRAs add a subject and a style that the base model does not have."""
    graph = NanoGraph()
    model, _ = graph.stock(HEART, EMBER)
    latents = expected(experts=[load(store.lora("heart")), load(store.lora("ember"))])
    assert_alike(store, sample(graph, graph.sampled(model=model)), latents)
    with_loras, without = (
        judge(store.oracle, store.pictures(x), [("heart", "ember")] * COUNT).both.sum() for x in (latents, expected())
    )
    assert with_loras >= 2
    assert without == 0


def test_lego_merge_gives_the_same_images(store, sample, expected):
    graph = NanoGraph()
    merged = graph.lego(graph.load(HEART), graph.load(EMBER))
    ours = merge([load(store.lora("heart")), load(store.lora("ember"))], Lego(Rank.parse("1x"))).adapter
    assert_alike(store, sample(graph, graph.sampled(model=graph.apply(merged)[0])), expected(experts=[ours]))


def test_mole_mix_gives_the_same_images(store, sample, expected):
    graph = NanoGraph()
    mix = graph.mix(graph.load(HEART), graph.load(EMBER))
    assert_alike(
        store,
        sample(graph, graph.sampled(model=mix)),
        expected(experts=[load(store.lora("heart")), load(store.lora("ember"))]),
    )


def test_an_empty_latent_of_another_model_can_be_used(comfy, sample):
    graph, other = NanoGraph(), NanoGraph()
    first = sample(graph, graph.sampled())[1]
    empty = other.add("EmptyLatentImage", width=128, height=128, batch_size=COUNT)
    assert torch.equal(first, sample(other, other.sampled(empty=empty))[1])


def test_comfyui_reports_no_missing_keys(comfy: Server, nano: Path, sample):
    graph = NanoGraph()
    node = graph.sampled(model=graph.stock(HEART, EMBER)[0])
    for part in graph.nodes.values():  # files under new names are not in the cache
        for name, folder in (("unet_name", "diffusion_models"), ("clip_name", "text_encoders"), ("lora_name", "loras")):
            if name in part["inputs"]:
                file = nano / "models" / folder / part["inputs"][name]
                part["inputs"][name] = f"copy_{file.name}"
                file.with_name(f"copy_{file.name}").symlink_to(file)
    start = len(comfy.log.read_text())
    sample(graph, node)
    log = comfy.log.read_text()[start:]
    assert "model weight dtype" in log
    assert "lora key not loaded" not in log
    assert "missing" not in log
