"""What the arguments of a transformers model say of its texts: prompts, padding, caches; and its checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...core.errors import MergeError
from ...core.mole.attach import Attachment
from ...core.mole.texts import TextPositions

_IGNORED = -100  # the label of a token that is not to be predicted
_CACHES = ("cache", "past_key_values")  # of keys and values: since transformers 5.24, and before
_OTHER_CACHES = ("cache_params",)  # states of models without keys and values


class PromptTexts:
    """Implements `core.mole.texts.TextReader`.

    Args:
        model: Its forward's arguments are understood. tokens: Whether gates read each token.
    """

    attachment: Attachment

    def __init__(self, model: Any, *, tokens: bool) -> None:
        self.model, self.tokens = model, tokens
        self.names = [p.name for p in inspect.signature(model.forward).parameters.values()]
        can_generate = getattr(model, "can_generate", None)
        self.predicts = can_generate is not None and can_generate()  # so that labels are the next tokens
        # the gates of the prompt a cache began with; they go when the cache does
        self.known: WeakKeyDictionary[Any, Mapping[str, Tensor]] = WeakKeyDictionary()
        self.cache: Any = None
        self.generating = False
        self.asked: Tensor | None = None  # the prompts of the generation that is going on

    def listen(self, attachment: Attachment) -> None:
        """Be told of generations and of the model's own checkpointing, until the mixture is taken off."""
        self.attachment = attachment
        inner: Callable[..., Any] | None = getattr(self.model, "generate", None)
        if inner is not None:
            before = self.model.__dict__.get("generate")
            self.model.generate = _Generate(self, inner)
            attachment.at_detach(lambda: _put_back(self.model, "generate", before))

    @contextmanager
    def generation(self) -> Generator[None]:
        """Inside the block all passes without a cache are over the same prompts."""
        outer = self.generating, self.asked
        self.generating, self.asked = True, None
        try:
            yield
        finally:
            self.generating, self.asked = outer

    def begin_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TextPositions:
        """See `core.mole.texts.TextReader`.

        Raises:
            MergeError: A cache that was begun without the mixture, or by another number of texts.
        """
        given = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        self._checkpoints()
        self.cache = next((v for name in _CACHES if (v := given.get(name)) is not None), None)
        ids = next((v for k in ("input_ids", "inputs_embeds") if isinstance(v := given.get(k), Tensor)), None)
        if ids is None:
            return TextPositions()
        B, T = ids.shape[:2]
        past = _length(self.cache)
        own = _own(given.get("attention_mask"), B, T, past).to(ids.device)
        if self.tokens:
            return TextPositions(own)
        if past or any(given.get(name) is not None for name in _OTHER_CACHES):
            return TextPositions(prompt_gates=self._kept(B))
        if self.generating:
            asked = self.asked = own if self.asked is None else self.asked
            return TextPositions(asked)
        labels: Any = given.get("labels") if self.predicts else None
        if labels is not None and labels.shape == own.shape:
            own = own & _before_labels(labels.to(own.device), own)
        return TextPositions(own)

    def end_pass(self, output: Any, values: Mapping[str, Tensor]) -> None:
        made = next((v for name in _CACHES if (v := getattr(output, name, None)) is not None), None)
        cache = self.cache if self.cache is not None else made
        self.cache = None
        if not self.tokens and hasattr(cache, "get_seq_length"):
            self.known[cache] = {scope: value.detach() for scope, value in values.items()}

    def _kept(self, batch: int) -> Mapping[str, Tensor]:
        kept = self.known.get(self.cache) if hasattr(self.cache, "get_seq_length") else None
        if kept is None:
            raise MergeError(
                "The gates do not know the prompt that this cache began with.",
                found="a cache from before the mixture was put on, a copy of one, or one of another kind",
                remedy="run the prompt inside the with block too, or call the model with use_cache=False",
            )
        if wrong := {len(value) for value in kept.values()} - {1, batch}:
            raise MergeError(
                "The cache began with another number of texts.", expected=min(wrong), found=batch,
                remedy="run the prompts anew",
            )  # fmt: skip
        return kept

    def _checkpoints(self) -> None:
        """Blocks that the model runs again in the backward pass must find the gates as they were."""
        if not (torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False)):
            return
        for module in self.model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is None or isinstance(function, _Checkpoint):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                raise MergeError(
                    "Gates get no gradients through this kind of gradient checkpointing.",
                    found="use_reentrant=True",
                    remedy="call gradient_checkpointing_enable({'use_reentrant': False})",
                )
            module._gradient_checkpointing_func = own = _Checkpoint(function, self.attachment)  # type: ignore[assignment]
            self.attachment.at_detach(lambda m=module, own=own: own.remove(m))


class _Generate:
    """In place of a model's `generate`."""

    def __init__(self, texts: PromptTexts, inner: Callable[..., Any]) -> None:
        self.texts, self.inner = texts, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or getattr(self.texts.model, "generation_config", None)
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if size is not None and not self.texts.tokens and self.texts.attachment.bank.gates.trained:
            raise MergeError(
                "These gates read the whole prompt, and it is to be computed in pieces.",
                found=f"prefill_chunk_size={size}",
                remedy="generate without it, or choose gates that read each token",
            )
        with self.texts.generation():
            return self.inner(*args, **kwargs)


class _Checkpoint:
    """In place of the function a module checkpoints with."""

    def __init__(self, function: Callable[..., Any], attachment: Attachment) -> None:
        self.function, self.attachment = function, attachment

    def __call__(self, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(self.attachment.recomputable(part), *args, **kwargs)

    def remove(self, module: Any) -> None:
        if module.__dict__.get("_gradient_checkpointing_func") is self:
            module._gradient_checkpointing_func = self.function


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is None:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


def _length(cache: Any) -> int:
    """How many tokens a cache holds."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 1


def _own(mask: Any, batch: int, length: int, past: int) -> Tensor:
    """``(B, T)`` bool: which of the new tokens are no padding.

    Args:
        mask: Of all tokens, ``(B, past + T)``; or, as `generate` makes it for some caches, what each new token may look
            at, ``(B, 1, T, ..)``, bool or 0 where it may, alone or by the kind of the layers; ``None``: no padding.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return torch.ones(batch, length, dtype=torch.bool)
    if mask.ndim == 4:
        seen = mask[:, 0, -1]  # the last token looks at all of its text
        own = seen if seen.dtype == torch.bool else seen == 0
        return own[:, past : past + length].expand(batch, -1)
    return mask[:, -length:].bool()


def _before_labels(labels: Tensor, own: Tensor) -> Tensor:
    """``(B, T)`` bool: the positions before the first token to be predicted, at least the text's first."""
    T = labels.shape[1]
    at = torch.arange(T, device=labels.device)
    first = torch.where((labels != _IGNORED) & (at > 0), at, T).min(1).values
    start = torch.where(own, at, T).min(1).values
    return at < torch.maximum(first, start + 1)[:, None]
