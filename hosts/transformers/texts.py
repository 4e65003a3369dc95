"""Prompts, padding and caches in the arguments of a transformers model, and its gradient checkpointing."""

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

_IGNORED_LABEL = -100
_CACHES = ("cache", "past_key_values")  # arguments with a key-value cache: since transformers 5.24, and before
_OTHER_CACHES = ("cache_params",)  # states of models without keys and values


class TransformersTextReader:
    """Implements `core.mole.texts.TextReader`.

    Args:
        model: The model; the arguments of its forward method are read by name.
        tokens: Whether the gates read each token by itself.
    """

    attachment: Attachment

    def __init__(self, model: Any, *, tokens: bool) -> None:
        self.model, self.tokens = model, tokens
        self.parameter_names = [p.name for p in inspect.signature(model.forward).parameters.values()]
        can_generate = getattr(model, "can_generate", None)
        self.predicts = can_generate is not None and can_generate()  # whether labels are the next tokens
        # per cache, the gate values of the prompt that started it; weak keys: an entry is dropped with its cache
        self.cached_gates: WeakKeyDictionary[Any, Mapping[str, Tensor]] = WeakKeyDictionary()
        self.cache: Any = None
        self.generating = False
        self.generation_prompt: Tensor | None = None  # (B, T) bool, of the current call of `generate`

    def install(self, attachment: Attachment) -> None:
        """Patch `generate` of the model until the mixture is detached."""
        self.attachment = attachment
        generate: Callable[..., Any] | None = getattr(self.model, "generate", None)
        if generate is not None:
            before = self.model.__dict__.get("generate")
            self.model.generate = _PatchedGenerate(self, generate)
            attachment.at_detach(lambda: _restore_attribute(self.model, "generate", before))

    @contextmanager
    def generation(self) -> Generator[None]:
        """Inside the block, all forward passes without a cache belong to the same prompts."""
        outer = self.generating, self.generation_prompt
        self.generating, self.generation_prompt = True, None
        try:
            yield
        finally:
            self.generating, self.generation_prompt = outer

    def begin_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TextPositions:
        """See `core.mole.texts.TextReader`.

        Raises:
            MergeError: The call has a cache that was started without the mixture, or with another batch size.
        """
        given = dict(zip(self.parameter_names, args, strict=False)) | dict(kwargs)
        self._patch_checkpointing()
        self.cache = next((v for name in _CACHES if (v := given.get(name)) is not None), None)
        ids = next((v for k in ("input_ids", "inputs_embeds") if isinstance(v := given.get(k), Tensor)), None)
        if ids is None:
            return TextPositions()
        B, T = ids.shape[:2]
        past = _cached_tokens(self.cache)
        positions = _without_padding(given.get("attention_mask"), B, T, past).to(ids.device)
        if self.tokens:
            return TextPositions(positions)
        if past or any(given.get(name) is not None for name in _OTHER_CACHES):
            return TextPositions(prompt_gates=self._gates_of_cache(B))
        if self.generating:
            if self.generation_prompt is None:
                self.generation_prompt = positions
            return TextPositions(self.generation_prompt)
        labels: Any = given.get("labels") if self.predicts else None
        if labels is not None and labels.shape == positions.shape:
            positions = positions & _before_labels(labels.to(positions.device), positions)
        return TextPositions(positions)

    def end_pass(self, output: Any, values: Mapping[str, Tensor]) -> None:
        new_cache = next((v for name in _CACHES if (v := getattr(output, name, None)) is not None), None)
        cache = self.cache if self.cache is not None else new_cache
        self.cache = None
        if not self.tokens and hasattr(cache, "get_seq_length"):
            self.cached_gates[cache] = {scope: value.detach() for scope, value in values.items()}

    def _gates_of_cache(self, batch: int) -> Mapping[str, Tensor]:
        """Gate values ``(B, N)`` or ``(1, N)`` by scope, of the prompt that started the current cache."""
        gates = self.cached_gates.get(self.cache) if hasattr(self.cache, "get_seq_length") else None
        if gates is None:
            raise MergeError(
                "The gates of this cache's prompt are unknown.",
                found="a cache started before the mixture was attached, a copied cache, or one of another kind",
                remedy="run the prompt inside the with block too, or call the model with use_cache=False",
            )
        if sizes := {len(value) for value in gates.values()} - {1, batch}:
            raise MergeError(
                "The cache was started with another number of texts.",
                expected=min(sizes),
                found=batch,
                remedy="start a new cache with these prompts",
            )
        return gates

    def _patch_checkpointing(self) -> None:
        """Restore the gates of a pass when the model's own checkpointing recomputes its blocks in the backward pass."""
        if not (torch.is_grad_enabled() and getattr(self.model, "is_gradient_checkpointing", False)):
            return
        for module in self.model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is None or isinstance(function, _PatchedCheckpointing):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                raise MergeError(
                    "Gates get no gradients through reentrant gradient checkpointing.",
                    found="use_reentrant=True",
                    remedy="call gradient_checkpointing_enable({'use_reentrant': False})",
                )
            patched = _PatchedCheckpointing(function, self.attachment)
            module._gradient_checkpointing_func = patched  # type: ignore[assignment]
            self.attachment.at_detach(lambda m=module, patched=patched: patched.remove(m))


class _PatchedGenerate:
    """Replaces a model's `generate`: tells the text reader which forward passes belong to one generation."""

    def __init__(self, texts: TransformersTextReader, generate: Callable[..., Any]) -> None:
        self.texts, self.generate = texts, generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or getattr(self.texts.model, "generation_config", None)
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if size is not None and not self.texts.tokens and self.texts.attachment.bank.gates.trained:
            raise MergeError(
                "These gates read the whole prompt, but the prompt would be computed in chunks.",
                found=f"prefill_chunk_size={size}",
                remedy="generate without it, or choose gates that read each token",
            )
        with self.texts.generation():
            return self.generate(*args, **kwargs)


class _PatchedCheckpointing:
    """Replaces a module's checkpointing function: recomputed blocks find the gates of their own forward pass."""

    def __init__(self, function: Callable[..., Any], attachment: Attachment) -> None:
        self.function, self.attachment = function, attachment

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(self.attachment.recomputable(block), *args, **kwargs)

    def remove(self, module: Any) -> None:
        if module.__dict__.get("_gradient_checkpointing_func") is self:
            module._gradient_checkpointing_func = self.function


def _restore_attribute(owner: Any, name: str, before: Any) -> None:
    """Set an instance's attribute as it was; ``None`` means that only its class had it."""
    if before is None:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


def _cached_tokens(cache: Any) -> int:
    """Number of tokens in a cache; 1 for a cache that does not say."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 1


def _without_padding(mask: Any, batch: int, length: int, past: int) -> Tensor:
    """``(B, T)`` bool: which of the new tokens are not padding.

    Args:
        mask: The attention mask, in any form that transformers uses: ``(B, past + T)`` over all tokens; the attention
            of each new token, ``(B, 1, T, ..)`` as bool, or as floats with 0 where it may attend; a dict of masks by
            layer type; or ``None`` for no padding.
        batch: Number of texts `B`.
        length: Number of new tokens `T`.
        past: Number of tokens in the cache.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return torch.ones(batch, length, dtype=torch.bool)
    if mask.ndim == 4:
        last = mask[:, 0, -1]  # the last token attends to every token of its text
        attended = last if last.dtype == torch.bool else last == 0
        return attended[:, past : past + length].expand(batch, -1)
    return mask[:, -length:].bool()


def _before_labels(labels: Tensor, positions: Tensor) -> Tensor:
    """``(B, T)`` bool: positions before the first token to be predicted; at least the first of the text's positions."""
    T = labels.shape[1]
    index = torch.arange(T, device=labels.device)
    first_label = torch.where((labels != _IGNORED_LABEL) & (index > 0), index, T).min(1).values
    start = torch.where(positions, index, T).min(1).values
    return index < torch.maximum(first_label, start + 1)[:, None]
