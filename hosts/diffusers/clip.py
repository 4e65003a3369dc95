"""CLIP guidance on a diffusers pipeline: from latents through the VAE to a transformers CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .denoiser import PipelineDenoiser


class PipelineClip:
    """Implements `core.train.Clip`.

    Args:
        denoiser: Decodes the latents.
        model: A `transformers.CLIPModel`; it is moved to the pipeline's device.
        processor: Its `CLIPProcessor`, which has the tokenizer, and the mean and deviation for the pixels.
    """

    def __init__(self, denoiser: PipelineDenoiser, model: Any, processor: Any) -> None:
        self.denoiser, self.model = denoiser, model.to(denoiser.device)
        self.tokenizer = processor.tokenizer
        mean, deviation = processor.image_processor.image_mean, processor.image_processor.image_std
        self.mean, self.deviation = torch.tensor(mean).view(3, 1, 1), torch.tensor(deviation).view(3, 1, 1)
        self._text_features: dict[str, Tensor] = {}

    def images(self, latents: Tensor) -> Tensor:
        x = (self.denoiser.decode(latents) / 2 + 0.5).clamp(0, 1)
        side = self.model.config.vision_config.image_size
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
        x = (x - self.mean.to(x)) / self.deviation.to(x)
        return _normalised(self.model.get_image_features(pixel_values=x.to(self.model.dtype)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._text_features]
        if new:
            tokens = self.tokenizer(new, padding=True, truncation=True, return_tensors="pt").to(self.denoiser.device)
            with torch.no_grad():
                features = self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            self._text_features.update(zip(new, _normalised(features), strict=True))
        return torch.stack([self._text_features[text] for text in texts])


def _normalised(features: Any) -> Tensor:
    """CLIP features ``(B, F)`` at length 1; some versions of transformers wrap them in an output object."""
    tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=-1)
