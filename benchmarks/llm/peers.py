"""The same adapters with PEFT's own merges and its X-LoRA, and RobustMerge, which merges the factors apart."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from peft import PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import cross_entropy

from .adapters import TaskAdapters
from .methods import RANK, Method, using
from .model import last_logits
from .train import masters_of, stepping

_EXAMPLES, _STEPS, _BATCH, _LR = 32, 100, 8, 1e-3  # of the training of X-LoRA's classifier, as for our gates
_KEPT = 0.2  # share of each factor's entries that RobustMerge keeps: its authors' choice


def peft_merge(kind: str, rank: str = str(RANK), **options: Any) -> Method:
    """Merge with PEFT's ``add_weighted_adapter``, all weights 1.

    Args:
        kind: Its ``combination_type``. rank: Rank of the result, for the table. options: Its further arguments.
    """

    def compute(adapters: TaskAdapters) -> Adapter:
        names = list(map(str, range(len(adapters.folders))))
        model = PeftModel.from_pretrained(adapters.model, adapters.folders[0], adapter_name=names[0])
        try:
            for name, folder in zip(names[1:], adapters.folders[1:], strict=True):
                model.load_adapter(folder, adapter_name=name)
            model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=kind, **options)
            return Adapter(dict(_merged_layers(model)))
        finally:
            model.unload()

    return Method(using(compute), rank)


def _merged_layers(model: Any) -> Generator[tuple[str, LowRank]]:
    """Name and update of every layer of PEFT's adapter ``merged``."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "merged" in layer.lora_A:
            A, B = (factors["merged"].weight.detach().clone() for factors in (layer.lora_A, layer.lora_B))
            yield name.removeprefix("base_model.model."), LowRank(A, B, layer.scaling["merged"] * len(A))


def robust_merge(adapters: TaskAdapters) -> Adapter:
    """RobustMerge: the largest entries of `A` and of `B`, summed and averaged apart.

    ``A = sum_n m(A_n)`` and ``B = sum_n s_n m(B_n) / sum_n s_n``, where `m` keeps the largest entries and ``s_n`` is,
    for each row of ``A_n``, its L1 norm divided by that of the entries kept. The factors need one rank: smaller ones
    are filled up with zeros, which take no part in the mean. Scales are put into `B`.

    Source: arXiv:2502.17159 section 4.
    """
    names = dict.fromkeys(name for adapter in adapters.adapters for name in adapter.modules)
    modules: dict[str, LowRank] = {}
    for name in names:
        parts = [adapter.modules[name] for adapter in adapters.adapters if name in adapter.modules]
        rank = max(len(part.A) for part in parts)
        A, B, total = torch.zeros(rank, parts[0].d_in), torch.zeros(parts[0].d_out, rank), torch.zeros(rank)
        for part in parts:
            r, own = len(part.A), part.A.float()
            kept = largest(own)
            norm = kept.abs().sum(1)
            s = torch.where(norm > 0, own.abs().sum(1) / norm, 0)
            A[:r] += kept
            B[:, :r] += s * largest(part.scale * part.B.float())
            total[:r] += s
        modules[name] = LowRank(A, B / total.clamp_min(1e-12))
    return Adapter(modules)


def largest(matrix: Tensor) -> Tensor:
    """The matrix with all but the share `_KEPT` of its entries, the largest, set to zero."""
    smallest = matrix.abs().flatten().kthvalue(max(1, round(matrix.numel() * (1 - _KEPT)))).values
    return torch.where(matrix.abs() >= smallest, matrix, 0)


@contextmanager
def _xlora_model(adapters: TaskAdapters) -> Generator[Any]:
    model = adapters.model
    cache, model.config.use_cache = model.config.use_cache, False
    paths = {str(i): str(folder) for i, folder in enumerate(adapters.folders)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=paths)
    config.layerwise_scalings = True
    wrapped = get_peft_model(model, config)
    try:
        yield wrapped
    finally:
        wrapped.base_model.lora_model.unload()
        model.config.use_cache = cache


def _xlora_training(adapters: TaskAdapters) -> dict[str, Tensor]:
    """Train X-LoRA's classifier on the same labelled prompts, steps and batches as our gates."""
    world, draw = adapters.world, random.Random(adapters.seed)
    examples = [(e.ids, world.task(t).first[e.label]) for t in adapters.tasks for e in world.task(t).train[:_EXAMPLES]]
    torch.manual_seed(adapters.seed)
    with _xlora_model(adapters) as model:
        classifier = model.base_model.internal_xlora_classifier
        parameters = list(classifier.parameters())
        masters = masters_of(parameters)
        optimizer = torch.optim.AdamW(masters, lr=_LR, weight_decay=0.0)
        for _ in range(_STEPS):
            batch = draw.sample(examples, _BATCH)
            loss = cross_entropy(
                last_logits(model, [ids for ids, _ in batch]).float(), torch.tensor([token for _, token in batch])
            )
            loss.backward()
            with stepping(parameters, masters):
                optimizer.step()
        return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


@contextmanager
def _xlora(adapters: TaskAdapters, _: float) -> Generator[Any]:
    trained = adapters.cached(_xlora_training)
    with _xlora_model(adapters) as model:
        model.base_model.internal_xlora_classifier.load_state_dict(trained)
        yield model


PEERS: dict[str, Method] = {
    "peft svd": peft_merge("svd", svd_rank=RANK),
    "peft ties": peft_merge("ties_svd", svd_rank=RANK, density=0.5),
    "peft dare": peft_merge("dare_linear_svd", svd_rank=RANK, density=0.5),
    "robustmerge": Method(using(robust_merge), "largest"),
    "xlora": Method(_xlora, "-", f"{_EXAMPLES} examples", fixed=True, whole=True),
}
