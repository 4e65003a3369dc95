"""What scripts run by ComfyUI's own Python share: the tiny models, LoRAs on them, and sampled latents.

Such a script gets the folders of ComfyUI and of the models as its first arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

COMFY, BASE = (Path(argument) for argument in sys.argv[1:3])
MORE = sys.argv[3:]  # further arguments
sys.argv = [sys.argv[0], "--cpu"]
sys.path[0:0] = [str(COMFY), str(BASE / "custom_nodes")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from legomole.nodes.comfy import mixture  # noqa: E402
from legomole.nodes.graph_lora import GraphLora  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

LORAS = BASE / "models" / "loras"
CHANNELS = {"flux": 16, "sd3": 16, "sd15": 4}
SIDES = {"flux": 8, "sd3": 8, "sd15": 4}  # of a latent; this U-Net has one level, with convolutions of 320 channels
# Two LoRAs under the names of two trainers, and the second again under names that the stock loader reads.
PAIRS = {
    "flux": ("flux_kohya", "flux_split", "flux_split"),
    "sd3": ("sd3_kohya", "sd3_split", "sd3_split"),
    "sd15": ("sd15_kohya", "sd15_diffusers", "sd15_respelled"),
}


def load(base: str) -> Any:
    if base == "sd15":
        path = str(BASE / "models/checkpoints/sd15_nano.safetensors")
        return comfy.sd.load_checkpoint_guess_config(path, output_clip=False, output_vae=False)[0]
    return comfy.sd.load_diffusion_model(str(BASE / f"models/diffusion_models/{base}_nano.safetensors"))


def conditioning(base: str, seed: int, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    width, pooled = (4096, 2048) if base == "sd3" else (768, 768)
    states = torch.randn(1, 8, width, generator=generator)
    return [[states, {"pooled_output": torch.randn(1, pooled, generator=generator), **more}]]


def starting_noise(base: str, side: int = 0) -> Tensor:
    """Noise of a square latent; `side` instead of the side in `SIDES`."""
    side = side or SIDES[base]
    return torch.randn(1, CHANNELS[base], side, side, generator=torch.Generator().manual_seed(7))


def sample(model: Any, base: str, cfg: float = 2.0, prompt: int = 1, hooks: Any = None) -> Tensor:
    """Return the latent after two steps of the stock sampler."""
    start = starting_noise(base)
    latent = torch.zeros_like(start)
    positive = conditioning(base, prompt, **({} if hooks is None else {"hooks": hooks}))
    return comfy.sample.sample(
        model, start, 2, cfg, "euler", "simple", positive, conditioning(base, 2), latent, disable_pbar=True, seed=7
    )


def lora(name: str, strength: float = 1.0) -> GraphLora:
    return GraphLora(LORAS / f"{name}.safetensors", name, strength, strength)


def stock(model: Any, *loras: GraphLora) -> Any:
    for value in loras:
        model, _ = comfy.sd.load_lora_for_models(model, None, load_file(value.content), value.strength_model, 0.0)
    return model


def mixed(model: Any, *loras: GraphLora, **options: Any) -> Any:
    return mixture.apply_to_model(mixture.build_mixture(loras, model, None, **options), model)


def distance(a: Tensor, b: Tensor, plain: Tensor) -> float:
    """Return the largest difference, relative to the largest change the LoRAs make."""
    return float((a - b).abs().max() / (b - plain).abs().max())
