"""Fit a concept detector: logistic regression on the text states of single tokens.

Positive examples are the words that name a concept: of each occurrence the token counts that is recognised best, so
that a phrase is found by the token that sets it apart. Negative examples are all other tokens, near misses included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import MergeError
from ..mole.concepts import ConceptDetector, smooth_maximum
from ..mole.gates import feature_spread, rms_normalised
from ..mole.router import concept_patterns
from ..progress import Progress
from .detection_prompts import detection_prompts

_PENALTY = 1e-3  # on the squared weights of standardised features
_MOST_NEGATIVES = 8192  # tokens
_ITERATIONS = 300
_ENOUGH = 0.9  # of the prompts that name a concept, the share in which it should be found
_ALWAYS = 30.0  # score of an expert without words
_NEXT_WORD = " zzz"  # changes the tokens after a prefix, and only those


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt as the model gets it.

    Args:
        states: ``(T, F)``, the text conditioning.
        mask: ``(T,)`` bool, false for padding; ``None`` if the host has no mask.
        offsets: Name of a tokenizer -> position in `states` of its first token. Tokenizers whose tokens have no
            position there are missing.
    """

    states: Tensor
    mask: Tensor | None
    offsets: Mapping[str, int]


class FittedDetector(NamedTuple):
    """A detector, and sentences for users on concepts that it does not tell from other words."""

    detector: ConceptDetector
    notes: tuple[str, ...]


class PromptEncoder(Protocol):
    """A host's text encoders."""

    def encode(self, prompt: str) -> EncodedPrompt:
        """Encode a prompt as for sampling."""
        ...

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        """Name of a tokenizer -> token ids of a prompt, special tokens included."""
        ...


def fit_detector(
    concepts: Sequence[Sequence[str]],
    encoder: PromptEncoder,
    texts: Sequence[str] = (),
    *,
    progress: Progress | None = None,
) -> FittedDetector:
    """Fit a detector of the experts' concepts. Takes seconds and no images.

    Args:
        concepts: Per expert, the words or phrases that name its concept in a prompt. An expert without words counts
            as present in every text.
        encoder: The host's text encoders.
        texts: Further prompts to fit on, such as the user's own.
        progress: Called with (done, total, description). May raise an exception to cancel.

    Raises:
        MergeError: No concept has words, or one has words that the text encoders never get.
    """
    concepts = [[word.strip() for word in words if word.strip()] for words in concepts]
    if not any(concepts):
        raise MergeError(
            "No LoRA has words that name its concept.", expected="words such as 'ember style'", found="none"
        )
    prompts = list(dict.fromkeys([*detection_prompts([words for words in concepts if words]), *texts]))
    encoded: list[EncodedPrompt] = []
    for i, prompt in enumerate(prompts):
        encoded.append(encoder.encode(prompt))
        if progress is not None:
            progress(i + 1, len(prompts), "encoding prompts")
    always = torch.zeros(encoded[0].states.shape[1]), torch.tensor(_ALWAYS)
    tokens = [_tokens(prompt, row, encoder) for prompt, row in zip(prompts, encoded, strict=True)]
    rows: list[tuple[Tensor, Tensor]] = []
    named: list[list[bool]] = []
    for words in concepts:
        occurrences = [_occurrences(*each, encoder, words) for each in zip(prompts, encoded, tokens, strict=True)]
        rows.append(_fit(encoded, tokens, occurrences, words) if words else always)
        named.append([bool(masks) for masks in occurrences])
    detector = ConceptDetector(torch.stack([w for w, _ in rows]), torch.stack([b for _, b in rows]), concepts)
    return FittedDetector(detector, _notes(detector, encoded, torch.tensor(named).T))


def _notes(detector: ConceptDetector, encoded: Sequence[EncodedPrompt], named: Tensor) -> tuple[str, ...]:
    """Sentences on concepts that are not told from other words in the prompts of the fit.

    Args:
        detector: The detector. encoded: The prompts.
        named: ``(P, N)`` bool, the concepts that each prompt names within the text that is encoded.
    """
    found = torch.cat([detector(row.states[None], None if row.mask is None else row.mask[None]) for row in encoded])
    found = found > 0.5
    notes: list[str] = []
    for i, words in enumerate(detector.words):
        if not words:
            continue
        hits = float(found[named[:, i], i].float().mean())
        false = float(found[~named[:, i], i].float().mean())
        if hits < _ENOUGH or false > 1 - _ENOUGH:
            notes.append(
                f"the text encoders hardly tell {' or '.join(map(repr, words))} from other words: found in {hits:.0%} "
                f"of the prompts that name it and in {false:.0%} of the others"
            )
    return tuple(notes)


def _occurrences(
    prompt: str, row: EncodedPrompt, is_token: Tensor, encoder: PromptEncoder, words: Sequence[str]
) -> list[Tensor]:
    """``(T,)`` bool per occurrence of the words: its tokens. Occurrences in a part that was cut off are left out."""
    masks: list[Tensor] = []
    rest = is_token
    for start, end in [m.span() for pattern in concept_patterns(words) for m in pattern.finditer(prompt)]:
        positions = _positions(prompt, start, end, row, encoder)
        mask = rest.clone() if positions is None else torch.zeros_like(rest)
        if positions is not None:
            mask[positions] = rest[positions]
        masks += [mask] if mask.any() else []
        rest = rest & ~mask
    return masks


def _fit(
    encoded: Sequence[EncodedPrompt],
    tokens: Sequence[Tensor],
    occurrences: Sequence[Sequence[Tensor]],
    words: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Weight ``(F,)`` and bias ``()`` of one concept."""
    bags: list[Tensor] = []  # states (t, F) of each occurrence
    others: list[Tensor] = []
    for row, is_token, masks in zip(encoded, tokens, occurrences, strict=True):
        bags += [row.states[mask] for mask in masks]
        others.append(row.states[is_token & ~torch.stack(masks).any(0)] if masks else row.states[is_token])
    if not bags:
        raise MergeError(
            "The text encoders never get the words of a LoRA.",
            expected="words that fit into a prompt",
            found=" or ".join(map(repr, words)),
        )
    positive, negative = rms_normalised(torch.cat(bags)), rms_normalised(_some_rows(torch.cat(others)))
    mean, spread = _mean_and_spread(torch.cat([positive, negative]))
    positive, negative = (positive.double() - mean) / spread, (negative.double() - mean) / spread
    weight, bias = _logistic_regression(positive, [len(bag) for bag in bags], negative)
    weight = weight / spread
    return weight.float(), (bias - weight @ mean).float()


def _logistic_regression(positive: Tensor, sizes: Sequence[int], negative: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that maximise the likelihood; positives and negatives count alike.

    Args:
        positive: ``(P, F)`` float64, tokens of all occurrences. sizes: Number of tokens of each occurrence.
        negative: ``(n, F)`` float64.
    """
    occurrence = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    place = torch.cat([torch.arange(size) for size in sizes])
    valid = torch.zeros(len(sizes), max(sizes), dtype=torch.bool)
    valid[occurrence, place] = True
    parameters = torch.zeros(positive.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-7
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:-1], parameters[-1]
        scores = positive.new_zeros(valid.shape).index_put((occurrence, place), positive @ weight + bias)
        named = smooth_maximum(scores, valid)
        others = negative @ weight + bias
        value = (
            binary_cross_entropy_with_logits(named, torch.ones_like(named)) / 2
            + binary_cross_entropy_with_logits(others, torch.zeros_like(others)) / 2
            + _PENALTY / 2 * weight.square().sum()
        )
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return parameters[:-1].detach(), parameters[-1].detach()


def _tokens(prompt: str, row: EncodedPrompt, encoder: PromptEncoder) -> Tensor:
    """``(T,)`` bool: the positions to learn from. Of equal tokens at the end (padding) three are enough."""
    is_token = row.states.square().sum(-1) > 0
    is_token = is_token if row.mask is None else is_token & row.mask
    for name, ids in encoder.token_ids(prompt).items() if row.offsets else ():
        start = len(ids) - next((i for i, id in enumerate(reversed(ids)) if id != ids[-1]), len(ids))
        if name in row.offsets and len(ids) - start > 3:
            first, last = row.offsets[name] + start, row.offsets[name] + len(ids) - 1
            middle = (first + last) // 2
            is_token[first + 1 : middle] = False
            is_token[middle + 1 : last] = False
    return is_token


def _some_rows(rows: Tensor) -> Tensor:
    if len(rows) <= _MOST_NEGATIVES:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MOST_NEGATIVES]
    return rows[chosen.sort().values]


def _mean_and_spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.double()
    return rows.mean(0), feature_spread(rows.var(0, unbiased=False))


def _positions(prompt: str, start: int, end: int, row: EncodedPrompt, encoder: PromptEncoder) -> list[int] | None:
    """Positions in the conditioning of the tokens of ``prompt[start:end]``; ``None`` if they cannot be found.

    The tokens of a prefix of a prompt are found by what does not change when the text goes on in another way. This
    works for every tokenizer that splits text at spaces, whatever special tokens or templates it adds.
    """
    if not row.offsets:
        return None
    first = _common_lengths(prompt[:start].rstrip(), encoder)
    last = _common_lengths(prompt[:end], encoder)
    positions = [
        offset + i
        for name, offset in row.offsets.items()
        for i in range(first.get(name, 0), last.get(name, 0))
        if 0 <= offset + i < len(row.states)
    ]
    return positions


def _common_lengths(prefix: str, encoder: PromptEncoder) -> dict[str, int]:
    """Per tokenizer, the number of tokens of a prefix that stay when another word follows."""
    ids, longer = encoder.token_ids(prefix), encoder.token_ids(prefix + _NEXT_WORD)
    return {name: _common_length(ids[name], longer[name]) for name in ids}


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
