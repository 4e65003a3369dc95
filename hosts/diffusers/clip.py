"""CLIP guidance on a diffusers pipeline: from latents through the VAE to a transformers CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.processing_clip import CLIPProcessor

from ...core.errors import FormatError
from .denoiser import PipelineDenoiser


def load_clip(path: str | Path) -> tuple[Any, Any]:
    """A CLIP model and its processor from a folder, or under its name from the local cache. Nothing is downloaded.

    Raises:
        FormatError: There is none.
    """
    try:
        model = CLIPModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
        return model, CLIPProcessor.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # of a damaged file its parsers raise errors of every kind
        raise FormatError(
            "The CLIP model cannot be loaded.",
            file=path,
            expected="a folder that CLIPModel and CLIPProcessor were saved to",
            found=f"{type(error).__name__}: {error}".partition("\n")[0],
        ) from error


class PipelineClip:
    """Implements `core.train.Clip`.

    Args:
        denoiser: Decodes latents. model: A `transformers.CLIPModel`, moved to where the pipeline computes.
        processor: Its `CLIPProcessor`: the tokenizer, and mean and deviation of the pictures it learnt from.
    """

    def __init__(self, denoiser: PipelineDenoiser, model: Any, processor: Any) -> None:
        self.denoiser, self.model = denoiser, model.to(denoiser.device)
        self.tokenizer = processor.tokenizer
        mean, deviation = processor.image_processor.image_mean, processor.image_processor.image_std
        self.mean, self.deviation = torch.tensor(mean).view(3, 1, 1), torch.tensor(deviation).view(3, 1, 1)
        self._texts: dict[str, Tensor] = {}

    def images(self, latents: Tensor) -> Tensor:
        x = (self.denoiser.decode(latents) / 2 + 0.5).clamp(0, 1)
        side = self.model.config.vision_config.image_size
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
        x = (x - self.mean.to(x)) / self.deviation.to(x)
        return _unit(self.model.get_image_features(pixel_values=x.to(self.model.dtype)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            tokens = self.tokenizer(new, padding=True, truncation=True, return_tensors="pt").to(self.denoiser.device)
            with torch.no_grad():
                found = _unit(self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask))
            self._texts.update(zip(new, found, strict=True))
        return torch.stack([self._texts[text] for text in texts])


def _unit(features: Any) -> Tensor:
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output  # by transformers' version
    return F.normalize(found.float(), dim=-1)
