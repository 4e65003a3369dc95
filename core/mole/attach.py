"""Attach a mixture to any tree of ``torch.nn`` modules, and detach it without a trace.

Forward methods are replaced on the instances (a model that was compiled earlier would ignore hooks). The model's own
method finds the text conditioning, blocks open and close the gates inside them, layers add the gated experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .bank import Bank
from .block_mixing import BlockForward
from .forwards import GateReaderForward, LayerForward, ModelForward, ReplacedForward
from .gate_values import GateValues
from .gates import READS_LAYER_INPUT, READS_TEXT, GateSet
from .guidance import PromptGateSharing, PromptRows
from .mixture import Mixture
from .observers import GateObserver, InputObserver
from .recompute import recomputable
from .regions.attention import CrossAttentionForward
from .regions.factors import RegionFactors
from .regions.layouts import cross_attention_of, sees
from .regions.picture import SamplingReader
from .scopes import NETWORK, uncompiled
from .texts import TextReader


def attach(
    model: nn.Module,
    mixture: Mixture | Bank,
    *,
    checkpointing: bool = False,
    prompt_rows: PromptRows | PromptGateSharing | None = None,
    texts: TextReader | None = None,
    sampling: SamplingReader | None = None,
) -> Attachment:
    """Attach a mixture to a model. Use it in a ``with`` block, or call `Attachment.detach` at the end.

    Mixes linear layers and convolutions, including quantised and offloaded ones: only their inputs and outputs are
    used.

    Args:
        model: A U-Net, a transformer, a language model: the module tree that holds the layers the experts change.
        mixture: The experts and gates, or a `Bank` that was built for this model.
        checkpointing: Recompute blocks in the backward pass instead of keeping their activations (for training).
        prompt_rows: Finds the rows of a batch that belong to the prompt, for models that are called with a negative
            prompt too: its samples get the gates of the prompt, see `core.mole.guidance`. Or the object that shares
            them. Default: every sample has its own gates.
        texts: Finds a language model's padding and prompts, see `core.mole.texts`. Default: gates read all positions.
        sampling: Reads the step and the part of the picture of a pass, for experts with regions or steps.

    Raises:
        MergeError: The experts or gates are for another model.
    """
    if isinstance(mixture, Mixture):
        mixture = Bank(model, mixture)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            mixture.to(parameter.device)
    if prompt_rows is not None and not isinstance(prompt_rows, PromptGateSharing):
        prompt_rows = PromptGateSharing(prompt_rows)
    return Attachment(
        model, mixture, checkpointing=checkpointing, prompt_gates=prompt_rows, texts=texts, sampling=sampling
    )


class Attachment:
    """A mixture that is attached to a model.

    Args:
        model: The module tree. bank: A bank built for it.
        checkpointing, texts, sampling: See `attach`.
        prompt_gates: Gives negative prompts the gates of the prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        *,
        checkpointing: bool = False,
        prompt_gates: PromptGateSharing | None = None,
        texts: TextReader | None = None,
        sampling: SamplingReader | None = None,
    ) -> None:
        self.model, self.bank = uncompiled(model), bank
        self.regions: RegionFactors | None = None  # where in the picture, and when, each expert acts
        if bank.is_partial:
            self.regions = RegionFactors(self.model, bank.regions, bank.steps, bank.labels, sampling)
        self._gate_values = values = GateValues(
            bank, prompt_gates=prompt_gates, text_reader=texts, regions=self.regions
        )
        self._at_detach: list[Callable[[], None]] = []
        first_layer_decides = NETWORK in values.scopes and values.reads not in READS_TEXT
        if checkpointing and first_layer_decides and bank.gates.settings.granularity == "network":
            raise MergeError(
                "One gate for the whole network that reads its first layer cannot be trained with checkpointing.",
                remedy="switch checkpointing off, or choose gates that read text or a finer granularity",
            )
        if checkpointing and self.regions is not None:
            raise MergeError(
                "Blocks cannot be recomputed in a mixture with regions or steps.",
                remedy="train gates without regions, and add the regions afterwards",
            )
        blocks = bank.blocks if values.reads not in READS_TEXT or bank.mixing == "output" or checkpointing else {}
        only_read = {
            scope.gate.layer: scope
            for scope in values.scopes.values()
            if values.reads in READS_LAYER_INPUT and scope.gate is not None
            if scope.gate.layer not in ("", *bank.stacks)
        }
        modules = {path: self.model.get_submodule(path) for path in (*blocks, *only_read, *bank.stacks)}
        self._forwards: list[ReplacedForward] = [ModelForward(self.model, values)]
        for path, inside in blocks.items():
            scopes = [values.scopes[name] for name in inside]
            self._forwards.append(BlockForward(modules[path], values, path, scopes, checkpointing=checkpointing))
        self._forwards += [GateReaderForward(modules[path], values, path, scope) for path, scope in only_read.items()]
        for path, stack in bank.stacks.items():
            scope = values.scopes[bank.scopes[path].name]
            self._forwards.append(LayerForward(modules[path], values, path, stack, scope))
        if self.regions is not None and (self.regions.has_maps or self.regions.automatic is not None):
            self._forwards += self._cross_attentions(self.regions)

    def _cross_attentions(self, regions: RegionFactors) -> list[CrossAttentionForward]:
        experts: dict[str, set[int]] = {}
        for path, stack in self.bank.stacks.items():
            if sees(type(self.model).__name__, path) == "cross":
                experts.setdefault(cross_attention_of(path), set()).update(stack.owner.tolist())
        return [
            CrossAttentionForward(self.model.get_submodule(path), self._gate_values, path, regions, sorted(members))
            for path, members in experts.items()
        ]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parts of the experts that are not mixed, each with the reason."""
        return self.bank.left_out

    @property
    def layers_read(self) -> dict[str, str]:
        """Scope -> path of the layer whose input its gate read in the last pass, see `Gate`."""
        return {scope.name: scope.layer for scope in self._gate_values.scopes.values()}

    @contextmanager
    def hold(self, values: Tensor | Sequence[float], *, named: Tensor | None = None) -> Generator[None]:
        """Hold all gates at these values inside the block.

        Args:
            values: ``(N,)``, ``(B, N)`` for a batch, or ``(B, T, N)`` for each position.
            named: ``(B, N)`` bool, the values that a negative prompt does not take from its prompt.
        """
        device = next(self.bank.buffers()).device  # copied here once: copies in every pass would block a GPU
        held = torch.as_tensor(values, dtype=torch.float32, device=device)
        if held.shape[-1:] != (self.bank.experts,):
            raise MergeError("Every LoRA needs a gate value.", expected=self.bank.experts, found=tuple(held.shape))
        state = self._gate_values
        before = state.held_values, state.held_named, state.held_are_zero
        state.held_values = held if held.ndim > 1 else held[None]
        state.held_named = None if named is None else named.to(device)
        state.held_are_zero = not held.any()  # read once here: not in every layer of every pass
        try:
            yield
        finally:
            state.held_values, state.held_named, state.held_are_zero = before

    def use(self, gates: GateSet) -> None:
        """Replace the gates, also the bank's, by others for the same experts and settings."""
        self._gate_values.use(gates)

    @contextmanager
    def only_samples(self, rows: Sequence[int]) -> Generator[None]:
        """Run only these samples of the batch inside the block: uses their rows of values that are held for all."""
        before = self._gate_values.held_values
        if before is not None and before.shape[0] > 1:
            self._gate_values.held_values = before[list(rows)]
        try:
            yield
        finally:
            self._gate_values.held_values = before

    @contextmanager
    def prompt(self, positions: Tensor) -> Generator[None]:
        """Inside the block a text's gates read only these positions: ``(B, T)`` bool, and no later ones.

        Positions that the model's own arguments mark as padding are left out too. Gates per token read each position
        anyway.
        """
        before, self._gate_values.prompt_positions = self._gate_values.prompt_positions, positions
        try:
            yield
        finally:
            self._gate_values.prompt_positions = before

    def recomputable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a part of a pass that the model itself runs again in the backward pass, see `core.mole.recompute`."""
        return recomputable(self._gate_values, function, lambda: bool(self._forwards))

    def at_detach(self, undo: Callable[[], None]) -> None:
        """Register a function to call when the mixture is detached."""
        self._at_detach.append(undo)

    @contextmanager
    def watch(self, observer: GateObserver) -> Generator[None]:
        """Report gate values to `observer` inside the block."""
        before, self._gate_values.observer = self._gate_values.observer, observer
        try:
            yield
        finally:
            self._gate_values.observer = before

    @contextmanager
    def watch_inputs(self, observer: InputObserver) -> Generator[None]:
        """Report what gates read inside the block: ``observer(scope, features (B, F), owner (F,) or None)``."""
        before, self._gate_values.input_observer = self._gate_values.input_observer, observer
        try:
            yield
        finally:
            self._gate_values.input_observer = before

    def detach(self) -> None:
        """Restore the model exactly as it was. Calling this again does nothing."""
        for forward in reversed(self._forwards):
            forward.remove()
        for undo in reversed(self._at_detach):
            undo()
        self._forwards, self._at_detach = [], []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
