"""Run by ComfyUI's own Python: latents sampled with a mix on the model, compared with stock loaders.

Usage: mixing.py <ComfyUI> <base directory>. Prints one JSON object: case -> measurements. Saves gradients and the
inputs they were computed for in <base directory>/gradients_<base>.safetensors, for a comparison with diffusers.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from sampled import (
    BASE,
    CHANNELS,
    PAIRS,
    conditioning,
    distance,
    load,
    lora,
    mixed,
    sample,
    starting_noise,
    stock,
)

# isort: split
# the module above sets the paths that those below need
import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy.sd
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import Guider_DualCFG, Guider_DualModel
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from legomole.core.mole.attach import attach
from legomole.core.mole.bank import Bank
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.guidance import PromptGateSharing
from legomole.core.mole.recompute import exact_gradients
from legomole.core.mole.trained import Expert, TrainedGates
from legomole.nodes.comfy import mixture
from legomole.nodes.comfy.denoiser import ComfyDenoiser
from legomole.nodes.graph_lora import GraphLora
from safetensors.torch import load_file, save_file
from torch import Tensor


def replaced_forwards(model: Any) -> int:
    """Return the number of modules whose forward method is still replaced."""
    return sum("forward" in module.__dict__ for module in model.model.diffusion_model.modules())


def detector_of(base: str, experts: int, seed: int = 1) -> ConceptDetector:
    """A detector whose concepts are the first tokens of the prompt of this seed, one each."""
    tokens = conditioning(base, seed)[0][0][0, :experts]
    weight = 6 * tokens / tokens.norm(dim=1, keepdim=True) / tokens.shape[1] ** 0.5
    return ConceptDetector(weight, torch.full((experts,), -3.0), [[f"concept {i}"] for i in range(experts)])


def random_gates(model: Any, base: str, loras: list[GraphLora], **settings: Any) -> TrainedGates:
    """Return gates with random weights for every scope of the LoRAs, reading the text of `conditioning(base, 1)`."""
    mix = mixture.build_mixture(loras, model, None, settings=GateSettings(**settings))
    generator = torch.Generator().manual_seed(3)
    gates: dict[str, Gate] = {}
    for scope in sorted({scope.name for scope in mix.bank.scopes.values()}):
        gates[scope] = gate = Gate(len(loras), len(loras), mix.mixture.gates.settings, owner=torch.arange(len(loras)))
        torch.nn.init.normal_(gate.weight, generator=generator)
    experts = tuple(Expert.of(adapter) for adapter in mix.mixture.experts)
    gate_set = GateSet(len(loras), mix.mixture.gates.settings, gates, detector_of(base, len(loras)))
    return TrainedGates(gate_set, experts, mix.base)


def pair(base: str) -> Callable[[], Any]:
    def case() -> Any:
        model = load(base)
        first, second, readable = PAIRS[base]
        a, b, readable_b = lora(first, 0.7), lora(second, -1.3), lora(readable, -1.3)
        plain = sample(model, base)
        both, one, two = stock(model, a, readable_b), stock(model, a), stock(model, readable_b)
        mix = mixed(model, a, b)
        latent = sample(mix, base)
        measured = {
            "even": distance(latent, sample(both, base), plain),
            "first alone": distance(sample(mixed(model, a, b, switched_off=[1]), base), sample(one, base), plain),
            "second alone": distance(sample(mixed(model, a, b, switched_off=[0]), base), sample(two, base), plain),
            "again": float((sample(mix, base) - latent).abs().max()),
        }
        settings = GateSettings(granularity="block")
        measured["output mixing, one left"] = distance(
            sample(mixed(model, a, b, switched_off=[1], mixing="output", settings=settings), base),
            sample(one, base),
            plain,
        )
        measured["base after"] = float((sample(model, base) - plain).abs().max())
        measured["left on base"] = replaced_forwards(model)
        gates = random_gates(model, base, [a, b], granularity="layer")
        gated = sample(mixed(model, a, b, gates=gates), base)
        measured["gates matter"] = distance(gated, latent, plain)
        swapped = mixed(model, b, a, gates=gates)  # gates go by the LoRAs' hashes, not by their order
        measured["other order"] = distance(sample(swapped, base), gated, plain)
        return measured

    return case


def among_others() -> Any:
    """A mix together with stock loaders, hooks, bypass loaders and another mix; clones; deleted models."""
    base = "flux"
    model = load(base)
    a, b, c = lora("flux_kohya", 0.5), lora("flux_split", 0.5), lora("flux_kohya_2", 0.5)
    plain = sample(model, base)
    chain = sample(stock(model, a, b, c), base)
    measured: dict[str, float] = {}

    def check(name: str, patcher: Any, hooks: Any = None) -> None:
        measured[name] = distance(sample(patcher, base, hooks=hooks), chain, plain)

    check("loader before", mixed(stock(model, c), a, b))
    check("loader after", stock(mixed(model, a, b), c))
    check("two mixes", mixed(mixed(model, a), b, c))
    bypass, _ = comfy.sd.load_bypass_lora_for_models(model, None, load_file(c.content), 0.5, 0.0)
    check("bypass before", mixed(bypass, a, b))
    mix = mixed(model, a, b)
    check("bypass after", comfy.sd.load_bypass_lora_for_models(mix, None, load_file(c.content), 0.5, 0.0)[0])

    # without guidance (cfg 1), because a hook LoRA acts on the positive prompt only
    hooked = comfy.hooks.create_hook_lora(load_file(c.content), 0.5, 0.0)
    stock_hooked = stock(model, a, b)
    with_hook = sample(stock_hooked, base, cfg=1.0, hooks=hooked)
    measured["hook"] = distance(sample(mix, base, cfg=1.0, hooks=hooked), with_hook, sample(model, base, cfg=1.0))

    before = sample(mix, base)
    comfy.model_management.unload_all_models()
    measured["after unloading"] = float((sample(mix, base) - before).abs().max())
    other = mixed(model, c)
    sample(other, base)
    measured["after another mix"] = float((sample(mix, base) - before).abs().max())
    clone = mix.clone()
    measured["clone"] = float((sample(clone, base) - before).abs().max())
    del clone, other
    gc.collect()
    measured["after a clone is gone"] = float((sample(mix, base) - before).abs().max())
    measured["base after"] = float((sample(model, base) - plain).abs().max())
    measured["left on base"] = replaced_forwards(model)

    fresh = load(base)
    gone = mixed(fresh, a, b)
    sample(gone, base)
    bank = weakref.ref(mixture.mixtures_of(gone)[0].bank)
    del gone  # ComfyUI's cache also drops models that are still loaded
    measured["left when the mix is gone"] = replaced_forwards(fresh) + (bank() is not None)
    measured["base when the mix is gone"] = float((sample(fresh, base) - plain).abs().max())
    return measured


def compiled() -> Any:
    base = "flux"
    a, b = lora("flux_kohya"), lora("flux_split")
    model = load(base)
    gates = random_gates(model, base, [a, b], granularity="block")
    plain, eager = sample(model, base), sample(mixed(model, a, b, gates=gates), base)
    first = model.clone()
    set_torch_compile_wrapper(first, backend="eager")
    sample(first, base)  # compile before the mix is added
    later = mixed(load(base), a, b, gates=gates)
    set_torch_compile_wrapper(later, backend="eager")
    return {
        "compiled, then mixed": distance(sample(mixed(first, a, b, gates=gates), base), eager, plain),
        "mixed, then compiled": distance(sample(later, base), eager, plain),
        "compiled base after": float((sample(first, base) - plain).abs().max()),
    }


def recorded() -> Any:
    """Only gates for the positive prompt's samples are recorded, whatever else is in their batch."""
    base = "flux"
    model = load(base)
    a, b = lora("flux_kohya"), lora("flux_split")
    mix = mixed(model, a, b, gates=random_gates(model, base, [a, b], granularity="block"))
    sample(mix, base, cfg=1.0)
    alone = mixture.mixtures_of(mix)[0].record.mean()
    sample(mix, base, cfg=3.0)
    record = mixture.mixtures_of(mix)[0].record
    both = record.mean()
    return {
        "passes": len(record.passes),
        "scopes": sorted(record.scopes),
        "difference": max(float((alone[scope] - both[scope]).abs().max()) for scope in alone),
    }


def guided(base: str) -> Callable[[], Any]:
    """Other prompts use the positive prompt's gates: the same as with constant gates, whoever asks for predictions."""

    def case() -> Any:
        model = load(base)
        pair = [lora(name) for name in PAIRS[base][:2]]
        gates = random_gates(model, base, pair, granularity="block")
        plain, mix = sample(model, base), mixed(model, *pair, gates=gates)
        latent = sample(mix, base)
        mean_gates = mixture.mixtures_of(mix)[0].record.mean()
        fixed = mixed(model, *pair, gates=replace(gates, gates=constant(gates.gates, mean_gates)))
        with patch.object(type(mix), "get_free_memory", lambda *_: 0.0):  # forces two batches
            two_batches = sample(mix, base)
        with patch.object(PromptGateSharing, "__call__", lambda _, scope, value, named=None: value):
            own_gates = sample(mix, base)
        measured = {
            "one batch": distance(latent, sample(fixed, base), plain),
            "two passes": distance(two_batches, latent, plain),
            "it matters": distance(own_gates, latent, plain),
        }
        for name, guide in GUIDERS.items():
            expected = guide(fixed, base)
            measured[name] = distance(guide(mix, base), expected, plain)
            with patch.object(type(mix), "get_free_memory", lambda *_: 0.0):
                measured[f"{name}, one by one"] = distance(guide(mix, base), expected, plain)
        both = mixed(model, *pair, gates=replace(gates, gates=naming(gates.gates, base)))
        measured["negative prompt names a LoRA"] = distance(sample(both, base), latent, plain)
        return measured

    return case


def _run_guider(guider: Any, base: str) -> Tensor:
    start = starting_noise(base)
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", 2)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(start, torch.zeros_like(start), sampler, sigmas, disable_pbar=True, seed=7)


def perpendicular(model: Any, base: str) -> Tensor:
    guider = Guider_PerpNeg(model)
    guider.set_conds(conditioning(base, 1), conditioning(base, 2), conditioning(base, 4))
    guider.set_cfg(2.0, 1.0)
    return _run_guider(guider, base)


def dual_cfg(nested: bool) -> Callable[[Any, str], Tensor]:
    def sampled(model: Any, base: str) -> Tensor:
        guider = Guider_DualCFG(model)
        guider.set_conds(conditioning(base, 1), conditioning(base, 2), conditioning(base, 4))
        guider.set_cfg(2.0, 1.5, nested=nested)
        return _run_guider(guider, base)

    return sampled


def dual_model(model: Any, base: str) -> Tensor:
    """The negative prompt on a model of its own, with the same mix."""
    guider = Guider_DualModel(model, model.clone())
    guider.set_conds(conditioning(base, 1), conditioning(base, 2))
    guider.set_cfg(2.0)
    return _run_guider(guider, base)


def three_predictions(model: Any, base: str) -> Tensor:
    """A function that replaces the stock one and asks for the negative prompt first, then for both and an empty one."""

    def predict(arguments: Any) -> Any:
        run = (arguments["model"], arguments["input"], arguments["sigma"], arguments["model_options"])
        positive, negative = arguments["conds"]

        def of(conds: list[Any]) -> list[Tensor]:
            return comfy.samplers.calc_cond_batch(run[0], conds, *run[1:])

        (first,) = of([negative])
        second, third, _ = of([positive, negative, None])
        return [second, (first + third) / 2]

    patched = model.clone()
    patched.set_model_sampler_calc_cond_batch_function(predict)
    return sample(patched, base)


GUIDERS: dict[str, Callable[[Any, str], Tensor]] = {
    "PerpNeg": perpendicular,
    "DualCFG": dual_cfg(nested=False),
    "DualCFG nested": dual_cfg(nested=True),
    "DualModel": dual_model,
    "negative prompt first": three_predictions,
}


def constant(gates: GateSet, values: dict[str, Tensor]) -> GateSet:
    """Return gates with constant values."""
    made: dict[str, Gate] = {}
    for scope in gates.names:
        made[scope] = gate = Gate(gates[scope].features, gates.experts, gates.settings, owner=gates[scope].owner)
        torch.nn.init.zeros_(gate.weight)
        gate.bias.copy_(torch.logit(values[scope] / gates.settings.ceiling))
    return GateSet(gates.experts, gates.settings, made, gates.detector)


def naming(gates: GateSet, base: str) -> GateSet:
    """Return the same gates with a detector that finds the second LoRA's concept in the negative prompt too."""
    assert gates.detector is not None
    other = detector_of(base, 2, seed=2)
    weight = torch.stack([gates.detector.weight[0], gates.detector.weight[1] + other.weight[1]])
    named = ConceptDetector(weight, gates.detector.bias, gates.detector.words)
    return GateSet(gates.experts, gates.settings, {name: gates[name] for name in gates.names}, named)


def lengths() -> Any:
    """Prompts of two lengths in one call, each with its own gates, give the same as each prompt alone."""
    base = "flux"
    model = load(base)
    mix = mixture.build_mixture([lora("flux_kohya"), lora("flux_split")], model, None)
    short, long = conditioning(base, 1), conditioning(base, 2)
    long = [[torch.cat([long[0][0], long[0][0]], 1), long[0][1]]]
    comfy.model_management.load_models_gpu([model])
    x, t = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.6, 0.9])
    g = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    with attach(model.model.diffusion_model, mix.bank) as attachment:
        denoiser = ComfyDenoiser(model, attachment, [short, long], torch.zeros(1, 16, 8, 8), 1.0, 2)
        prompts = [1, 0, 1]
        with attachment.hold(g):
            together = denoiser.predict(x, t, prompts)
            goal = denoiser.goal(x, t, x.flip(0))
            clean = denoiser.clean(denoiser.noised(x, t, x.flip(0)), t, goal)
        alone: list[Tensor] = []
        for i in range(3):
            with attachment.hold(g[i : i + 1]):
                alone.append(denoiser.predict(x[i : i + 1], t[i : i + 1], prompts[i : i + 1]))
    return {
        "difference": float((together - torch.cat(alone)).abs().max() / together.abs().max()),
        "clean": float((clean - x).abs().max()),
    }


def gradients(base: str) -> Callable[[], Any]:
    """Gradients of a loss by the gates, with and without recomputing blocks; saved for a comparison with diffusers."""

    def case() -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            model = load(base)
            network = model.model.diffusion_model.requires_grad_(False)
            pair = [lora(name) for name in PAIRS[base][:2]]
            mix = mixture.build_mixture(pair, model, None, settings=GateSettings(granularity="block"))
            generator = torch.Generator().manual_seed(5)
            width, pooled = (4096, 2048) if base == "sd3" else (768, 768)
            inputs = {
                "x": torch.randn(2, CHANNELS[base], 8, 8, generator=generator),
                "t": torch.tensor([0.7, 0.2]) * (1000 if base == "sd3" else 1),
                "context": torch.randn(2, 6, width, generator=generator),
                "y": torch.randn(2, pooled, generator=generator),
            }
            target = torch.randn(2, CHANNELS[base], 8, 8, generator=generator)
            comfy.model_management.in_training = True
            measured: dict[str, Tensor] = {}
            for checkpointing in (False, True):
                g = torch.tensor([[0.8, 0.3], [0.2, 1.1]], requires_grad=True)
                bank = Bank(network, mix.mixture)
                with attach(network, bank, checkpointing=checkpointing) as attachment, attachment.hold(g):
                    x, t = inputs["x"].clone(), inputs["t"]
                    with exact_gradients():
                        out = network(x, t, context=inputs["context"].clone(), y=inputs["y"].clone())
                    loss = (out - target).square().mean()
                    loss.backward()
                assert g.grad is not None
                measured[f"gradient {checkpointing}"], measured[f"loss {checkpointing}"] = g.grad, loss.detach()
            comfy.model_management.in_training = False
            save_file({**inputs, "target": target, **measured}, BASE / f"gradients_{base}.safetensors")
            a, b = measured["gradient False"], measured["gradient True"]
            return {"checkpointing": float((a - b).abs().max() / a.abs().max())}

    return case


with torch.inference_mode():
    CASES: dict[str, Callable[[], Any]] = {
        **{base: pair(base) for base in PAIRS},
        "among others": among_others,
        "compiled": compiled,
        "recorded": recorded,
        "guided flux": guided("flux"),
        "guided sd15": guided("sd15"),
        "lengths": lengths,
        "gradients flux": gradients("flux"),
        "gradients sd3": gradients("sd3"),
    }
    print(json.dumps({name: case() for name, case in CASES.items()}))
