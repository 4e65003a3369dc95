"""Automatic regions: maps from the model's own attention to the words of each LoRA, in the first steps of a run.

In the first part of the sampling run every position's attention to the tokens that name each LoRA is summed up, as
logarithms, over heads, layers and steps. From the second step on each position belongs to the LoRAs whose words it
attends to most, compared with the other words and the other positions: ``m_i(p) = softmax_i(c z_i(p) / s)`` over the
LoRAs that the prompt names, with `z` the sum less its mean over positions and over LoRAs, `s` the root mean square of
`z`, and `c` the `SHARPNESS`. No further pass of the model is needed. LoRAs that the prompt does not name, and a LoRA
that it names alone, have no competitor and no map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ...errors import MergeError
from ..concepts import ConceptDetector, smooth_maximum
from .layouts import SequenceLayout
from .picture import AttentionObserver, Picture, SamplingReader, Tokens, grid_with, text_lengths, tokens_of

_UNTIL = 0.25  # share of the noise schedule in which attention is read
_LEAST_STEPS = 2  # that are read in a run that begins later
SHARPNESS = 4.0
_SMOOTH = 8  # part of the picture's shorter side over which attention is smoothed
_NAMED = 0.5  # presence of a LoRA's words in a prompt
_TEMPERATURE = 0.05  # presence of a token, see `token_shares`
_LEAST_SHARE = 1e-3  # of a LoRA's attention that a token counts for
_LEAST_ATTENTION = 1e-6  # of the attention to all LoRAs' words, so that its logarithm is finite


class AttentionSums:
    """Sums up how much each position of the picture attends to the words of each LoRA.

    What is summed is the logarithm of a head's attention, less its mean over positions: so each head counts alike,
    whether it attends to the words much or little.

    Args:
        picture: The latent. patch: See `patch_size`. layout: Of sequences that hold text and picture.
        rows: The samples to read.
        shares: ``(rows, L, N)``, how much each token of the text belongs to each LoRA; 0 for those without a map.
        texts: Length of each sample's text in sequences that hold text and picture.
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
        texts: Sequence[int],
        total: Tensor | None,
    ) -> None:
        self.picture, self.layout, self.rows, self.texts, self.total = picture, layout, list(rows), texts, total
        self.patch, self.tokens, self.length = patch, tokens_of(picture, patch), shares.shape[1]
        self.words = (shares > _LEAST_SHARE).flatten(2).any(-1).any(0).nonzero()[:, 0]  # tokens of any LoRA
        self.shares = shares[:, self.words]

    def read(self, query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None = None) -> None:
        """Add an attention if its keys are the text, or hold it beside the picture; implements `AttentionObserver`."""
        if query.ndim == key.ndim == 3:  # one head
            query, key = query[:, None], key[:, None]
            mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
        if query.ndim != 4 or len(query) != self.picture.samples or query.shape[1] % key.shape[1]:
            return
        places = self.places(query.shape[2], key.shape[2])
        if places is None or places.grid.frames > 1:
            return
        grid, tokens, words = places.grid, self.tokens, self.words.to(key.device) + places.text
        q = places.of_picture(query, self.rows).detach().float()
        k = key[self.rows].index_select(2, words).detach().float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # several heads may share their keys
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            whole = mask.expand(*query.shape[:3], key.shape[2]).index_select(3, words)
            logits = _masked(logits, places.of_picture(whole, self.rows))
        attended = logits.softmax(-1).nan_to_num() @ self.shares[:, None].to(logits)  # (rows, heads, T, N)
        attended = attended.clamp_min(_LEAST_ATTENTION).log()
        attended = (attended - attended.mean(2, keepdim=True)).mean(1)
        attended = attended.mT.unflatten(2, (grid.height, grid.width)).cpu()
        if grid != tokens:
            attended = interpolate(attended, (tokens.height, tokens.width), mode="bilinear", align_corners=False)
        self.total = attended if self.total is None else self.total + attended

    def places(self, queries: int, keys: int) -> Places | None:
        """Where the picture's queries and the text's keys are in an attention; ``None`` if it does not hold both.

        Args:
            queries, keys: Number of positions.
        """
        if keys == self.length and queries != keys:
            grid = grid_with(self.picture, self.patch, queries)
            return None if grid is None else Places(grid, [0] * self.picture.samples, 0)
        count = self.tokens.count
        starts = self.layout.starts(count, queries, self.texts)
        if keys != queries or queries < count + max(self.texts) or not starts:
            return None
        starts = starts if len(starts) > 1 else starts * self.picture.samples
        return Places(self.tokens, starts, self.layout.text_start(count))


class Places(NamedTuple):
    """Positions of picture and text in an attention.

    Args:
        grid: The picture's positions. picture: Per sample, where they begin. text: Where the text begins.
    """

    grid: Tokens
    picture: Sequence[int]
    text: int

    def of_picture(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """The picture's positions ``(rows, heads, T, ..)`` of ``(B, heads, T', ..)``."""
        return torch.stack([x[row, :, self.picture[row] : self.picture[row] + self.grid.count] for row in rows])


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask


class WatchTorch(TorchFunctionMode):
    """While it is entered, an observer gets the arguments of torch's ``scaled_dot_product_attention``."""

    def __init__(self, read: AttentionObserver) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key, _, mask = (
                args[i] if len(args) > i else kwargs.get(name)
                for i, name in enumerate(("query", "key", "value", "attn_mask"))
            )
            self.read(query, key, kwargs.get("scale"), mask)
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
        total: ``(rows, N, height, width)``, see `AttentionSums`.
        named: ``(rows, N)`` bool, whether a sample's prompt names each LoRA.
        sharpness: How sharply the picture is divided.
    """
    competes = (named & (named.sum(1, keepdim=True) > 1))[..., None, None]
    competitors = competes.sum(1, keepdim=True).clamp_min(1)
    window = max(3, min(total.shape[2:]) // _SMOOTH | 1)
    z = avg_pool2d(total, window, 1, window // 2, count_include_pad=False)
    z = (z - z.mean((2, 3), keepdim=True)) * competes
    z = (z - z.sum(1, keepdim=True) / competitors) * competes
    s = (z.square().mean((2, 3), keepdim=True).sum(1, keepdim=True) / competitors).sqrt()
    scores = (sharpness * z / s.clamp_min(1e-12)).masked_fill(~competes, float("-inf"))
    maps = torch.where(competes.any(1, keepdim=True), scores, torch.zeros_like(scores)).softmax(1)
    return torch.where(competes, maps, torch.ones_like(maps))


class AutomaticRegions:
    """Maps that are read from the attention of the first steps of every sampling run.

    The maps of a step are from the attention in all steps before it, so that all prompts of a step get the same.

    Args:
        architecture: Name of the model's class, for messages.
        patch: See `patch_size`. layout: Of sequences that hold text and picture.

    Attributes:
        maps: ``(prompts, N, height, width)`` for this pass; ``None`` in the first step of a run.
    """

    def __init__(self, architecture: str, patch: Sequence[int], layout: SequenceLayout) -> None:
        self.architecture, self.patch, self.layout = architecture, patch, layout
        self.maps: Tensor | None = None
        self._step: int | None = None
        self._is_reading, self._steps_read = True, 0
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
        reader: SamplingReader,
        args: Sequence[Any],
        arguments: Mapping[str, Any],
    ) -> None:
        """Make the maps when a step begins, and begin to read attention in the first steps.

        Args:
            picture: The latent. text, mask: Text conditioning ``(B, L, F)`` and its padding.
            detector: Finds the words of the LoRAs in the text.
            rows: The samples of the prompt.
            reader: Knows the step, and watches attention.
            args, arguments: Positional and keyword arguments of the model.

        Raises:
            MergeError: There are no words, no attention could be read, the prompt has another number of parts, or it
                is for a part of the picture.
        """
        step = reader.step(args, arguments)
        if self._step is None or step < self._step:  # a new run
            self.maps = self._total = self._named = None
            self._steps_read = 0
        elif step > self._step and self._is_reading:
            self._steps_read += 1
            if self._total is not None and self._named is not None:
                self.maps = found_maps(self._total, self._named)
        self._step = step
        self._is_reading = self._steps_read < _LEAST_STEPS or not reader.reached(_UNTIL, args, arguments)
        if not self._is_reading and self.maps is None:
            raise MergeError(
                "Automatic regions could not read the attention of this model.",
                found=self.architecture,
                expected="attention by torch's scaled_dot_product_attention to the text's tokens",
                remedy="draw the regions, or start ComfyUI with --use-pytorch-cross-attention",
            )
        if not self._is_reading or not rows:
            return
        if detector is None or text is None:
            raise MergeError(
                "Automatic regions follow the words of the LoRAs, and these gates know none.",
                expected="gates that read text",
                remedy="give every LoRA its words and train gates, or connect CLIP to MoLE Mix; or draw the regions",
            )
        if reader.parts(arguments, picture) is not None:
            raise MergeError(
                "Automatic regions follow a prompt for the whole picture.",
                found="a prompt for an area",
                remedy="switch automatic regions off: each area uses the LoRAs that its prompt names anyway",
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
        shares = token_shares(logits, is_token)[list(rows)] * named[:, None]
        texts = text_lengths(text, mask if self.layout.without_padding else None) or []
        self._sums = AttentionSums(picture, self.patch, self.layout, rows, shares, texts, self._total)
        self._watch = reader.watch_attention(arguments, self._sums.read) or WatchTorch(self._sums.read)
        self._watch.__enter__()

    def end_pass(self) -> None:
        """Stop reading. Safe to call again."""
        if self._watch is not None and self._sums is not None:
            self._watch.__exit__(None, None, None)
            self._total, self._sums, self._watch = self._sums.total, None, None
