"""MoLE on diffusers pipelines: LoRAs as experts under the model's own names, and the prompt router."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, is_text_encoder
from ...core.errors import MergeError, name_some
from ...core.layers.keymap import rename
from ...core.mole.attach import Attachment, attach
from ...core.mole.gates import GateSet
from ...core.mole.guidance import PromptRows
from ...core.mole.mixture import Mixture
from ...core.mole.router import check_concepts, concepts_in, routed_values
from ...core.mole.scopes import uncompiled
from ...core.mole.trained import TrainedGates
from .layer_names import key_map


def model_of(pipe: Any) -> nn.Module:
    """The part of a pipeline that a mixture goes on: its transformer or U-Net.

    Raises:
        MergeError: It has neither.
    """
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if model is None:
        raise MergeError("This pipeline has neither a transformer nor a unet.", found=type(pipe).__name__)
    return model


def base_of(pipe: Any) -> str:
    """What gates remember of the model they were trained on: its class."""
    return type(uncompiled(model_of(pipe))).__name__


def experts(pipe: Any, adapters: Sequence[Adapter]) -> list[Adapter]:
    """LoRAs for a mixture on the pipeline's model, under names that are paths in it, whatever dialect they came in.

    A mixture leaves text encoders alone. Their parts keep their place in the adapters, `Attachment.left_out` names
    them, and a warning says so.

    Args:
        pipe: The pipeline the LoRAs were made for.
        adapters: As loaded.

    Raises:
        MergeError: Layers that are not in the model.
    """
    known = key_map(adapters)
    paths = {path for path, _ in model_of(pipe).named_modules()}
    found = [rename(adapter, known) for adapter in adapters]
    for adapter in found:
        model = [name for name in adapter.modules if not is_text_encoder(name)]
        missing = [name for name in model if not {name, name.split(".", 1)[-1]} & paths]
        if missing:
            raise MergeError(
                "The LoRA was made for another base model.",
                file=adapter.source.path or adapter.label,
                expected=f"layers of {base_of(pipe)}",
                found=f"{len(missing)} layers that it lacks, such as {name_some(missing, 2)}",
                remedy="use the pipeline the LoRA was trained for",
            )
        if not model:
            raise MergeError(
                "The LoRA changes text encoders only: there is nothing to mix.",
                file=adapter.source.path or adapter.label,
                remedy="load it with pipe.load_lora_weights",
            )
        if text := len(adapter.modules) - len(model):
            warnings.warn(
                f"{adapter.label}: {text} layers are of text encoders and are not mixed; "
                "docs/mole.md says how to have them all the same",
                stacklevel=2,
            )
    return found


def load_gates(pipe: Any, path: str | Path, adapters: Sequence[Adapter]) -> GateSet:
    """Trained gates for these LoRAs on this pipeline, in the LoRAs' order.

    Args:
        pipe: The pipeline. path: What `TrainedGates.save` wrote. adapters: See `experts`; of the gates' LoRAs, any.

    Raises:
        FormatError: No such file. MergeError: Gates for other LoRAs or another model.
    """
    return TrainedGates.load(path).of(adapters, base_of(pipe))


def prompt_rows(pipe: Any) -> PromptRows:
    """The rows of a batch that belong to the prompt, not to the negative one: for `attach`, and for `Record`."""

    def rows(arguments: Mapping[str, Any], batch: int) -> Sequence[int]:
        return range(batch // 2 if getattr(pipe, "do_classifier_free_guidance", False) else 0, batch)

    return rows


def mixed(pipe: Any, mixture: Mixture) -> Attachment:
    """A mixture on a pipeline's model. Use it in a ``with`` block, or call `Attachment.detach` at the end::

        with mixed(pipe, mixture):
            pipe("a heart in ember style")

    Negative prompts take the gates of the prompt, see `mole.guidance`; not where the pipeline runs them in a pass of
    their own (``true_cfg_scale``), there they go by their own words.

    Raises:
        MergeError: See `attach`.
    """
    return attach(model_of(pipe), mixture, prompt_rows=prompt_rows(pipe))


@contextmanager
def routed(pipe: Any, mixture: Mixture, concepts: Sequence[Sequence[str]]) -> Generator[Attachment]:
    """The prompt router at work: each prompt gets the LoRAs whose words it has. Needs no training.

    Every row of a batch goes by the text it was encoded from, and the negative prompt's follow the prompt's::

        with routed(pipe, mixture, [["ember style"], ["heart"]]):
            pipe("a heart in ember style")

    Args:
        pipe: The pipeline.
        mixture: Its gates are not asked; their settings say how shares are given.
        concepts: Per expert, the words or phrases that name its concept.

    Raises:
        MergeError: Another number of concepts than experts, a model that was compiled as a whole, or (while it works)
            conditioning that was encoded elsewhere.
    """
    check_concepts(concepts, len(mixture.experts))
    model = model_of(pipe)
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise MergeError(
            "The router cannot look into a compiled model.",
            remedy="compile its blocks only (model.compile_repeated_blocks()), or train gates",
        )
    router = _Router(pipe, mixture, concepts)
    pipe.encode_prompt, before = router.encode, pipe.__dict__.get("encode_prompt")
    try:
        with mixed(pipe, mixture) as attachment, router.holding(model, attachment):
            yield attachment
    finally:
        if before is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = before


class _Router:
    """Listens to `encode_prompt`, and knows each row of conditioning again when the model is called with it."""

    def __init__(self, pipe: Any, mixture: Mixture, concepts: Sequence[Sequence[str]]) -> None:
        self.concepts, self.settings = concepts, mixture.gates.settings
        self.inner: Callable[..., Any] = pipe.encode_prompt
        self.signature = inspect.signature(self.inner)
        # conditioning (P, T, F) and gates (P, N) of the last prompts; a picture needs two at most
        self.known: deque[tuple[Tensor, Tensor]] = deque(maxlen=16)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        prefixes = ["", "negative_"] if "negative_prompt" in given.arguments else [""]
        # between the two some pipelines return masks or pooled states
        found = [value for value in result if isinstance(value, Tensor) and value.ndim == 3]
        for prefix, embeddings in zip(prefixes, found, strict=False):
            parts = [given.arguments.get(f"{prefix}prompt{n}") for n in ("", "_2", "_3", "_4")]
            if prefix and given.arguments.get("negative_prompt_embeds") is None:
                parts[0] = parts[0] or ""
            if parts[0] is not None:
                asked = concepts_in(_texts(parts, len(embeddings)), self.concepts)
                self.known.append((embeddings.detach(), routed_values(asked, self.settings)))
        return result

    @contextmanager
    def holding(self, model: nn.Module, attachment: Attachment) -> Generator[None]:
        with ExitStack() as held:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                held.close()
                held.enter_context(attachment.hold(self.values(kwargs.get("encoder_hidden_states"))))

            handle = model.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def values(self, text: Tensor | None) -> Tensor:
        """The gates ``(B, N)`` of conditioning ``(B, T, F)``."""
        values: list[Tensor] = []
        for row in [] if text is None else text:
            matches = (
                gates[i]
                for embeddings, gates in reversed(self.known)
                if embeddings.shape[1:] == row.shape
                for i, other in enumerate(embeddings)
                if torch.equal(other.to(row), row)
            )
            found = next(matches, None)
            if found is None:
                break
            values.append(found)
        if text is None or len(values) != len(text):
            raise MergeError(
                "The router does not know which prompt the model is called with.",
                expected="prompts given to the pipeline as text",
                found="conditioning that was encoded elsewhere",
                remedy="let the pipeline encode the prompts, or call its encode_prompt inside the with block",
            )
        return torch.stack(values)


def _texts(parts: Sequence[str | Sequence[str] | None], rows: int) -> list[str]:
    """The text of each row of conditioning: what all encoders were given, several rows in turn for each prompt."""
    lists = [[part] if isinstance(part, str) else list(part) for part in parts if part is not None]
    count = max(map(len, lists))
    prompts = ["\n".join(texts[i % len(texts)] or "" for texts in lists) for i in range(count)]
    return [prompts[row * count // rows] for row in range(rows)]
