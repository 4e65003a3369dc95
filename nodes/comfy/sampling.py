"""ComfyUI's own sampling, as its nodes run it: from a prompt to a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
from torch import Tensor

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
_SIZES = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of the model an empty latent was made for


def encode(clip: Any, text: str) -> Any:
    """A prompt's conditioning."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(
    model: Any,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str = "euler",
    scheduler: str = "simple",
    progress: Callable[[int], None],
) -> Tensor:
    """Sample from noise.

    Args:
        model: A MODEL. positive, negative: Conditioning. latent: A LATENT.
        progress: Told the number of steps done. May raise to cancel.

    Returns:
        The latent's new samples.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], **{name: latent[name] for name in _SIZES if name in latent}
    )
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        seed=seed,
        disable_pbar=True,
        callback=lambda step, _clean, _noisy, _total: progress(step + 1),
    )


def decode(vae: Any, samples: Tensor, scale: float = 1.0) -> Tensor:
    """Pictures ``(B, H, W, 3)`` in 0 .. 1 of a latent's samples, whose sides are multiplied by `scale` before."""
    if scale != 1:
        height, width = (round(side * scale) for side in samples.shape[-2:])
        samples = comfy.utils.common_upscale(samples, width, height, "area", "disabled")
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:])[..., :3]  # of a video, its frames
