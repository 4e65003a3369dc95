"""ComfyUI's text encoders as gate training and the word router use them, and as the model gets their output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...core.errors import MergeError
from ...core.mole.concepts import text_mask
from ...core.train import EncodedPrompt
from .sampling import encode

_SIDE = 16  # of a latent in latent pixels; the text conditioning does not depend on it


class ComfyPromptEncoder:
    """Implements `core.train.PromptEncoder`.

    Args:
        model: The MODEL whose text conditioning is wanted.
        clip: The CLIP that prompts are encoded with.
    """

    def __init__(self, model: Any, clip: Any) -> None:
        self.model, self.clip = model, clip

    def encode(self, prompt: str) -> EncodedPrompt:
        states, mask = text_of(self.model, encode(self.clip, prompt))
        lengths = {name: len(ids) for name, ids in self.token_ids(prompt).items()}
        return EncodedPrompt(states.float().cpu(), mask, _offsets(lengths, len(states)))

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        streams: Mapping[str, Any] = self.clip.tokenize(prompt)
        return {
            name: [entry[0] if isinstance(entry[0], int) else id(entry[0]) for batch in batches for entry in batch]
            for name, batches in streams.items()
        }


def text_of(model: Any, conditioning: Any) -> tuple[Tensor, Tensor | None]:
    """Return the text conditioning ``(T, F)`` of a CONDITIONING's first entry, as the model gets it, and its mask.

    Raises:
        MergeError: The model has no text conditioning.
    """
    network = model.model
    latent = network.latent_format
    noise = torch.zeros(1, latent.latent_channels, *[1, _SIDE, _SIDE][-latent.latent_dimensions :])
    conds = comfy.sampler_helpers.convert_cond(conditioning)[:1]
    (cond,) = comfy.samplers.encode_model_conds(network.extra_conds, conds, noise, noise.device, "positive")
    text: Any = getattr(cond["model_conds"].get("c_crossattn"), "cond", None)
    if not isinstance(text, Tensor) or text.ndim != 3:
        raise MergeError(
            "This model has no text conditioning that gates could read.",
            found=type(network).__name__,
            remedy="train gates that read hidden or experts",
        )
    mask = text_mask({"attention_mask": getattr(cond["model_conds"].get("attention_mask"), "cond", None)}, text)
    return text[0], None if mask is None else mask[0].cpu()


def _offsets(lengths: Mapping[str, int], positions: int) -> dict[str, int]:
    """Return where the tokens of each tokenizer begin in a text conditioning of so many positions.

    Text encoders stand side by side (CLIP-L and CLIP-G), one after the other (CLIP and T5 in SD3), or alone; language
    models drop the first tokens, those of a template. Tokenizers that fit none of these are left out.
    """
    offsets = {name: 0 for name, length in lengths.items() if length == positions}
    if offsets:
        return offsets
    for last, length in lengths.items():
        before = [name for name, other in lengths.items() if name != last and other + length == positions]
        if before and last.startswith("t5"):
            return {**dict.fromkeys(before, 0), last: positions - length}
    if len(lengths) == 1:
        ((name, length),) = lengths.items()
        return {name: positions - length}  # negative: tokens before position 0 are dropped
    return {}
