"""Which samples of a forward pass belong to the positive prompt, for all of ComfyUI's guiders.

A guider passes its prompts in any order, in one batch or one by one, and with any number of others: negative, empty,
middle. Each part of a batch carries the id of its prompt, and the guider knows which prompts are the positive ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.mole.concepts import text_mask
from ...core.mole.guidance import PromptGateSharing

# Guiders that are predicting, the innermost last. A guider may run another model too, without that model's wrappers.
_guiders: list[Any] = []


def predict_noise(sharing: PromptGateSharing, predict: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of ComfyUI's kind PREDICT_NOISE: remembers the guider during one of its steps."""
    _guiders.append(predict.class_obj)
    sharing.begin_step()
    try:
        return predict(*args, **kwargs)
    finally:
        _guiders.pop()


def is_positive(cond: Any) -> bool | None:
    """Whether a cond is the positive prompt of the guider; ``None`` if there is no guider that could tell."""
    ids = _positive_ids()
    return None if ids is None or cond is None else any(part.get("uuid") in ids for part in cond)


def prompt_rows(arguments: Mapping[str, Any], batch: int) -> Sequence[int]:
    """Return the samples of the positive prompt in a batch; implements `PromptRows`."""
    parts = prompt_numbers(arguments)
    size = batch // len(parts) or 1
    return [row for i, part in enumerate(parts) if part == 0 for row in range(i * size, min((i + 1) * size, batch))]


def prompt_numbers(arguments: Mapping[str, Any]) -> list[int]:
    """Return 0 for each part of a batch that belongs to the positive prompt, and another number for the others.

    Outside of a guider these are the positions in the list of prompts that the caller passes: the first is taken for
    the positive one.
    """
    options: Mapping[str, Any] = arguments.get("transformer_options") or {}
    numbers = list(options.get("cond_or_uncond") or [0])
    ids, uuids = _positive_ids(), options.get("uuids") or ()
    if ids is None or len(uuids) != len(numbers):
        return numbers
    return [0 if uuid in ids else 1 for uuid in uuids]


def prompt_texts(arguments: Mapping[str, Any]) -> Sequence[tuple[Tensor, Tensor | None]]:
    """Return the text conditionings of the positive prompt at this step, with their masks; implements `PromptTexts`."""
    context = arguments.get("context")
    if not _guiders or not isinstance(context, Tensor):
        return []
    sigmas = (arguments.get("transformer_options") or {}).get("sigmas")
    texts: list[tuple[Tensor, Tensor | None]] = []
    for cond in _positive_conds():
        parts = cond.get("model_conds", {})
        text: Any = getattr(parts.get("c_crossattn"), "cond", None)
        if isinstance(text, Tensor) and _is_active(cond, sigmas):
            on_device = text.to(context)
            mask = {"attention_mask": getattr(parts.get("attention_mask"), "cond", None)}
            texts.append((on_device, text_mask(mask, on_device)))
    return texts


def _positive_conds() -> list[Mapping[str, Any]]:
    return (getattr(_guiders[-1], "conds", None) or {}).get("positive") or []


def _positive_ids() -> set[Any] | None:
    ids = {cond.get("uuid") for cond in _positive_conds()} if _guiders else set()
    return ids - {None} or None


def _is_active(cond: Mapping[str, Any], sigmas: Any) -> bool:
    """Whether a cond's range of timesteps, as ComfyUI checks it, includes the current one."""
    if not isinstance(sigmas, Tensor):
        return True
    sigma = float(sigmas.flatten()[0])
    return not (sigma > cond.get("timestep_start", sigma) or sigma < cond.get("timestep_end", sigma))
