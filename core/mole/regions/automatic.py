"""Automatic regions: maps from the model's own attention to the words of each LoRA, in the first steps of a run.

In the first part of the sampling run every position's attention to the tokens that name each LoRA is summed up. Then
each position belongs to the LoRAs whose words it attends to most, compared with the other positions:
``m_i(p) = softmax_i(c z_i(p))`` over the LoRAs that the prompt names, with `z` the attention standardised over
positions and `c` the `SHARPNESS`. No further pass of the model is needed. LoRAs that the prompt does not name, and a
LoRA that it names alone, have no competitor and no map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ...errors import MergeError
from ..concepts import ConceptDetector, smooth_maximum
from .layouts import SequenceLayout
from .picture import AttentionObserver, Picture, SamplingReader, grid_with, tokens_of

UNTIL = 0.25  # share of the sampling run in which attention is read
SHARPNESS = 4.0
_NAMED = 0.5  # presence of a LoRA's words in a prompt
_TEMPERATURE = 0.05  # presence of a token, see `token_shares`


class AttentionSums:
    """Sums up the attention of the picture's positions to given tokens of the text.

    Args:
        picture: The latent. patch: See `patch_size`. layout: Of sequences that hold text and picture.
        rows: The samples to read.
        shares: ``(rows, L, N)``, how much each token of the text belongs to each LoRA.
        total: Sum of earlier passes.

    Attributes:
        total: ``(rows, N, height, width)`` on the finest grid of tokens; ``None`` before the first attention.
    """

    def __init__(
        self,
        picture: Picture,
        patch: Sequence[int],
        layout: SequenceLayout,
        rows: Sequence[int],
        shares: Tensor,
        total: Tensor | None,
    ) -> None:
        self.picture, self.layout, self.rows, self.shares, self.total = picture, layout, list(rows), shares, total
        self.patch, self.tokens = patch, tokens_of(picture, patch)

    def read(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Add an attention if its keys are the text, or hold it beside the picture; implements `AttentionObserver`."""
        length, count, tokens = self.shares.shape[1], query.shape[-2], self.tokens
        if query.ndim == key.ndim == 3:  # one head
            query, key = query[:, None], key[:, None]
        if query.ndim != 4 or len(query) != self.picture.samples or query.shape[1] != key.shape[1]:
            return
        if key.shape[-2] == length and count != length:
            grid = grid_with(self.picture, self.patch, count)
            of_picture = of_text = 0
        elif key.shape[-2] == count and count >= length + tokens.count:
            grid, of_text = tokens, self.layout.text_start(tokens.count)
            of_picture = next(iter(self.layout.starts(tokens.count, count, [length])), None)
        else:
            return
        if grid is None or of_picture is None or grid.frames > 1:
            return
        q = query[self.rows, :, of_picture : of_picture + grid.count].detach().float()
        k = key[self.rows, :, of_text : of_text + length].detach().float()
        weights = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1).mean(1)  # (rows, T, L)
        attended = (weights @ self.shares.to(weights)).mT.unflatten(2, (grid.height, grid.width)).cpu()
        if grid != tokens:
            attended = interpolate(attended, (tokens.height, tokens.width), mode="bilinear", align_corners=False)
        attended = attended / attended.mean((2, 3), keepdim=True).clamp_min(1e-12)
        self.total = attended if self.total is None else self.total + attended


class _WatchTorch(TorchFunctionMode):
    """While it is entered, an observer gets the queries and keys of torch's ``scaled_dot_product_attention``."""

    def __init__(self, read: AttentionObserver) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            self.read(query, key, kwargs.get("scale"))
        return func(*args, **kwargs)


def token_shares(logits: Tensor, valid: Tensor) -> Tensor:
    """How much each token belongs to each LoRA, ``(B, L, N)``, 1 in sum over the tokens.

    Args:
        logits: ``(B, L, N)`` scores of the concepts at every token. valid: ``(B, L)``, false for padding.
    """
    presence = torch.sigmoid(logits) * valid[..., None]
    weight = (presence / _TEMPERATURE).softmax(1) * presence
    return weight / weight.sum(1, keepdim=True).clamp_min(1e-12)


def found_maps(total: Tensor, named: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """Maps ``(rows, N, height, width)`` from attention; ones for LoRAs without a competitor.

    Args:
        total: ``(rows, N, height, width)``, see `AttentionReader`.
        named: ``(rows, N)`` bool, whether a sample's prompt names each LoRA.
        sharpness: How sharply the picture is divided.
    """
    smooth = torch.nn.functional.avg_pool2d(total, 3, 1, 1, count_include_pad=False)
    z = (smooth - smooth.mean((2, 3), keepdim=True)) / smooth.std((2, 3), keepdim=True).clamp_min(1e-12)
    competes = named & (named.sum(1, keepdim=True) > 1)
    scores = (sharpness * z).masked_fill(~competes[..., None, None], float("-inf"))
    maps = torch.where(competes.any(1)[:, None, None, None], scores, torch.zeros_like(scores)).softmax(1)
    return torch.where(competes[..., None, None], maps, torch.ones_like(maps))


class AutomaticRegions:
    """Maps that are read from the attention of the first steps of every sampling run.

    Args:
        architecture: Name of the model's class, for messages.
        patch: See `patch_size`. layout: Of sequences that hold text and picture.
    """

    def __init__(self, architecture: str, patch: Sequence[int], layout: SequenceLayout) -> None:
        self.architecture, self.patch, self.layout = architecture, patch, layout
        self.maps: Tensor | None = None
        self._total: Tensor | None = None
        self._named: Tensor | None = None
        self._sums: AttentionSums | None = None
        self._watch: AbstractContextManager[object] | None = None

    def begin_pass(
        self,
        picture: Picture,
        text: Tensor | None,
        mask: Tensor | None,
        detector: ConceptDetector | None,
        rows: Sequence[int],
        reader: SamplingReader | None,
        arguments: Mapping[str, Any],
    ) -> None:
        """Begin to read attention, or make the maps if the first steps are over.

        Args:
            picture: The latent. text, mask: Text conditioning ``(B, L, F)`` and its padding.
            detector: Finds the words of the LoRAs in the text.
            rows: The samples of the prompt.
            reader: Watches attention in the first steps of a run; ``None`` after them.
            arguments: Keyword arguments of the model.

        Raises:
            MergeError: There are no words, no attention could be read, or the prompt has another number of parts.
        """
        if reader is None:
            if self.maps is None:
                self.maps = self._found()
            return
        if self.maps is not None:  # a new run
            self.maps = self._total = self._named = None
        if not rows:
            return
        if detector is None or text is None:
            raise MergeError(
                "Automatic regions follow the words of the LoRAs, and these gates know none.",
                expected="gates that read text",
                remedy="give every LoRA its words and train gates, or connect CLIP to MoLE Mix; or draw the regions",
            )
        logits, is_token = detector.token_logits(text, mask)
        presence = torch.sigmoid(smooth_maximum(logits, is_token[..., None]))
        named = presence[list(rows)] > _NAMED
        if self._total is not None and len(self._total) != len(rows):
            raise MergeError(
                "Automatic regions need the same number of prompts in every pass.",
                expected=len(self._total),
                found=len(rows),
                remedy="combine the prompts to one, or draw the regions",
            )
        self._named = named.cpu()
        shares = token_shares(logits, is_token)[list(rows)]
        self._sums = AttentionSums(picture, self.patch, self.layout, rows, shares, self._total)
        self._watch = reader.watch_attention(arguments, self._sums.read) or _WatchTorch(self._sums.read)
        self._watch.__enter__()

    def end_pass(self) -> None:
        """Stop reading. Safe to call again."""
        if self._watch is not None and self._sums is not None:
            self._watch.__exit__(None, None, None)
            self._total, self._sums, self._watch = self._sums.total, None, None

    def _found(self) -> Tensor:
        if self._total is None or self._named is None:
            raise MergeError(
                "Automatic regions could not read the attention of this model.",
                found=self.architecture,
                expected="attention by torch's scaled_dot_product_attention to the text's tokens",
                remedy="draw the regions, or start ComfyUI with --use-pytorch-cross-attention",
            )
        return found_maps(self._total, self._named)
