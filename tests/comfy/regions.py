"""Run by ComfyUI's own Python: latents sampled with regions and steps, compared with runs without them.

Usage: regions.py <ComfyUI> <base directory>. Prints one JSON object: base model -> case -> measurement.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

from sampled import CHANNELS, PAIRS, conditioning, distance, load, lora, mixed, starting_noise

# isort: split
# the module above sets the paths that those below need
import comfy.cldm.cldm
import comfy.controlnet
import comfy.sample
import torch
from comfy.ops import disable_weight_init
from legomole.core.errors import LegoMoleError
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.nodes.comfy import mixture
from torch import Tensor

FULL = torch.ones(1, 64, 64)
LEFT = FULL * (torch.arange(64) < 32)
SOFT = FULL * torch.linspace(0, 1, 64)
SHAPE = FULL * (torch.arange(64) < 24)[:, None] * (torch.arange(64) > 15)


class Runs:
    """Sampling runs of a tiny model with two LoRAs.

    Args:
        base: ``flux``, ``sd3`` or ``sd15``.
    """

    def __init__(self, base: str) -> None:
        self.base, self.model = base, load(base)
        first, second, _ = PAIRS[base]
        self.loras = lora(first, 0.7), lora(second, -1.3)
        self.noise = starting_noise(base, 8)

    def mix(self, *regions: Tensor | None, **options: Any) -> Any:
        return mixed(self.model, *self.loras, regions=regions, **options)

    def sample(self, model: Any, *, cfg: float = 2.0, area: Any = None, control: Any = None, **options: Any) -> Tensor:
        """The latent after two steps (or `steps`) of the stock sampler; options are those of `comfy.sample.sample`."""
        more = {} if area is None else {"area": area, "strength": 1.0}
        more |= {} if control is None else {"control": control, "control_apply_to_uncond": True}
        positive = conditioning(self.base, 1, **more)
        start = options.pop("noise", self.noise)
        latent = options.pop("latent", torch.zeros_like(start))
        schedule = options.pop("steps", 2), cfg, "euler", "simple"
        prompts = positive, conditioning(self.base, 2)
        return comfy.sample.sample(model, start, *schedule, *prompts, latent, disable_pbar=True, seed=7, **options)


def masks(runs: Runs) -> dict[str, float]:
    """Masks of ones, of zeros, and of parts of the picture."""
    whole = runs.mix(None, None)
    full, plain = runs.sample(whole), runs.sample(runs.model)
    off = runs.sample(runs.mix(None, None, switched_off=[1]))
    left, right = (runs.sample(runs.mix(None, mask)) for mask in (LEFT, 1 - LEFT))
    both = runs.sample(runs.mix(LEFT, 1 - LEFT))
    soft = runs.mix(1 - SOFT, SOFT)
    blurred = runs.sample(soft)
    with patch.object(type(soft), "get_free_memory", lambda *_: 0.0):  # forces two batches
        two_passes = runs.sample(soft)
    return {
        "ones": float((runs.sample(runs.mix(FULL, FULL[0])) - full).abs().max()),
        "nearly ones": distance(runs.sample(runs.mix(None, 1 - 1e-6 * LEFT)), full, plain),
        "zeros": distance(runs.sample(runs.mix(None, 0 * FULL)), off, plain),
        "all zeros": distance(runs.sample(runs.mix(0 * FULL, 0 * FULL)), plain, full),
        "left": min(distance(left, other, plain) for other in (full, off, right)),
        "both": min(distance(both, other, plain) for other in (full, off, left, right)),
        "soft": min(distance(blurred, other, plain) for other in (full, both)),
        "two passes": distance(two_passes, blurred, plain),
        "again": float((runs.sample(soft) - blurred).abs().max()),
        "base after": float((runs.sample(runs.model) - plain).abs().max()),
    }


def error_of(run: Callable[[], Any]) -> str:
    """The message of the error that a run ends with, or nothing."""
    try:
        run()
    except LegoMoleError as error:
        return str(error)
    return ""


def batch(runs: Runs) -> dict[str, Any]:
    """One mask per picture of a batch, and one for all."""
    noise = torch.cat([runs.noise, runs.noise.flip(-1)])
    plain = runs.sample(runs.model, noise=noise)
    together = runs.sample(runs.mix(torch.cat([LEFT, SHAPE]), SOFT), noise=noise)
    alone = [runs.sample(runs.mix(mask, SOFT), noise=noise[i : i + 1]) for i, mask in enumerate((LEFT, SHAPE))]
    measured: dict[str, Any] = {"single runs": distance(together, torch.cat(alone), plain)}
    for count in (3, 4):
        several = runs.mix(SOFT.repeat(count, 1, 1), None)
        measured[f"{count} masks"] = error_of(partial(runs.sample, several, noise=noise))
    return measured


def samplers(runs: Runs) -> dict[str, float]:
    """Inpainting, a run in two parts, a second pass at another size, and areas of conditioning."""
    plain, mix = runs.sample(runs.model), runs.mix(LEFT, 1 - LEFT)
    latent = runs.noise.flip(-2)
    inpaint = {"latent": latent, "noise_mask": 1 - LEFT[None]}
    inpainted = runs.sample(mix, **inpaint)
    right_only = runs.sample(runs.mix(0 * FULL, 1 - LEFT), **inpaint)

    whole = runs.sample(mix, steps=4)
    first = runs.sample(mix, steps=4, start_step=0, last_step=2)
    again = {"latent": first, "noise": torch.zeros_like(first), "disable_noise": True}
    second = runs.sample(mix, steps=4, start_step=2, **again)

    wide = torch.nn.functional.interpolate(plain, (12, 16), mode="nearest")
    hires = {
        "noise": torch.randn(wide.shape, generator=torch.Generator().manual_seed(9)),
        "latent": wide,
        "denoise": 0.5,
    }
    by_hand = torch.zeros(1, 12, 16)
    by_hand[..., :8] = 1
    large, large_by_hand = (runs.sample(runs.mix(m, 1 - m), **hires) for m in (LEFT, by_hand))
    large_plain = runs.sample(runs.model, **hires)

    # height, width, top, left; without guidance only the area is predicted
    area, cut = (6, 4, 2, 4), (slice(None), slice(None), slice(2, 8), slice(4, 8))
    small = SHAPE.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))  # the mask at the size of the latent
    in_area = runs.sample(runs.mix(SHAPE, SOFT), cfg=1.0, area=area, steps=1)
    soft = SOFT.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))
    cropped = runs.mix(small[:, 2:8, 4:8], soft[:, 2:8, 4:8])
    alone = runs.sample(cropped, cfg=1.0, noise=runs.noise[cut], steps=1)
    uncropped = runs.sample(runs.mix(SHAPE, SOFT), cfg=1.0, noise=runs.noise[cut], steps=1)
    plain_area = runs.sample(runs.model, cfg=1.0, noise=runs.noise[cut], steps=1)
    return {
        "inpainting keeps": float((inpainted - latent)[..., :4].abs().max()),
        "inpainting": distance(inpainted, runs.sample(mix), plain),
        "inpainting beside": distance(inpainted, right_only, plain),
        "two samplers": distance(second, whole, plain),
        "second pass": float((large - large_by_hand).abs().max()),
        "second pass differs": distance(large, runs.sample(runs.mix(None, None), **hires), large_plain),
        "area": distance(in_area[cut], alone, plain_area),
        "area is cut": distance(uncropped, alone, plain_area),
    }


def areas_and_guidance(runs: Runs) -> dict[str, float]:
    """Two areas in one step, next to a prompt for the whole picture: in one batch, and one by one."""
    mix = runs.mix(SHAPE, SOFT)
    parts = [conditioning(runs.base, 1, area=(8, 4, 0, left), strength=1.0)[0] for left in (0, 4)]
    prompts = [*parts, *conditioning(runs.base, 3)]

    def run(model: Any) -> Tensor:
        latent = torch.zeros_like(runs.noise)
        schedule = 2, 2.0, "euler", "simple"
        return comfy.sample.sample(
            model, runs.noise, *schedule, prompts, conditioning(runs.base, 2), latent, disable_pbar=True, seed=7
        )

    together, plain = run(mix), run(runs.model)
    with patch.object(type(mix), "get_free_memory", lambda *_: 0.0):
        one_by_one = run(mix)
    return {
        "areas one by one": distance(one_by_one, together, plain),
        "areas of ones": float((run(runs.mix(FULL, FULL)) - run(runs.mix(None, None))).abs().max()),
        "areas differ": distance(together, run(runs.mix(None, None)), plain),
    }


def steps(runs: Runs) -> dict[str, float]:
    """A LoRA in the first or last half of the steps: the same as two samplers, one without it."""
    plain = runs.sample(runs.model, steps=4)
    on, off = runs.mix(None, None), runs.mix(None, None, switched_off=[1])

    def halves(first: Any, second: Any) -> Tensor:
        latent = runs.sample(first, steps=4, start_step=0, last_step=2)
        rest = {"latent": latent, "noise": torch.zeros_like(latent), "disable_noise": True}
        return runs.sample(second, steps=4, start_step=2, **rest)

    def part(start: float, end: float, **options: Any) -> Tensor:
        return runs.sample(runs.mix(None, None, steps=[(0, 1), (start, end)]), steps=4, **options)

    start = {"steps": 4, "start_step": 2, "latent": plain, "denoise": 1.0}
    both = runs.mix(None, LEFT, steps=[(0, 1), (0, 0.5)])
    return {
        "first half": distance(part(0, 0.5), halves(on, off), plain),
        "last half": distance(part(0.5, 1), halves(off, on), plain),
        "all": float((part(0, 1) - runs.sample(on, steps=4)).abs().max()),
        "differs": min(distance(part(0, 0.5), runs.sample(other, steps=4), plain) for other in (on, off)),
        "of the schedule": distance(
            runs.sample(runs.mix(None, None, steps=[(0, 1), (0, 0.5)]), **start), runs.sample(off, **start), plain
        ),
        "with a region": distance(runs.sample(both, steps=4), halves(runs.mix(None, LEFT), off), plain),
    }


def tiles(runs: Runs) -> dict[str, str]:
    """The error when a node calls the model with a part of the latent; the model is as before afterwards."""

    def halves(apply: Callable[..., Tensor], arguments: Any) -> Tensor:
        x, t, c = arguments["input"], arguments["timestep"], arguments["c"]
        return torch.cat([apply(part, t, **c) for part in x.chunk(2, -1)], -1)

    before = runs.sample(runs.model)
    errors: dict[str, str] = {}
    for name, regions in {"with": (LEFT, None), "without": (None, None)}.items():
        mix = runs.mix(*regions)
        mix.set_model_unet_function_wrapper(halves)
        errors[name] = error_of(partial(runs.sample, mix))
    errors["base after"] = str(float((runs.sample(runs.model) - before).abs().max()))
    return errors


def automatic(runs: Runs) -> dict[str, Any]:
    """Maps from the attention to two tokens of the prompt, one per LoRA."""
    settings = GateSettings(reads="text", granularity="network")
    mix = mixture.build_mixture(runs.loras, runs.model, None, settings=settings, regions="automatic")
    text = conditioning(runs.base, 1)[0][0][0]
    tokens = text[[1, 2]] / text[[1, 2]].square().mean(1, keepdim=True).sqrt()
    with torch.inference_mode(False):
        detector = ConceptDetector(0.1 * tokens.clone(), torch.full((2,), -30.0), [["one"], ["two"]])
        mix.bank.gates = gates = GateSet(2, settings, detector=detector)
    named = replace(mix, mixture=replace(mix.mixture, gates=gates))
    start = {"noise": runs.noise.repeat(2, 1, 1, 1), "steps": 4}
    found = runs.sample(mixture.apply_to_model(named, runs.model), **start)
    everywhere, plain = (runs.sample(model, **start) for model in (runs.mix(None, None), runs.model))
    unnamed = mixture.build_mixture(runs.loras, runs.model, None, regions="automatic")
    return {
        "differs": distance(found, everywhere, plain),
        "no words": error_of(partial(runs.sample, mixture.apply_to_model(unnamed, runs.model))),
    }


def control(runs: Runs) -> dict[str, float]:
    """A random ControlNet, whose residuals are added to the U-Net's."""
    if runs.base != "sd15":
        return {}
    network = comfy.cldm.cldm.ControlNet(
        hint_channels=3, operations=disable_weight_init, **runs.model.model.model_config.unet_config
    )
    g = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=g)
    net = comfy.controlnet.ControlNet(network.to(torch.float32), load_device=runs.model.load_device)
    net.set_cond_hint(torch.rand(1, 3, 64, 64, generator=g), 1.0, (0.0, 1.0))
    whole, off = runs.mix(None, None), runs.mix(None, None, switched_off=[1])
    full, plain, without = (runs.sample(model, control=net) for model in (whole, runs.model, off))
    left = runs.sample(runs.mix(None, LEFT), control=net)
    return {
        "ones": float((runs.sample(runs.mix(FULL, FULL), control=net) - full).abs().max()),
        "zeros": distance(runs.sample(runs.mix(None, 0 * FULL), control=net), without, plain),
        "left": min(distance(left, other, plain) for other in (full, without)),
        "controlled": distance(full, runs.sample(whole), plain),
    }


with torch.inference_mode():
    CASES: tuple[Callable[[Runs], dict[str, Any]], ...] = (
        masks,
        batch,
        samplers,
        areas_and_guidance,
        steps,
        tiles,
        automatic,
        control,
    )
    measured: dict[str, Any] = {}
    for base in CHANNELS:
        one = Runs(base)
        measured[base] = {case.__name__: case(one) for case in CASES}
    print(json.dumps(measured))
