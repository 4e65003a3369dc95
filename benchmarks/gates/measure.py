"""Gate values of the prompts, of gates that read the text token by token and of gates that read its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.router import concepts_in, route_gates, route_mean_gates
from legomole.core.train import fit_detector
from legomole.core.train.prompts import prompts_for
from torch import Tensor

from .encoders import ChunkEncoder
from .prompts import Pair, bare, cases

NAMED, OTHER = 0.9, 0.3  # goals for a gate, relative to its value on the bare prompt

Words = Sequence[Sequence[str]]  # per LoRA, the words that name its concept


@dataclass(frozen=True)
class Row:
    """The gate of one concept for one prompt.

    Args:
        encoder: ``minilm`` or ``nano``. kind: One of `prompts.KINDS`.
        named: Whether the prompt names the concept.
        gate: Gate value. bare: Gate value on the bare prompt that names the concept.
    """

    encoder: str
    kind: str
    prompt: str
    concept: str
    named: bool
    gate: float
    bare: float

    @property
    def right(self) -> bool:
        return self.gate >= NAMED * self.bare if self.named else self.gate <= OTHER * self.bare


def token_gates(encoder: ChunkEncoder, words: Words) -> GateSet:
    """Gates of the prompt router, without training."""
    return route_gates(fit_detector(words, encoder).detector, GateSettings(), [""])


def mean_gates(encoder: ChunkEncoder, words: Words) -> GateSet:
    """Gates that read the mean of the text, from least squares on short prompts."""
    texts = [prompt.text for prompt in prompts_for(words)]
    text = torch.stack([encoder.encode(text).states.mean(0) for text in texts])
    return route_mean_gates(text, concepts_in(texts, words), GateSettings(reads="text-mean"), [""])


def gate_values(gates: GateSet, encoder: ChunkEncoder, prompt: str) -> Tensor:
    """``(N,)``, the mean over all gates of a set."""
    row = encoder.encode(prompt)
    features = gates.text_features(row.states[None], None if row.mask is None else row.mask[None])
    return torch.cat(gates.values(features)).mean(0)


@torch.no_grad()
def measure(name: str, encoder: ChunkEncoder, pair: Pair, gates: GateSet) -> list[Row]:
    """A row per prompt and concept of a pair; the gates are for its subject and its style, in this order."""

    def values(prompt: str) -> list[float]:
        return [round(value, 4) for value in gate_values(gates, encoder, prompt).tolist()]

    alone = [values(prompt)[i] for i, prompt in enumerate(bare(pair))]
    return [
        Row(name, case.kind, case.prompt, concept, named, gate, on)
        for case in cases(pair)
        for concept, named, gate, on in zip(
            (pair.subject, pair.style), case.named, values(case.prompt), alone, strict=True
        )
    ]


def share(rows: Sequence[Row], *, named: bool) -> tuple[int, int]:
    """Number of right rows and of all rows that name their concept, or that do not."""
    part = [row for row in rows if row.named == named]
    return sum(row.right for row in part), len(part)
