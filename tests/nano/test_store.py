"""Weights in a folder, and the quality of the shipped ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from legomole.core.formats import load
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.nano.comfyui import CONCEPTS
from legomole.nano.model import Prompts, short_prompts
from legomole.nano.oracle import Verdict, judge
from legomole.nano.sampling import sample
from legomole.nano.store import FOLDER, Store
from legomole.nano.words import SUBJECTS, prompt


def test_models_have_the_weights_of_the_files_in_float32_and_are_frozen(store):
    for name, module in {"base": store.transformer, "vae": store.vae, "oracle": store.oracle}.items():
        file = load_file(store.folder / f"{name}.safetensors")
        state = module.state_dict()
        assert all(torch.equal(state[key].float(), w.float()) for key, w in file.items())
        assert {w.dtype for w in module.parameters()} == {torch.float32}
        assert not any(w.requires_grad for w in module.parameters())
        assert not module.training
    assert store.transformer is store.transformer


def test_pictures_are_decoded_and_clamped(store):
    latents = 3 * torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = store.vae.decoder(latents)
    found = store.pictures(latents, batch=2)
    assert raw.abs().max() > 1
    torch.testing.assert_close(found, raw.clamp(-1, 1))


# ---- the shipped weights


@pytest.fixture(scope="module")
def shipped() -> Store:
    return Store()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(short=True)


def judged(store: Store, prompts: Prompts, wanted: list[tuple[str, str]]) -> Verdict:
    with short_prompts(store.transformer):
        latents = sample(store.transformer, prompts, [prompt(*pair) for pair in wanted], 0)
    return judge(store.oracle, store.pictures(latents), wanted)


def test_the_weights_are_a_small_download():
    assert 9e6 < sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 15e6


KNOWN = [("star", "blueprint"), ("moon", "night"), ("mushroom", "flat"), ("tree", "pastel"), ("ring", "dots"),
         ("arrow", "neon"), ("flower", "stripes"), ("diamond", "checker")]  # fmt: skip


def test_the_base_model_follows_its_prompts(shipped, prompts):
    assert judged(shipped, prompts, KNOWN).both.sum() >= 7


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_lora_adds_its_concept_to_the_base_model(shipped, prompts, concept):
    wanted = [(concept, style) if concept in SUBJECTS else (subject, concept) for subject, style in KNOWN]

    def right() -> int:
        verdict = judged(shipped, prompts, wanted)
        return int((verdict.subject if concept in SUBJECTS else verdict.style).sum())

    with attach(shipped.transformer, Mixture((load(shipped.lora(concept)),))):
        assert right() >= 4
    assert right() <= 1
