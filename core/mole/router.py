"""The prompt router: which LoRAs a prompt asks for, from the words that name their concepts. Needs no training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import MergeError
from ..merge.methods.calibrated import JOINT_SCALE
from .concepts import ConceptDetector
from .gates import Gate, GateSet, GateSettings, feature_spread

COMPOSE = JOINT_SCALE
"""Default of `compose`: what the calibrated merge aims at for prompts that name several LoRAs."""
_LOGIT_OFF = -4.0  # of a closed gate: 0.018 of the ceiling


def concepts_in(prompts: Sequence[str], concepts: Sequence[Sequence[str]]) -> Tensor:
    """Which concepts each prompt names: ``(P, N)`` bool. Matches whole words, ignoring case.

    Args:
        prompts: `P` prompts.
        concepts: Per expert, the words or phrases that name it; any one of them counts.
    """
    patterns = [concept_patterns(words) for words in concepts]
    rows = [[any(pattern.search(prompt) for pattern in words) for words in patterns] for prompt in prompts]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(prompts), len(concepts))


def concept_patterns(words: Sequence[str]) -> list[re.Pattern[str]]:
    """Patterns that find a concept's words or phrases in a prompt: whole words, ignoring case."""
    return [re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.I) for word in words]


def check_concepts(concepts: Sequence[Sequence[str]], experts: int) -> None:
    """Raise MergeError unless there is one list of words per expert."""
    if len(concepts) != experts:
        raise MergeError("Every LoRA needs words that name it.", expected=f"{experts} lists", found=len(concepts))


def routed_values(requested: Tensor, settings: GateSettings, compose: float = COMPOSE) -> Tensor:
    """The gate values of the router.

    Sigmoid gates: 1 for an expert that the prompt asks for, `compose` for each of several, 0 for the others. Softmax:
    equal shares of the experts it asks for; if it asks for none, equal shares of all, or of none with the null expert.

    Args:
        requested: ``(P, N)`` bool, the concepts that each prompt names, see `concepts_in`.

    Returns:
        ``(P, N)`` float32.
    """
    values = requested.float()
    if settings.activation == "sigmoid":
        return torch.where(values.sum(1, keepdim=True) > 1, compose * values, values)
    none = values.sum(1, keepdim=True) == 0
    if settings.activation == "softmax":
        values = torch.where(none, torch.ones_like(values), values)
    return values / values.sum(1, keepdim=True).clamp_min(1)


def route_gates(
    detector: ConceptDetector, settings: GateSettings, scopes: Iterable[str], *, compose: float = COMPOSE
) -> GateSet:
    """Gates that read ``text`` and act as the router does: they open for the concepts that `detector` finds.

    Sigmoid gates open to 1 for a concept alone, and to `compose` for all concepts together; for some of more than two
    to a value between. That value is reached by weights between the concepts, and the bias makes up for them: a gate is
    closed whatever other concepts are named.

    Args:
        detector: Of the experts' concepts.
        settings: Must read ``text``. scopes: The gates to make; all are alike.
        compose: Value of sigmoid gates of all concepts together.

    Raises:
        MergeError: Gates that read something else.
    """
    if settings.reads != "text":
        raise MergeError("The router is for gates that read the text.", expected="reads=text", found=settings.reads)
    n = len(detector.words)
    closed, opened, null = {
        "sigmoid": (_LOGIT_OFF, _logit(1.0, settings), 0.0),
        "softmax": (_LOGIT_OFF, 0.0, 0.0),
        "softmax-null": (2 * _LOGIT_OFF, 0.0, _LOGIT_OFF),
    }[settings.activation]
    together = 0.0 if n == 1 or settings.activation != "sigmoid" else (_logit(compose, settings) - opened) / (n - 1)
    closed -= (n - 1) * together  # the logit with no concept; `closed` with all others
    weight = (opened - closed - together) * torch.eye(n) + together
    gates: dict[str, Gate] = {}
    for scope in scopes:
        gate = Gate(n, n, settings, owner=torch.arange(n))
        with torch.no_grad():
            gate.weight[:n].copy_(weight)
            gate.bias.fill_(null)
            gate.bias[:n].fill_(closed)
        gates[scope] = gate
    return GateSet(n, settings, gates, detector)


def _logit(value: float, settings: GateSettings) -> float:
    """Logit of a sigmoid gate with this value, or of nearly the ceiling if the value is above it."""
    return -math.log(settings.ceiling / min(value, 0.98 * settings.ceiling) - 1)


def route_mean_gates(
    text: Tensor,
    requested: Tensor,
    settings: GateSettings,
    scopes: Iterable[str],
    *,
    ridge: float = 1.0,
    compose: float = COMPOSE,
) -> GateSet:
    """Gates that read ``text-mean`` and act as the router does on prompts like these, from least squares.

    A ridge regression from the standardised conditioning of some prompts to the logits of the router's gates. Gates
    that read ``text`` are better: these close when a prompt gets longer.

    Args:
        text: ``(P, F)``, the mean conditioning of prompts of every kind.
        requested: ``(P, N)`` bool, the concepts that each prompt names, see `concepts_in`.
        settings: Must read ``text-mean``. scopes: The gates to make; all are alike.
        ridge: Penalty on the weights, per feature of unit variance.
        compose: See `routed_values`.

    Raises:
        MergeError: Gates that read something else, or an expert that every prompt asks for, or none.
    """
    if settings.reads != "text-mean":
        raise MergeError(
            "These gates do not read the mean of the text.", expected="reads=text-mean", found=settings.reads
        )
    for i in range(requested.shape[1]):
        if requested[:, i].all() or not requested[:, i].any():
            raise MergeError(
                f"LoRA number {i + 1} is asked for by {'every' if requested[:, i].any() else 'no'} prompt.",
                expected="prompts with and without its words",
                remedy="add prompts of the other kind",
            )
    mean, spread = text.double().mean(0), feature_spread(text.double().var(0, unbiased=False))
    X = (text.double() - mean) / spread
    values = routed_values(requested, settings, compose).double()
    n = requested.shape[1]
    if settings.activation == "sigmoid":
        together = requested.sum(1, keepdim=True) > 1
        opened = torch.where(together, _logit(compose, settings), _logit(1.0, settings))
        Y = torch.where(requested, opened, _LOGIT_OFF).double()
    else:
        share = (values * (1 - 1e-2) + 1e-2 / n).clamp_min(1e-3)
        if settings.activation == "softmax-null":
            share = torch.cat([share, (1.01 - values.sum(1, keepdim=True)).clamp_min(1e-2)], 1)
        Y = share.log()
    bias = Y.mean(0)
    K = X @ X.mT + ridge * torch.eye(len(X), dtype=X.dtype)  # fewer prompts than features: the dual form is small
    W = torch.linalg.solve(K, Y - bias).mT @ X
    gates: dict[str, Gate] = {}
    for scope in scopes:
        gate = Gate(text.shape[1], n, settings, mean=mean.float(), spread=spread.float())
        with torch.no_grad():
            gate.weight.copy_(W)
            gate.bias.copy_(bias)
        gates[scope] = gate
    return GateSet(n, settings, gates)
