"""Gate values: the values of a mixture's gates during a forward pass, shared by the replaced forward methods."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bank import Bank
from .concepts import text_mask
from .gate_inputs import check_size, expert_features, layer_input_features, missing_text
from .gates import READS_LAYER_INPUT, READS_TEXT, Gate, GateSet, Reads
from .guidance import PromptGateSharing
from .observers import GateObserver, InputObserver
from .regions.factors import RegionFactors
from .stack import Stack
from .texts import TextPositions, TextReader


class GateScope:
    """A scope (see `core.mole.scopes`) with its gate, and the gate's value in the current call.

    Attributes:
        gate: The trained gate; ``None`` if there is none.
        layer: Path of the layer whose input the gate read last, see `Gate`.
        value: ``(B, N)``, ``(1, N)`` for all samples, or ``(B, T, N)`` for each position; ``None`` until it is known.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate: Gate | None = None
        self.layer = ""
        self.value: Tensor | None = None


class PassSnapshot(NamedTuple):
    """The gates at some point of a forward pass, so that a part of it can run again.

    Args:
        values: Scope -> value of its gate.
        held_values: Values held by the user, if any. held_are_zero: Whether all of them are 0.
        positions: The positions of the texts that gates read.
    """

    values: Mapping[str, Tensor | None]
    held_values: Tensor | None
    held_are_zero: bool
    positions: TextPositions


class GateValues:
    """Gate values of the current forward pass.

    Args:
        bank: The experts and their gates.
        prompt_gates: Gives negative prompts the gates of the prompt.
        text_reader: Interprets the arguments of a language model.
        regions: Where in the picture, and when, each expert acts; ``None``: everywhere and always.

    Attributes:
        reads: What the gates read, see `GateSettings`.
        scopes: Name -> scope.
        held_values, held_named: Values held by the user, see `Attachment.hold`; ``None``: the gates decide.
        held_are_zero: Whether all held values are 0, so that no expert acts.
        positions: The positions of the texts that gates read in this pass.
        prompt_positions: ``(B, T)`` bool, the positions of the prompts, see `Attachment.prompt`.
        observer: Observer of gate values.
        input_observer: Observer of what gates read.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        prompt_gates: PromptGateSharing | None = None,
        text_reader: TextReader | None = None,
        regions: RegionFactors | None = None,
    ) -> None:
        self.bank, self.regions = bank, regions
        self.reads: Reads = bank.gates.settings.reads
        self.scopes = {scope.name: GateScope(scope.name) for scope in bank.scopes.values()}
        self.use(bank.gates)
        self.prompt_gates, self.text_reader = prompt_gates, text_reader
        self.held_values: Tensor | None = None
        self.held_named: Tensor | None = None
        self.held_are_zero = False
        self.positions = TextPositions()
        self.prompt_positions: Tensor | None = None
        self.observer: GateObserver | None = None
        self.input_observer: InputObserver | None = None
        self._unit_gates: dict[Any, tuple[Tensor, Tensor]] = {}
        self._named: Tensor | None = None  # (B, N) bool, the concepts that each sample's own text names

    def use(self, gates: GateSet) -> None:
        """Replace the gates."""
        self.bank.gates = gates
        for name, scope in self.scopes.items():
            scope.gate = gates.get(name)

    @property
    def gates_need_input(self) -> bool:
        """Whether any gate must read something in the next pass."""
        return self.held_values is None and (self.input_observer is not None or self.bank.gates.trained)

    def begin_pass(self, text: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Prepare a forward pass of the whole model; open all gates that read its text.

        Args:
            text: The text conditioning ``(B, tokens, F)``, if the model has one.
            args, kwargs: Arguments of the model.

        Raises:
            PromptPassRequired: See `PromptGateSharing`.
            MergeError: Gates that read text, and no text or one of another size.
        """
        if self.prompt_gates is not None:
            batch = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1), 0)
            self.prompt_gates.begin_pass(kwargs, batch)
        self.clear()
        if self.observer is not None and not torch.compiler.is_compiling():
            self.observer.begin_pass(kwargs)
        if self.regions is not None:
            samples = 0 if text is None else len(text)
            rows = range(samples) if self.prompt_gates is None else self.prompt_gates.prompt_rows
            self.regions.begin_pass(text, args, kwargs, detector=self.bank.gates.detector, rows=rows)
            if self.observer is not None and not torch.compiler.is_compiling():
                self.observer.regions_laid(self.regions.maps)
        if self.reads in READS_TEXT and self.held_values is None:
            self._open_text_gates(text, kwargs)
        if self.regions is not None:
            self.regions.named = self._named if self.held_values is None else self.held_named
        if self.text_reader is not None and self.gates_need_input:
            self.positions = self.text_reader.begin_pass(args, kwargs)
        if self.prompt_positions is not None and self.positions.prompt_gates is None and self.reads != "token":
            self.positions = self.positions.only(self.prompt_positions)

    def end_pass(self, output: Any) -> None:
        """Finish a forward pass of the whole model that returned `output`."""
        if self.text_reader is not None and self.gates_need_input:
            values = {name: scope.value for name, scope in self.scopes.items() if scope.value is not None}
            self.text_reader.end_pass(output, values)
        self.clear()

    def clear(self) -> None:
        """Forget all gate values, so that the next pass does not use them and no tensor is kept alive."""
        for scope in self.scopes.values():
            scope.value = None
        self._unit_gates.clear()
        self.positions = TextPositions()

    def open_gate(self, scope: GateScope, value: Tensor) -> Tensor:
        """Set a gate's value until the pass (or the block) ends; negative prompts get the gates of the prompt."""
        if self.prompt_gates is not None:
            named = self._named if self.held_values is None else self.held_named
            value = self.prompt_gates(scope.name, value, named)
        scope.value = value
        if self.observer is not None and not torch.compiler.is_compiling():
            self.observer.gate_opened(scope.name, self.positions.mean(value) if value.ndim > 2 else value)
        return value

    def open_held(self, scope: GateScope, path: str, like: Tensor) -> Tensor:
        """Open a gate whose value is held, at the layer at `path`, on the device of `like`."""
        assert self.held_values is not None
        if self.reads in READS_LAYER_INPUT:
            scope.layer = path
        return self.open_gate(scope, self.held_values.to(like.device))

    def open_from_layer_input(self, scope: GateScope, path: str, x: Tensor, *, image: bool) -> Tensor:
        """Open a gate that reads the input `x` of a block, or of the layer at `path`; `image`: channels come first."""
        scope.layer = path
        value = self.value_without_input(scope, x)
        return self.open_gate(scope, self.value_from_layer_input(scope, x, image=image) if value is None else value)

    def open_at_layer(self, scope: GateScope, path: str, stack: Stack, x: Tensor, z: Tensor) -> Tensor:
        """Open a gate at the first adapted layer of its scope.

        Args:
            scope: The scope.
            path: Path of the layer. stack: Experts of the layer.
            x: Input of the layer. z: ``D x``, computed by `Stack.down`.
        """
        if self.reads in READS_LAYER_INPUT:
            return self.open_from_layer_input(scope, path, x, image=bool(stack.kernel))
        value = self.value_without_input(scope, x)
        if value is None and self.reads in READS_TEXT:
            raise missing_text()
        if value is None and scope.gate is not None and scope.gate.features == 0:
            value = scope.gate(x.new_zeros(x.shape[0], 0))  # it only read experts that are switched off
        if value is None:
            value = self.evaluate(scope, *expert_features(stack, z, self.bank.experts, self.reads, self.positions))
        return self.open_gate(scope, value)

    def value_without_input(self, scope: GateScope, like: Tensor) -> Tensor | None:
        """The value of a gate that need not read: held by the user, decided at the prompt, or even if untrained."""
        if self.held_values is not None:
            return self.held_values.to(like.device)
        if self.positions.prompt_gates is not None and scope.name in self.positions.prompt_gates:
            return self.positions.prompt_gates[scope.name].to(like.device)
        if scope.gate is None and self.input_observer is None:
            return self.bank.gates.even(like)
        return None

    def value_from_layer_input(self, scope: GateScope, x: Tensor, *, image: bool) -> Tensor:
        """The value of a gate that reads the input `x` of a layer or block."""
        module = scope.layer or scope.name
        return self.evaluate(scope, layer_input_features(x, self.reads, self.positions, image=image, module=module))

    def evaluate(self, scope: GateScope, features: Tensor, owner: Tensor | None = None) -> Tensor:
        """The value of a gate for features ``(B, F)``, or ``(B, T, F)`` for each position.

        Raises:
            MergeError: The gate was trained with another number of features.
        """
        if self.input_observer is not None:
            self.input_observer(scope.name, self.positions.rows(features) if features.ndim > 2 else features, owner)
        if scope.gate is None:
            return self.bank.gates.even(features)
        check_size(features, scope.gate, scope.name, self.reads)
        return scope.gate(features)

    def unit_gates(self, g: Tensor, stack: Stack, z: Tensor) -> Tensor:
        """`Stack.unit_gates`, computed once per pass for all layers of the same layout.

        Small layers take no longer than the operations they launch, so each one saved counts.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return stack.unit_gates(g, z)  # a cached tensor would keep its graph alive
        key = (id(g), stack.layout, z.shape[: g.ndim - 1], z.ndim, z.dtype, z.device)
        if key not in self._unit_gates:
            self._unit_gates[key] = g, stack.unit_gates(g, z)  # `g` is kept so that its id is not used again
        return self._unit_gates[key][1]

    def snapshot(self) -> PassSnapshot:
        """The gates as they are now."""
        values = {name: scope.value for name, scope in self.scopes.items()}
        return PassSnapshot(values, self.held_values, self.held_are_zero, self.positions)

    @contextmanager
    def replay(
        self,
        snapshot: PassSnapshot,
        observer: GateObserver | None = None,
        input_observer: InputObserver | None = None,
    ) -> Generator[None]:
        """Inside the block the gates are as they were at `snapshot`, for a part of a pass that runs again."""
        outer = self.snapshot(), self.observer, self.input_observer
        self._restore(snapshot, observer, input_observer)
        try:
            yield
        finally:
            self._restore(*outer)

    def _restore(
        self, snapshot: PassSnapshot, observer: GateObserver | None, input_observer: InputObserver | None
    ) -> None:
        for name, value in snapshot.values.items():
            self.scopes[name].value = value
        self.held_values, self.held_are_zero = snapshot.held_values, snapshot.held_are_zero
        self.positions = snapshot.positions
        self.observer, self.input_observer = observer, input_observer

    def _open_text_gates(self, text: Tensor | None, arguments: Mapping[str, Any]) -> None:
        if not self.gates_need_input and text is None:
            return
        if text is None:
            raise missing_text()
        gates, sharing = self.bank.gates, self.prompt_gates
        f = gates.text_features(text, text_mask(arguments, text))
        self._named = f > 0.5 if self.reads == "text" else None
        if sharing is not None and gates.trained and (texts := sharing.prompt_texts(arguments)):
            parts = [gates.values(gates.text_features(*part)) for part in texts]
            sharing.remember(dict(zip(gates.names, zip(*parts, strict=True), strict=True)))
        if self.input_observer is not None:
            owner = torch.arange(gates.experts, device=f.device) if self.reads == "text" else None
            for name in self.scopes:
                self.input_observer(name, f, owner)
        if gates.trained:
            check_size(f, gates[gates.names[0]], gates.names[0], self.reads)
            for name, value in zip(gates.names, gates.values(f), strict=True):
                self.open_gate(self.scopes[name], value)
        even = gates.even(f)
        for scope in self.scopes.values():
            if scope.value is None:
                self.open_gate(scope, even)
