"""Mixtures (MoLE) on diffusers pipelines: adapters under the model's module paths, and the prompt router."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, is_text_encoder
from ...core.errors import MergeError
from ...core.layers.keymap import apply_key_map
from ...core.mole.attach import Attachment, attach
from ...core.mole.gates import GateSet
from ...core.mole.guidance import PromptGateSharing, PromptRows
from ...core.mole.mixture import Mixture
from ...core.mole.prompt_check import prompt_warnings
from ...core.mole.router import COMPOSE, check_concepts, concepts_in, routed_values
from ...core.mole.trained import TrainedGates
from ..base_model import base_model_name, other_base_model
from .encoded_prompts import EncodedTexts, GuidanceRows, watch_prompts
from .layer_names import key_map
from .sampling_steps import PipelineSteps


def denoising_model(pipe: Any) -> nn.Module:
    """The transformer or U-Net of a pipeline, which mixtures are attached to.

    Raises:
        MergeError: The pipeline has neither.
    """
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if model is None:
        raise MergeError("This pipeline has neither a transformer nor a unet.", found=type(pipe).__name__)
    return model


def experts(pipe: Any, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Rename adapters of any dialect to the module paths of a pipeline's transformer or U-Net.

    A mixture does not change text encoders. Their modules stay in the adapters, `Attachment.left_out` lists them, and
    a warning gives their number.

    Args:
        pipe: The pipeline that the adapters were trained for.
        adapters: The adapters as loaded.

    Raises:
        MergeError: An adapter has layers that the model lacks, or changes text encoders only.
    """
    names = key_map(adapters)
    model = denoising_model(pipe)
    paths = {path for path, _ in model.named_modules()}
    renamed = [apply_key_map(adapter, names) for adapter in adapters]
    for adapter in renamed:
        modules = [name for name in adapter.modules if not is_text_encoder(name)]
        if missing := [name for name in modules if not {name, name.split(".", 1)[-1]} & paths]:
            raise other_base_model(adapter, missing, model, "use the pipeline the LoRA was trained for")
        if not modules:
            raise MergeError(
                "The LoRA changes text encoders only: there is nothing to mix.",
                file=adapter.source.path or adapter.label,
                remedy="load it with pipe.load_lora_weights",
            )
        if left_out := len(adapter.modules) - len(modules):
            warnings.warn(
                f"{adapter.label}: {left_out} layers belong to text encoders and are not mixed; "
                "docs/mole.md describes how to use them beside the mixture",
                stacklevel=2,
            )
    return renamed


def load_gates(pipe: Any, path: str | Path, adapters: Sequence[Adapter]) -> GateSet:
    """Load trained gates for adapters on a pipeline, see `hosts.api.load_gates`."""
    trained = TrainedGates.load(path)
    for note in trained.notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    return trained.of(adapters, base_model_name(denoising_model(pipe)))


def prompt_rows(pipe: Any) -> PromptRows:
    """Select the rows of a batch that belong to the prompt, not to the negative prompt; for `Record`."""
    return GuidanceRows(pipe)


def mixed(
    pipe: Any,
    mixture: Mixture,
    *,
    checkpointing: bool = False,
    regions: Sequence[Any] | None = None,
    steps: Sequence[tuple[float, float]] | None = None,
) -> Attachment:
    """Attach a mixture to a pipeline's transformer or U-Net.

    Use it in a ``with`` block, or call `Attachment.detach` at the end::

        with mixed(pipe, mixture):
            pipe("a heart in ember style")

    Negative prompts take the gates of the prompt, unless they name an adapter themselves (see `core.mole.guidance`), if
    the pipeline passes both in one batch, names its passes or encodes both at once. A warning tells where a prompt has
    the words of an adapter whose gates stay shut, or none of the words of one whose gates open.

    Args:
        pipe: The pipeline.
        mixture: Adapters from `experts`, with their gates.
        checkpointing: Recompute blocks in the backward pass, see `attach`.
        regions, steps: Where in the picture, and in which part of the sampling steps, each expert acts: instead of the
            mixture's own, see `Mixture`.

    Raises:
        MergeError: See `attach` and `Mixture`.
    """
    if regions is not None:
        mixture = replace(mixture, regions=regions)
    if steps is not None:
        mixture = replace(mixture, steps=steps)
    attachment = _attached(pipe, mixture, checkpointing=checkpointing)
    attachment.at_detach(watch_prompts(pipe, lambda encoded: _warn(encoded, attachment, mixture.labels)))
    return attachment


def _attached(pipe: Any, mixture: Mixture, *, checkpointing: bool = False) -> Attachment:
    """The mixture, attached so that negative prompts take the gates of the prompt."""
    model, rows = denoising_model(pipe), GuidanceRows(pipe)
    sharing = PromptGateSharing(rows)
    attachment = attach(model, mixture, checkpointing=checkpointing, prompt_rows=sharing, sampling=PipelineSteps(pipe))
    attachment.at_detach(rows.watch(model, sharing))
    return attachment


def _warn(encoded: Sequence[EncodedTexts], attachment: Attachment, labels: Sequence[str]) -> None:
    """Warn if the words of a prompt and the gates disagree."""
    for texts, states, mask, negative in encoded:
        rows = {text: row for row, text in enumerate(texts)}  # a text has as many rows as images
        for text, row in rows.items() if not negative else ():
            row_mask = None if mask is None else mask[row]
            for warning in prompt_warnings(text, states[row], attachment.bank.gates, labels, row_mask):
                warnings.warn(warning, stacklevel=5)


@contextmanager
def routed(
    pipe: Any, mixture: Mixture, concepts: Sequence[Sequence[str]], *, compose: float = COMPOSE
) -> Generator[Attachment]:
    """Attach a mixture with the prompt router: each prompt gets the adapters whose words it contains. No training.

    Each row of a batch follows the text it was encoded from; rows of the negative prompt follow the prompt too, unless
    they name an adapter themselves::

        with routed(pipe, mixture, [["ember style"], ["heart"]]):
            pipe("a heart in ember style")

    Args:
        pipe: The pipeline.
        mixture: Its gates are not evaluated; their settings say how shares are distributed.
        concepts: Per expert, the words or phrases that name its concept.
        compose: Gate value of each of several adapters that a prompt names together.

    Raises:
        MergeError: The number of concepts differs from the number of experts, or the model was compiled as a whole.
            Inside the block: the pipeline was called with conditioning that it did not encode itself.
    """
    check_concepts(concepts, len(mixture.experts))
    model = denoising_model(pipe)
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise MergeError(
            "The prompt router does not work on a model that was compiled as a whole.",
            remedy="compile its blocks only (model.compile_repeated_blocks()), or train gates",
        )
    router = _PromptRouter(mixture, concepts, compose)
    stop = watch_prompts(pipe, router.record)
    try:
        with _attached(pipe, mixture) as attachment, router.hold_gates(model, attachment):
            yield attachment
    finally:
        stop()


class _PromptRouter:
    """Records the conditioning of encoded prompts, and recognises its rows when the model is called."""

    def __init__(self, mixture: Mixture, concepts: Sequence[Sequence[str]], compose: float) -> None:
        self.concepts, self.settings, self.compose = concepts, mixture.gates.settings, compose
        # conditioning (P, T, F) and gates (P, N) of the latest prompts; one call of the pipeline needs at most two
        self.encoded: deque[tuple[Tensor, Tensor]] = deque(maxlen=16)

    def record(self, encoded: Sequence[EncodedTexts]) -> None:
        """Implements `PromptObserver`."""
        for texts in encoded:
            requested = concepts_in(texts.texts, self.concepts)
            self.encoded.append((texts.states, routed_values(requested, self.settings, self.compose)))

    @contextmanager
    def hold_gates(self, model: nn.Module, attachment: Attachment) -> Generator[None]:
        """Hold the gates of each forward pass at the values for its conditioning."""
        with ExitStack() as hold:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hold.close()
                gates = self.gates_for(kwargs.get("encoder_hidden_states"))
                named = gates > 0 if self.settings.activation == "sigmoid" else None
                hold.enter_context(attachment.hold(gates, named=named))

            handle = model.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def gates_for(self, conditioning: Tensor | None) -> Tensor:
        """The gates ``(B, N)`` for conditioning ``(B, T, F)``.

        Raises:
            MergeError: A row is not among the recorded ones.
        """
        gates: list[Tensor] = []
        for row in [] if conditioning is None else conditioning:
            matches = (
                values[i]
                for embeddings, values in reversed(self.encoded)
                if embeddings.shape[1:] == row.shape
                for i, other in enumerate(embeddings)
                if torch.equal(other.to(row), row)
            )
            match = next(matches, None)
            if match is None:
                break
            gates.append(match)
        if conditioning is None or len(gates) != len(conditioning):
            raise MergeError(
                "The prompt router cannot tell which prompt the model was called with.",
                expected="prompts given to the pipeline as text",
                found="conditioning that was encoded elsewhere",
                remedy="let the pipeline encode the prompts, or call its encode_prompt inside the with block",
            )
        return torch.stack(gates)
