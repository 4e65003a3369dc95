"""Measure the statistics of a calibrated merge on a language model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.digest import identity
from ...core.errors import MergeError
from ...core.layers.align import align
from ...core.merge.statistics import Statistics
from ...core.mole.attach import attach
from ...core.mole.mixture import Mixture
from ...core.mole.scopes import uncompiled
from ...core.progress import Progress
from ...core.train.frozen import frozen
from ...core.train.measure import CalibrationSettings, ForwardPass, Kind, KindPasses, measure_passes
from .mixing import experts, layer_paths

NEUTRAL_TEXTS = (
    "The train to the coast leaves at ten past nine from platform four.",
    "She put the letters back into the drawer and closed the window before it rained.",
    "Water boils at a lower temperature on a high mountain than at the sea.",
    "How long does it take to walk from the station to the old town?",
    "The committee will meet again on Thursday to discuss the budget for next year.",
    "Add two spoons of sugar, stir well, and let the dough rest for an hour.",
    "He has lived in the same street since he finished school, and knows everyone there.",
    "The function returns the number of elements in the list, or zero if it is empty.",
    "Bees can see ultraviolet light, which guides them to the middle of a flower.",
    "In 1869 the canal was opened to ships of all nations.",
    "Please send me the report by Friday, and let me know if anything is missing.",
    "The museum is closed on Mondays, but the garden behind it is always open.",
    "A good chair supports the lower back and lets the feet rest flat on the floor.",
    "They lost the first two games and won the championship all the same.",
    "What would you recommend to somebody who has never read a novel by her?",
    "Prices rose by two percent in March, a little less than most people had expected.",
)
"""Texts for no adapter: the base model's own behaviour is measured on them."""
_INSTRUCTED = 8  # texts made from an instruction


def calibrate_language_model(
    model: Any,
    adapters: Sequence[Adapter],
    texts: Sequence[Sequence[str | Tensor]],
    tokenizer: Any = None,
    settings: CalibrationSettings | None = None,
    *,
    others: Sequence[str | Tensor] = NEUTRAL_TEXTS,
    progress: Progress | None = None,
) -> Statistics:
    """Measure the inputs of a language model's layers on texts for each adapter, and on others. The model is unchanged.

    LoRAs of embeddings are not measured, and are not on the model meanwhile. The adapters are measured at strength 1,
    each alone, whatever their weights in the merge.

    Args:
        model: A transformers model, not wrapped by PEFT.
        adapters: The adapters of the merge, as loaded.
        texts: Per adapter, a few texts that it is for, such as prompts of its task without answers: strings or token
            ids ``(T,)``. Four are nearly as good as many; by default at most 13 are used.
        tokenizer: The model's tokenizer; needed for strings only.
        settings: Measurement settings; default `CalibrationSettings()`.
        others: Texts for none of the adapters.
        progress: Called with (passes done, passes in all, description). May raise an exception to cancel.

    Raises:
        MergeError: The adapters are for another model, an adapter has no texts, or inputs are not finite.
    """
    settings = settings or CalibrationSettings()
    if len(texts) != len(adapters) or not all(texts):
        raise MergeError(
            "Every LoRA needs texts to be measured on.",
            expected=f"{len(adapters)} lists of at least one text",
            found=[len(part) for part in texts],
        )
    aligned = align([_without_embeddings(adapter) for adapter in adapters])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*are not low-rank updates")
        mixture = Mixture(tuple(experts(model, aligned)))
    paths = layer_paths(model, dict.fromkeys(name for adapter in aligned for name in adapter.modules))
    modules = {name: path for name, path in paths.items() if path is not None}
    each = sum(settings.samples_per_kind(len(adapters), len(adapters) + bool(others)))
    count = settings.samples or each // 2  # every text is read twice
    device = model.get_input_embeddings().weight.device

    def passes(part: Sequence[str | Tensor], gates: Sequence[float], seed: int) -> KindPasses:
        drawn = _draw(part, count, seed)
        runs = [_pass(model, _token_ids(text, tokenizer).to(device)) for text in drawn]
        return KindPasses(gates, runs, runs)

    one_hot = torch.eye(len(adapters)).tolist()
    kinds: dict[Kind, KindPasses] = {(i,): passes(part, one_hot[i], settings.seed + i) for i, part in enumerate(texts)}
    if others:
        kinds[()] = passes(others, [0.0] * len(adapters), settings.seed + len(adapters))
    with frozen([model]), attach(uncompiled(model), mixture) as attachment:
        moments = measure_passes(attachment, kinds, modules, settings, progress=progress)
    metadata = {"settings": json.dumps(settings.model_dump()), "texts": json.dumps([len(part) for part in texts])}
    return Statistics(moments, tuple(map(identity, adapters)), metadata=metadata)


def instructed_texts(instruction: str) -> list[str]:
    """Texts that put an adapter to work without texts of its task: its instruction, each with an unrelated sentence."""
    return [f"{instruction.strip()}\n\n{sentence}\n\n" for sentence in NEUTRAL_TEXTS[:_INSTRUCTED]]


def _draw(texts: Sequence[str | Tensor], count: int, seed: int) -> list[str | Tensor]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[i] for i in order[:count]]


def _pass(model: Any, ids: Tensor) -> ForwardPass:
    """One text at a time: padding would be measured too."""
    return lambda: model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])


def _token_ids(text: str | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, Tensor):
        return text
    if tokenizer is None:
        raise MergeError(
            "Texts given as strings need a tokenizer.",
            found=repr(text[:40]),
            remedy="give the model's tokenizer, or token ids",
        )
    return torch.tensor(tokenizer(text, truncation=True, max_length=1024)["input_ids"], dtype=torch.long)


def _without_embeddings(adapter: Adapter) -> Adapter:
    modules = {name: part for name, part in adapter.modules.items() if not name.endswith(".lora_embedding")}
    return adapter if len(modules) == len(adapter.modules) else replace(adapter, modules=modules)
