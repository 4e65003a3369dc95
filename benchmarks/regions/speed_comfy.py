"""Run by ComfyUI's own Python: seconds per sampling step with regions. See speed.py, which starts this.

Usage: speed_comfy.py <ComfyUI> <base directory> <rounds>. Prints one JSON object: model -> method -> seconds of each
round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from sampled import CHANNELS, MORE, conditioning, load

# isort: split
# the module above sets the paths that those below need
import comfy.hooks
import comfy.sample
import torch
from legomole.nodes.comfy import mixture
from legomole.nodes.graph_lora import GraphLora
from torch import Tensor

STEPS, RANK = 3, 16
ROUNDS = int(MORE[0])
SIZES = {"sd15": 24}  # of the latent; the other tiny models take milliseconds, which are overhead
LEFT = torch.zeros(1, 512, 512)
LEFT[..., :256] = 1
SOFT = torch.linspace(1, 0, 512).expand(1, 512, 512)


def lora(model: Any, seed: int) -> dict[str, Tensor]:
    """A LoRA of all matrices in the model's blocks, under ComfyUI's names."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if weight.ndim == 2 and "block" in name and name.endswith(".weight"):
            path = f"diffusion_model.{name.removesuffix('.weight')}"
            d_out, d_in = weight.shape
            state[f"{path}.lora_down.weight"] = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
            state[f"{path}.lora_up.weight"] = 0.02 * torch.randn(d_out, RANK, generator=generator)
            state[f"{path}.alpha"] = torch.tensor(float(RANK))
    return state


def per_step(model: Any, base: str, prompts: tuple[Any, Any]) -> float:
    """Seconds of a step: the fastest but the first, in which models are loaded and weights patched."""
    noise = torch.randn(1, CHANNELS[base], SIZES[base], SIZES[base], generator=torch.Generator().manual_seed(7))
    times: list[float] = []
    schedule = STEPS, 3.0, "euler", "simple"
    comfy.sample.sample(
        model,
        noise,
        *schedule,
        *prompts,
        torch.zeros_like(noise),
        disable_pbar=True,
        callback=lambda *_: times.append(time.perf_counter()),
        seed=7,
    )
    return min(later - earlier for earlier, later in pairwise(times))


def methods(base: str) -> dict[str, Callable[[], float]]:
    model = load(base)
    states = [lora(model, seed) for seed in (1, 2)]
    loras = [GraphLora(state, f"lora {i}") for i, state in enumerate(states)]
    plain = conditioning(base, 1), conditioning(base, 2)

    def mixed(*regions: Tensor | None) -> Callable[[], float]:
        patched = mixture.apply_to_model(mixture.build_mixture(loras, model, None, regions=regions), model)
        return lambda: per_step(patched, base, plain)

    def hooks() -> float:
        pairs: tuple[list[Any], list[Any]] = ([], [])
        for state, mask in zip(states, (LEFT, 1 - LEFT), strict=True):
            hook = comfy.hooks.create_hook_lora(state, 1.0, 0.0)
            more = {"hooks": hook, "mask": mask, "set_area_to_bounds": False, "mask_strength": 1.0}
            for side, seed in zip(pairs, (1, 2), strict=True):
                side += conditioning(base, seed, **more)
        return per_step(model, base, pairs)

    return {
        "base model": lambda: per_step(model, base, plain),
        "gates": mixed(None, None),
        "hard masks": mixed(LEFT, 1 - LEFT),
        "soft masks": mixed(SOFT, 1 - SOFT),
        "stock hooks": hooks,
    }


with torch.inference_mode():
    measured: dict[str, dict[str, list[float]]] = {}
    for base in SIZES:
        runs = methods(base)
        for run in runs.values():  # loads what is loaded once
            run()
        measured[base] = {name: [] for name in runs}
        for i in range(ROUNDS):
            names = list(runs)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                measured[base][name].append(runs[name]())
    print(json.dumps(measured))
