"""ComfyUI's own sampling: from a prompt to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
from torch import Tensor

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
_RATIO_KEYS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # entries of an empty LATENT, as ComfyUI spells


def encode(clip: Any, text: str) -> Any:
    """Return the conditioning of a prompt."""
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
    """Sample from noise, as KSampler does.

    Args:
        model: A MODEL.
        positive: Conditioning of the prompt.
        negative: Conditioning of the negative prompt.
        latent: An empty LATENT.
        seed: Random seed of the noise.
        steps: Number of sampling steps.
        cfg: Guidance scale.
        sampler: A name in `SAMPLERS`.
        scheduler: A name in `SCHEDULERS`.
        progress: Called with the number of finished steps. May raise an exception to cancel.

    Returns:
        The samples of the resulting LATENT.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], **{name: latent[name] for name in _RATIO_KEYS if name in latent}
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
    """Decode samples of a latent to images ``(B, H, W, 3)`` in 0 .. 1; a video's frames become a batch.

    Args:
        vae: A VAE.
        samples: Samples of a LATENT.
        scale: Factor to resize the latent by before it is decoded.
    """
    if scale != 1:
        height, width = (round(side * scale) for side in samples.shape[-2:])
        samples = comfy.utils.common_upscale(samples, width, height, "area", "disabled")
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:])[..., :3]
