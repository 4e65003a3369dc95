"""Observes the prompts that a pipeline encodes, and tells its passes with and without the prompt apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...core.mole.guidance import PromptGateSharing

# Called with the text behind each row, the conditioning (P, T, F), and whether it is the negative prompt.
PromptObserver = Callable[[Sequence[str], Tensor, bool], None]


def watch_prompts(pipe: Any, observer: PromptObserver) -> Callable[[], None]:
    """Call an observer for every prompt that `pipe.encode_prompt` encodes from text; returns a function to stop."""
    original: Callable[..., Any] = pipe.encode_prompt
    before = pipe.__dict__.get("encode_prompt")
    signature = inspect.signature(original)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        prefixes = ["", "negative_"] if "negative_prompt" in bound.arguments else [""]
        # some pipelines return masks or pooled states between the prompt's embeddings and the negative prompt's
        sequences = [value for value in result if isinstance(value, Tensor) and value.ndim == 3]
        for prefix, embeddings in zip(prefixes, sequences, strict=False):
            parts = [bound.arguments.get(f"{prefix}prompt{n}") for n in ("", "_2", "_3", "_4")]
            if prefix and bound.arguments.get("negative_prompt_embeds") is None:
                parts[0] = parts[0] or ""
            if parts[0] is not None:
                observer(_row_texts(parts, len(embeddings)), embeddings.detach(), bool(prefix))
        return result

    def stop() -> None:
        if before is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = before

    pipe.encode_prompt = encode_prompt
    return stop


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

    With guidance a pipeline passes negative prompt and prompt in one batch, in this order, or in two passes that it
    names ``cond`` and ``uncond``.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.pass_name = ""

    def __call__(self, arguments: Mapping[str, Any], batch: int) -> Sequence[int]:
        if self.pass_name in ("cond", "uncond"):
            return range(batch) if self.pass_name == "cond" else range(0)
        return range(batch // 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 0, batch)

    def watch(self, model: nn.Module, sharing: PromptGateSharing) -> Callable[[], None]:
        """Follow the names that the pipeline gives its passes; returns a function to stop."""
        original: Any = getattr(model, "cache_context", None)
        if original is None:
            return lambda: None

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Generator[None]:
            outer, self.pass_name = self.pass_name, name
            if name == "cond":
                sharing.begin_step()
            try:
                with original(name, **kwargs):
                    yield
            finally:
                self.pass_name = outer

        attributes: dict[str, Any] = model.__dict__
        before = attributes.get("cache_context")
        attributes["cache_context"] = cache_context

        def stop() -> None:
            if before is None:
                attributes.pop("cache_context", None)
            else:
                attributes["cache_context"] = before

        return stop
