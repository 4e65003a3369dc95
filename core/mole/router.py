"""The prompt router: which LoRAs a prompt asks for, by the words that name their concepts. Needs no training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import MergeError
from .gates import Gate, GateSet, GateSettings

_OFF = -4.0  # logit of a closed gate: 0.018 of the ceiling


def named(prompts: Sequence[str], concepts: Sequence[Sequence[str]]) -> Tensor:
    """Which concepts each prompt names: ``(P, N)`` bool. Whole words, whatever their case.

    Args:
        prompts: `P` prompts.
        concepts: Per expert, the words or phrases that name it; any one of them counts.
    """
    patterns = [[re.compile(rf"(?<!\w){re.escape(w.strip())}(?!\w)", re.I) for w in words] for words in concepts]
    found = [[any(pattern.search(prompt) for pattern in words) for words in patterns] for prompt in prompts]
    return torch.tensor(found, dtype=torch.bool).reshape(len(prompts), len(concepts))


def check_concepts(concepts: Sequence[Sequence[str]], experts: int) -> None:
    """Raise MergeError unless there is one list of words per expert."""
    if len(concepts) != experts:
        raise MergeError("Every LoRA needs words that name it.", expected=f"{experts} lists", found=len(concepts))


def routed_values(asked: Tensor, settings: GateSettings) -> Tensor:
    """The gates a router wants: ``(P, N)`` float32 from which concepts are asked for.

    Sigmoids: 1 for an expert that is asked for, 0 for the rest. Softmax: equal shares of those asked for; where none
    is, equal shares of all, or of none with the null expert.
    """
    wanted = asked.float()
    if settings.activation == "sigmoid":
        return wanted
    none = wanted.sum(1, keepdim=True) == 0
    if settings.activation == "softmax":
        wanted = torch.where(none, torch.ones_like(wanted), wanted)
    return wanted / wanted.sum(1, keepdim=True).clamp_min(1)


def route_gates(
    text: Tensor, asked: Tensor, settings: GateSettings, scopes: Iterable[str], *, ridge: float = 1.0
) -> GateSet:
    """Gates that read the text conditioning and act as the router does, by least squares instead of training.

    A ridge regression from the standardised conditioning of some prompts to the logits of the gates the router wants.
    So the router works where only conditioning is left of a prompt, and also for wordings near the given ones.

    Args:
        text: ``(P, F)``, the pooled conditioning of prompts of every kind. asked: ``(P, N)`` bool, see `named`.
        settings: Must read text. scopes: The gates to make; all are alike.
        ridge: Penalty on the weights, per feature of unit spread.

    Raises:
        MergeError: Gates that do not read text, or an expert that every prompt asks for, or none.
    """
    if settings.reads != "text":
        raise MergeError("The router is for gates that read the text.", expected="reads=text", found=settings.reads)
    for i in range(asked.shape[1]):
        if asked[:, i].all() or not asked[:, i].any():
            raise MergeError(
                f"LoRA number {i + 1} is asked for by {'every' if asked[:, i].any() else 'no'} prompt.",
                expected="prompts with and without its words",
                remedy="add prompts of the other kind",
            )
    mean, spread = standardisation(text.double().mean(0), text.double().var(0, unbiased=False))
    X = (text.double() - mean) / spread
    wanted = routed_values(asked, settings).double()
    n = asked.shape[1]
    if settings.activation == "sigmoid":
        on = -math.log(settings.ceiling - 1)
        Y = torch.where(wanted > 0, on, _OFF).double()
    else:
        share = (wanted * (1 - 1e-2) + 1e-2 / n).clamp_min(1e-3)
        if settings.activation == "softmax-null":
            share = torch.cat([share, (1.01 - wanted.sum(1, keepdim=True)).clamp_min(1e-2)], 1)
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


def standardisation(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of features, the spread kept away from 0: what hardly varied in calibration must not explode."""
    floor = 0.01 * variance.mean()
    spread = (variance + floor).sqrt()
    return mean, torch.where(spread > 0, spread, torch.ones_like(spread))
