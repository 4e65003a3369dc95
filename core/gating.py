"""Gating: the gates of a mixture in a pass of the model, which the replaced forward methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .bank import Bank
from .errors import MergeError
from .gates import Gate, GateSet, wide
from .guidance import Following
from .stack import Stack

TEXT = ("encoder_hidden_states", "context")  # what models call their text conditioning (B, tokens, features)

Measure = Callable[[str, Tensor, "Tensor | None"], None]


class Watcher(Protocol):
    """Is told what the gates do. Never from inside a compiled model."""

    def start(self, arguments: Mapping[str, Any]) -> None:
        """A pass of the whole model begins, called with these keyword arguments."""
        ...

    def seen(self, scope: str, value: Tensor) -> None:
        """A gate opened to `value`, ``(B, N)`` or ``(1, N)`` float32; with its graph while gradients are taken."""
        ...


class Collected:
    """The values of the gates that open, by scope. A `Watcher`."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def start(self, arguments: Mapping[str, Any]) -> None:
        pass

    def seen(self, scope: str, value: Tensor) -> None:
        self.values[scope] = value


class Site:
    """One scope at work: its gate, and the gate's value in the call that is going on."""

    def __init__(self, name: str, gate: Gate | None) -> None:
        self.name, self.gate = name, gate
        self.layer = ""  # see `Gate`
        self.value: Tensor | None = None


class State:
    """What the replaced forward methods share."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.reads = bank, bank.gates.settings.reads
        self.sites = {scope.name: Site(scope.name, None) for scope in bank.scopes.values()}
        self.use(bank.gates)
        self.held: Tensor | None = None
        self.following: Following | None = None
        self.watch: Watcher | None = None
        self.measure: Measure | None = None
        self.spreads: dict[Any, tuple[Tensor, Tensor]] = {}

    def use(self, gates: GateSet) -> None:
        self.bank.gates = gates
        for name, site in self.sites.items():
            site.gate = gates.get(name)

    def set(self, site: Site, value: Tensor) -> Tensor:
        if self.following is not None:
            value = self.following(site.name, value)
        site.value = value
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.seen(site.name, value)
        return value

    def fixed(self, site: Site, like: Tensor) -> Tensor | None:
        """The value of a gate that reads nothing: one held by hand, or the even one of an untrained gate."""
        if self.held is not None:
            return self.held.to(like.device)
        if site.gate is None and self.measure is None:
            return self.bank.gates.even(like)
        return None

    def read(self, site: Site, features: Tensor, owner: Tensor | None = None) -> Tensor:
        if self.measure is not None:
            self.measure(site.name, features, owner)
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

    def hidden(self, site: Site, path: str, x: Tensor, *, image: bool) -> Tensor:
        """Open a gate that reads `x`, what a block or the layer at `path` gets; `image`: with channels first."""
        site.layer = path
        value = self.fixed(site, x)
        return self.set(site, self.read(site, pooled(x, channels_first=image)) if value is None else value)

    def open(self, site: Site, path: str, stack: Stack, x: Tensor, z: Tensor) -> Tensor:
        """The first adapted layer of a scope runs: find the gate's value for the rest of the call."""
        if self.reads == "hidden":
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
                value = self.read(site, f.mean(1), owner)
        return self.set(site, value)

    def end(self) -> None:
        """Forget the gates' values: nothing of a pass is kept alive, or used by the next."""
        for site in self.sites.values():
            site.value = None
        self.spreads.clear()

    def spread(self, g: Tensor, stack: Stack, z: Tensor) -> Tensor:
        """`Stack.spread`, once a pass for all layers that ask for the same: small layers wait for every operation."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return stack.spread(g, z)  # kept, it would keep its graph
        key = (id(g), stack.layout, z.shape[0], z.ndim, z.dtype, z.device)
        if key not in self.spreads:
            self.spreads[key] = g, stack.spread(g, z)  # with `g`, whose id nothing else may get meanwhile
        return self.spreads[key][1]

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


def pooled(x: Tensor, *, channels_first: bool) -> Tensor:
    """Mean over all positions: ``(B, channels)``, at least float32."""
    x = wide(x)
    if channels_first:
        return x.flatten(2).mean(2) if x.ndim > 2 else x
    return x.flatten(1, -2).mean(1) if x.ndim > 2 else x
