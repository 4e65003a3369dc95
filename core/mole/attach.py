"""Put a mixture on any tree of ``torch.nn`` modules, and take it off without a trace.

Forward methods are replaced on the instances (hooks are ignored by a model that was compiled before they came). The
model's root notes the text conditioning, blocks open and close the gates inside them, layers add the gated experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .bank import Bank
from .block_mixing import Block
from .forwards import Forward, Layer, Reader, Root
from .gates import INPUT, GateSet
from .gating import GateObserver, Measure, State
from .guidance import PromptFollowing, Rows
from .mixture import Mixture
from .recompute import repeatable
from .scopes import NETWORK, uncompiled
from .texts import TextReader


def attach(
    model: nn.Module,
    mixture: Mixture | Bank,
    *,
    checkpointing: bool = False,
    prompt_rows: Rows | None = None,
    texts: TextReader | None = None,
) -> Attachment:
    """Put a mixture on a model. Use it in a ``with`` block, or call `Attachment.detach` at the end.

    Linear layers and convolutions are mixed, quantised and offloaded ones too: only their inputs and outputs are used.

    Args:
        model: A U-Net, a transformer, a language model: whatever holds the layers the experts change.
        mixture: The experts and gates; a `Bank` where one was built for this model already.
        checkpointing: Recompute blocks in the backward pass instead of keeping what they computed (for training).
        prompt_rows: Tells which samples of a batch are the prompt's, for models that are called with a negative prompt
            too: its samples take the gates of the prompt's, see `core.mole.guidance`. Without it each goes by its own.
        texts: Tells a language model's padding and prompts, see `core.mole.texts`. Without it gates read all positions.

    Raises:
        MergeError: The experts or gates are for another model.
    """
    if isinstance(mixture, Mixture):
        mixture = Bank(model, mixture)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            mixture.to(parameter.device)
    following = None if prompt_rows is None else PromptFollowing(prompt_rows)
    return Attachment(model, mixture, checkpointing=checkpointing, following=following, texts=texts)


class Attachment:
    """A mixture at work on a model.

    Args:
        model: The module tree. bank: Built for it. checkpointing, texts: See `attach`. following: Of negative prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        *,
        checkpointing: bool = False,
        following: PromptFollowing | None = None,
        texts: TextReader | None = None,
    ) -> None:
        self.model, self.bank = uncompiled(model), bank
        self._state = state = State(bank)
        state.following, state.texts = following, texts
        self._at_detach: list[Callable[[], None]] = []
        outside = NETWORK in state.sites and state.reads != "text"
        if checkpointing and outside and bank.gates.settings.granularity == "network":
            raise MergeError(
                "One gate for the whole network that reads its first layer cannot be trained with checkpointing.",
                remedy="switch checkpointing off, or choose gates that read text or a finer granularity",
            )
        blocks = bank.blocks if state.reads != "text" or bank.mixing == "output" or checkpointing else {}
        readers = {
            site.gate.layer: site
            for site in state.sites.values()
            if state.reads in INPUT and site.gate is not None and site.gate.layer not in ("", *bank.stacks)
        }
        modules = {path: self.model.get_submodule(path) for path in (*blocks, *readers, *bank.stacks)}
        self._forwards: list[Forward] = [Root(self.model, state)]
        for path, inside in blocks.items():
            sites = [state.sites[name] for name in inside]
            self._forwards.append(Block(modules[path], state, path, sites, checkpointing))
        self._forwards += [Reader(modules[path], state, path, site) for path, site in readers.items()]
        for path, stack in bank.stacks.items():
            self._forwards.append(Layer(modules[path], state, path, stack, state.sites[bank.scopes[path].name]))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parts of the experts that are not mixed, each with the reason."""
        return self.bank.left_out

    @property
    def layers_read(self) -> dict[str, str]:
        """Scope -> path of the layer at which its gate read in the last pass, see `Gate`."""
        return {site.name: site.layer for site in self._state.sites.values()}

    @contextmanager
    def hold(self, values: Tensor | Sequence[float]) -> Generator[None]:
        """Hold all gates at given values: ``(N,)``, ``(B, N)`` for a batch, or ``(B, T, N)`` for each position."""
        device = next(self.bank.buffers()).device  # copied there now: copies in the pass would make a GPU wait
        held = torch.as_tensor(values, dtype=torch.float32, device=device)
        if held.shape[-1:] != (self.bank.experts,):
            raise MergeError("Every LoRA needs a value.", expected=self.bank.experts, found=tuple(held.shape))
        before, self._state.held = self._state.held, held if held.ndim > 1 else held[None]
        try:
            yield
        finally:
            self._state.held = before

    def use(self, gates: GateSet) -> None:
        """Go on with other gates, for the same experts and settings; the bank's too."""
        self._state.use(gates)

    @contextmanager
    def part(self, rows: Sequence[int]) -> Generator[None]:
        """Only these samples of the batch run inside the block: of values held for all of them, theirs."""
        before = self._state.held
        if before is not None and before.shape[0] > 1:
            self._state.held = before[list(rows)]
        try:
            yield
        finally:
            self._state.held = before

    @contextmanager
    def prompt(self, positions: Tensor) -> Generator[None]:
        """Inside the block, a text's gates read these positions alone: ``(B, T)`` bool, of what follows later none.

        Padding that the model is told of is left out all the same. Gates per token read each position anyway.
        """
        before, self._state.prompt = self._state.prompt, positions
        try:
            yield
        finally:
            self._state.prompt = before

    def repeatable(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """A part of a pass that the model itself runs again in the backward pass, see `recompute.repeatable`."""
        return repeatable(self._state, part, lambda: bool(self._forwards))

    def at_detach(self, undo: Callable[[], None]) -> None:
        """Have this called when the mixture is taken off."""
        self._at_detach.append(undo)

    @contextmanager
    def watch(self, watcher: GateObserver) -> Generator[None]:
        """Tell `watcher` what the gates do inside the block."""
        before, self._state.watch = self._state.watch, watcher
        try:
            yield
        finally:
            self._state.watch = before

    @contextmanager
    def measure(self, seen: Measure) -> Generator[None]:
        """Tell of everything the gates read: ``seen(scope, features (B, F), owner (F,) or None)``."""
        before, self._state.measure = self._state.measure, seen
        try:
            yield
        finally:
            self._state.measure = before

    def detach(self) -> None:
        """Take the mixture off. The model is what it was, bit for bit; calling this again does nothing."""
        for forward in reversed(self._forwards):
            forward.remove()
        for undo in reversed(self._at_detach):
            undo()
        self._forwards, self._at_detach = [], []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
