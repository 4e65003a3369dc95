"""Gating: the gates of a mixture in a pass of the model, which the replaced forward methods share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import MergeError
from .bank import Bank
from .gates import INPUT, Gate, GateSet, normalised, wide
from .guidance import PromptFollowing
from .stack import Stack
from .texts import TextPositions, TextReader

TEXT = ("encoder_hidden_states", "context")  # what models call their text conditioning (B, tokens, features)

Measure = Callable[[str, Tensor, "Tensor | None"], None]


class GateObserver(Protocol):
    """Is told what the gates do. Never from inside a compiled model."""

    def start(self, arguments: Mapping[str, Any]) -> None:
        """A pass of the whole model begins, called with these keyword arguments."""
        ...

    def seen(self, scope: str, value: Tensor) -> None:
        """A gate opened to `value`, ``(B, N)`` or ``(1, N)`` float32; with its graph while gradients are taken.

        Of gates per token it is the mean over each text's own positions.
        """
        ...


class CollectedGates:
    """The values of the gates that open, by scope. A `GateObserver`."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def start(self, arguments: Mapping[str, Any]) -> None:
        pass

    def seen(self, scope: str, value: Tensor) -> None:
        self.values[scope] = value


class GateScope:
    """One scope at work: its gate, and the gate's value in the call that is going on."""

    def __init__(self, name: str, gate: Gate | None) -> None:
        self.name, self.gate = name, gate
        self.layer = ""  # see `Gate`
        self.value: Tensor | None = None


class PassSnapshot(NamedTuple):
    """Where a pass stands: the gates that are open, by scope, those held by hand, and what gates read."""

    values: Mapping[str, Tensor | None]
    held: Tensor | None
    reading: TextPositions


class State:
    """What the replaced forward methods share."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.reads = bank, bank.gates.settings.reads
        self.sites = {scope.name: GateScope(scope.name, None) for scope in bank.scopes.values()}
        self.use(bank.gates)
        self.held: Tensor | None = None
        self.following: PromptFollowing | None = None
        self.texts: TextReader | None = None
        self.prompt: Tensor | None = None
        self.reading = TextPositions()
        self.watch: GateObserver | None = None
        self.measure: Measure | None = None
        self.spreads: dict[Any, tuple[Tensor, Tensor]] = {}

    def use(self, gates: GateSet) -> None:
        self.bank.gates = gates
        for name, site in self.sites.items():
            site.gate = gates.get(name)

    def set(self, site: GateScope, value: Tensor) -> Tensor:
        if self.following is not None:
            value = self.following(site.name, value)
        site.value = value
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.seen(site.name, self.reading.mean(value) if value.ndim > 2 else value)
        return value

    def fixed(self, site: GateScope, like: Tensor) -> Tensor | None:
        """The value of a gate that reads nothing: held by hand, kept from the prompt, or the even one if untrained."""
        if self.held is not None:
            return self.held.to(like.device)
        if self.reading.kept is not None and site.name in self.reading.kept:
            return self.reading.kept[site.name].to(like.device)
        if site.gate is None and self.measure is None:
            return self.bank.gates.even(like)
        return None

    def read(self, site: GateScope, features: Tensor, owner: Tensor | None = None) -> Tensor:
        """The value of a gate for features ``(B, F)``, or ``(B, T, F)`` of each position."""
        if self.measure is not None:
            self.measure(site.name, self.reading.rows(features) if features.ndim > 2 else features, owner)
        if site.gate is None:
            return self.bank.gates.even(features)
        if features.shape[-1] != site.gate.features:
            flat = self.reads == "flat"
            raise MergeError(
                "A gate reads something of another size than it was trained with.",
                module=site.name or "(network)",
                expected=f"{site.gate.features} numbers",
                found=features.shape[-1],
                remedy="sample at the image size the gates were trained with: they read every position apart (flat)"
                if flat
                else "use the gates with the base model they were trained on",
            )
        return site.gate(features)

    def hidden(self, site: GateScope, path: str, x: Tensor, *, image: bool) -> Tensor:
        """Open a gate that reads `x`, what a block or the layer at `path` gets; `image`: with channels first."""
        site.layer = path
        value = self.fixed(site, x)
        return self.set(site, self.read_input(site, x, image=image) if value is None else value)

    def read_input(self, site: GateScope, x: Tensor, *, image: bool) -> Tensor:
        """The value of a gate that reads `x`, normalised: its mean over positions, or every position (``token``)."""
        if self.reads == "token":
            if image:
                raise MergeError(
                    "Gates per token read sequences, and this layer sees an image.",
                    module=site.layer or site.name,
                    remedy="choose gates that read hidden",
                )
            return self.read(site, self.reading.positions(normalised(x)))
        if image:
            f = normalised(x, 1)
            return self.read(site, f.flatten(2).mean(2) if f.ndim > 2 else f)
        return self.read(site, self.reading.mean(normalised(x)))

    def open(self, site: GateScope, path: str, stack: Stack, x: Tensor, z: Tensor) -> Tensor:
        """The first adapted layer of a scope runs: find the gate's value for the rest of the call."""
        if self.reads in INPUT:
            return self.hidden(site, path, x, image=bool(stack.kernel))
        value = self.fixed(site, x)
        if value is None and self.reads == "text":
            raise _without_text()
        if value is None and site.gate is not None and site.gate.features == 0:
            value = site.gate(x.new_zeros(x.shape[0], 0))  # all it read was of experts that were switched off
        if value is None:  # experts, flat
            f, owner = stack.by_expert(stack.normalised(z, self.bank.experts))
            if self.reads == "flat":
                value = self.read(site, f.flatten(1), owner.repeat(f.shape[1]))
            else:
                value = self.read(site, self.reading.mean(f if z.ndim > 2 else f[:, 0]), owner)
        return self.set(site, value)

    def end(self) -> None:
        """Forget the gates' values: nothing of a pass is kept alive, or used by the next."""
        for site in self.sites.values():
            site.value = None
        self.spreads.clear()
        self.reading = TextPositions()

    def spread(self, g: Tensor, stack: Stack, z: Tensor) -> Tensor:
        """`Stack.spread`, once a pass for all layers that ask for the same: small layers wait for every operation."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return stack.spread(g, z)  # kept, it would keep its graph
        key = (id(g), stack.layout, z.shape[: g.ndim - 1], z.ndim, z.dtype, z.device)
        if key not in self.spreads:
            self.spreads[key] = g, stack.spread(g, z)  # with `g`, whose id nothing else may get meanwhile
        return self.spreads[key][1]

    def begin(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Ask what the gates read in this pass, where they read."""
        if self.texts is not None and self.asks:
            self.reading = self.texts.begin(arguments, named)
        if self.prompt is not None and self.reading.kept is None and self.reads != "token":
            self.reading = self.reading.only(self.prompt)

    def finish(self, output: Any) -> None:
        """A pass of the whole model ended."""
        if self.texts is not None and self.asks:
            self.texts.end(output, {name: site.value for name, site in self.sites.items() if site.value is not None})
        self.end()

    @property
    def asks(self) -> bool:
        """Whether any gate reads something."""
        return self.held is None and (self.measure is not None or self.bank.gates.trained)

    def snapshot(self) -> PassSnapshot:
        return PassSnapshot({name: site.value for name, site in self.sites.items()}, self.held, self.reading)

    @contextmanager
    def again(
        self, snapshot: PassSnapshot, watch: GateObserver | None = None, measure: Measure | None = None
    ) -> Generator[None]:
        """Inside the block a part of an earlier pass runs once more, from where it stood; then all is as before."""
        outer = self.snapshot(), self.watch, self.measure
        self._go_to(snapshot, watch, measure)
        try:
            yield
        finally:
            self._go_to(*outer)

    def _go_to(self, snapshot: PassSnapshot, watch: GateObserver | None, measure: Measure | None) -> None:
        for name, value in snapshot.values.items():
            self.sites[name].value = value
        self.held, self.reading, self.watch, self.measure = snapshot.held, snapshot.reading, watch, measure

    def start(self, text: Tensor | None, arguments: Mapping[str, Any]) -> None:
        """A pass of the whole model begins."""
        self.end()
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.start(arguments)
        if self.reads != "text" or self.held is not None:
            return
        if text is None:
            if self.measure is None and not self.bank.gates.trained:
                return  # even, whatever is read
            raise _without_text()
        f = wide(text).mean(1)
        if self.measure is not None:
            for name in self.sites:
                self.measure(name, f, None)
        if self.bank.gates.trained:
            first = self.sites[self.bank.gates.names[0]]
            assert first.gate is not None
            if f.shape[-1] != first.gate.features:
                self.read(first, f)  # raises
            for name, value in zip(self.bank.gates.names, self.bank.gates.values(f), strict=True):
                self.set(self.sites[name], value)
        even = self.bank.gates.even(f)
        for site in self.sites.values():
            if site.value is None:
                self.set(site, even)


def _without_text() -> MergeError:
    return MergeError(
        "The gates read the text conditioning, and this model got none.",
        expected=f"an argument {' or '.join(TEXT)}",
        remedy="train gates that read hidden or experts",
    )
