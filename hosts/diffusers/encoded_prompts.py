"""Observes the prompts that a pipeline encodes, and tells its passes with and without the prompt apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.mole.guidance import PromptGateSharing
from .replaced_method import ReplacedMethod

# Names that pipelines give their passes. Perturbed passes of the prompt are called "uncond", but read the prompt.
_PROMPT_PASSES = ("cond", "pred_cond")
_PERTURBED_PASSES = (
    "pred_cond_skip", "pred_cond_seg", "pred_cond_stg", "pred_cond_modality", "uncond_stg", "uncond_modality",
)  # fmt: skip
_OTHER_PASSES = ("uncond", "pred_uncond")


class EncodedTexts(NamedTuple):
    """The result of encoding a batch of prompts.

    Args:
        texts: The text behind each row.
        states: The conditioning, ``(B, T, F)``.
        mask: ``(B, T)`` bool, false for padding; ``None`` if the pipeline has no mask.
        negative: Whether it is the negative prompt.
    """

    texts: Sequence[str]
    states: Tensor
    mask: Tensor | None
    negative: bool


# Called with the prompt and the negative prompt, as far as they were encoded from text.
PromptObserver = Callable[[Sequence[EncodedTexts]], None]


def watch_prompts(pipe: Any, observer: PromptObserver) -> Callable[[], None]:
    """Call an observer after every call of `pipe.encode_prompt`; returns a function to stop."""
    if not hasattr(pipe, "encode_prompt"):
        return lambda: None
    signature = inspect.signature(pipe.encode_prompt)

    def encode_prompt(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        prefixes = ["", "negative_"] if "negative_prompt" in bound.arguments else [""]
        # some pipelines return masks or pooled states between the prompt's embeddings and the negative prompt's
        values: list[Any] = list(result) if isinstance(result, tuple | list) else [result]
        tensors = [value for value in values if isinstance(value, Tensor)]
        sequences = [tensor for tensor in tensors if tensor.ndim == 3]
        encoded: list[EncodedTexts] = []
        for i, (prefix, states) in enumerate(zip(prefixes, sequences, strict=False)):
            parts = [bound.arguments.get(f"{prefix}prompt{n}") for n in ("", "_2", "_3", "_4")]
            if prefix and bound.arguments.get("negative_prompt_embeds") is None:
                parts[0] = parts[0] or ""
            if parts[0] is not None:
                mask = _mask(tensors, states, i)
                encoded.append(EncodedTexts(_row_texts(parts, len(states)), states.detach(), mask, bool(prefix)))
        observer(encoded)
        return result

    return ReplacedMethod(pipe, "encode_prompt", encode_prompt).remove


def _mask(tensors: Sequence[Tensor], states: Tensor, number: int) -> Tensor | None:
    """The mask of the prompt (`number` 0) or the negative prompt (1) among the results of `encode_prompt`."""
    masks = [tensor for tensor in tensors if tensor.shape == states.shape[:2] and not tensor.is_floating_point()]
    return masks[number].bool() if number < len(masks) else None


def _row_texts(parts: Sequence[str | Sequence[str] | None], rows: int) -> list[str]:
    """The text behind each row of conditioning: the prompts of all encoders, joined; consecutive rows share a prompt.

    Args:
        parts: Per text encoder a prompt, a list of prompts, or ``None``.
        rows: Number of rows, a multiple of the number of prompts.
    """
    lists = [[part] if isinstance(part, str) else list(part) for part in parts if part is not None]
    count = max(map(len, lists))
    prompts = ["\n".join(dict.fromkeys(texts[i % len(texts)] or "" for texts in lists)) for i in range(count)]
    return [prompts[row * count // rows] for row in range(rows)]


class GuidanceRows:
    """Finds the rows of the prompt in a pipeline's forward passes; implements `PromptRows`.

    With guidance a pipeline passes negative prompt and prompt in one batch, in this order, or in separate passes: those
    have names (``cond``, ``uncond``), or are recognised by their conditioning.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.pass_name = ""
        self._sharing: PromptGateSharing | None = None
        self._encoded: dict[bool, Tensor] = {}  # of the prompt and, under true, of the negative prompt

    def __call__(self, arguments: Mapping[str, Any], batch: int) -> Sequence[int]:
        if self.pass_name in (*_PROMPT_PASSES, *_PERTURBED_PASSES):
            return range(batch)
        if self.pass_name in _OTHER_PASSES:
            return range(0)
        negative = None if self.pass_name else self._reads_negative(arguments.get("encoder_hidden_states"))
        if negative is None:
            if not getattr(self.pipe, "do_classifier_free_guidance", False):
                return range(batch)
            perturbed = getattr(self.pipe, "do_perturbed_attention_guidance", False)  # a second time with the prompt
            return range(batch // (3 if perturbed else 2), batch)
        if not negative:
            self._begin_step()
        return range(0) if negative else range(batch)

    def watch(self, model: nn.Module, sharing: PromptGateSharing) -> Callable[[], None]:
        """Follow the prompts that the pipeline encodes, and the names of its passes; returns a function to stop."""
        self._sharing = sharing
        stop_names, stop_prompts = self._watch_names(model), watch_prompts(self.pipe, self._record)

        def stop() -> None:
            stop_prompts()
            stop_names()
            self._sharing = None

        return stop

    def _watch_names(self, model: nn.Module) -> Callable[[], None]:
        if not hasattr(model, "cache_context"):
            return lambda: None

        @contextmanager
        def cache_context(original: Callable[..., Any], name: str, **kwargs: Any) -> Generator[None]:
            outer, self.pass_name = self.pass_name, name
            if name in _PROMPT_PASSES:
                self._begin_step()
            try:
                with original(name, **kwargs):
                    yield
            finally:
                self.pass_name = outer

        return ReplacedMethod(model, "cache_context", cache_context).remove

    def _begin_step(self) -> None:
        """The prompt passes alone: its gates are remembered for the other prompts' passes until it passes again."""
        if self._sharing is not None:
            self._sharing.separate_passes = True
            self._sharing.begin_step()

    def _record(self, encoded: Sequence[EncodedTexts]) -> None:
        self._encoded = {texts.negative: texts.states for texts in encoded}
        if self._sharing is not None:
            self._sharing.separate_passes = False
            self._sharing.forget()

    def _reads_negative(self, text: Any) -> bool | None:
        """Whether a pass reads the negative prompt alone, or the prompt alone; ``None`` if it reads something else."""
        if len(self._encoded) < 2 or not isinstance(text, Tensor) or torch.compiler.is_compiling():
            return None
        for negative, states in self._encoded.items():
            if states.data_ptr() == text.data_ptr() and states.shape == text.shape:
                return negative
        for negative, states in self._encoded.items():
            if states.shape == text.shape and torch.equal(states.to(text), text):
                return negative
        return None
