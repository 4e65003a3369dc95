"""Replaced forward methods: of the whole model, of adapted layers, and of layers that only gates read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .gate_inputs import TEXT_ARGUMENTS
from .gate_values import GateScope, GateValues
from .ownership import is_only_reference
from .stack import Stack


class ReplacedForward:
    """Replaces the forward method of a module, and calls it.

    Offloading hooks (accelerate's) keep the method they wrap as `_old_forward` and restore it as the module's own
    whenever they are renewed, which diffusers does after every image. So the method that they wrap is replaced.
    """

    def __init__(self, module: nn.Module, gate_values: GateValues) -> None:
        self.module, self.gate_values, self.active = module, gate_values, True
        slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        current = module.__dict__.get(slot)
        self.previous: Any = _active_forward(current)
        self.inner: Callable[..., Any] = getattr(module, slot) if self.previous is current else self._wrapped()
        setattr(module, slot, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the replaced method: pipelines and `generate` inspect it."""
        return inspect.signature(self.inner)

    def remove(self) -> None:
        self.active = False  # if another program has wrapped this method, it stays and only passes calls on
        self.previous = previous = _active_forward(self.previous)
        attributes = self.module.__dict__
        if attributes.get("forward") is self and previous is None:
            del self.module.forward
        elif attributes.get("forward") is self:
            self.module.forward = previous
        if attributes.get("_old_forward") is self:  # also if the hooks were added later
            setattr(self.module, "_old_forward", self._wrapped())  # noqa: B010

    def _wrapped(self) -> Any:
        """The method that was replaced: the instance's, else the one of the module's class."""
        return self.previous or type(self.module).forward.__get__(self.module)


def _active_forward(forward: Any) -> Any:
    """`forward`, or the method below it if it was removed while another program had wrapped it."""
    while isinstance(forward, ReplacedForward) and not forward.active:
        forward = forward.previous
    return forward


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer, passed by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


class LayerForward(ReplacedForward):
    """Replaced forward method of an adapted layer: adds the gated experts to its output."""

    def __init__(self, module: nn.Module, gate_values: GateValues, path: str, stack: Stack, scope: GateScope) -> None:
        self.path, self.stack, self.scope = path, stack, scope
        self.unbatched_ndim = 1 + len(stack.kernel)
        super().__init__(module, gate_values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [self.inner(*args, **kwargs)]
        if not self.active:
            return outputs[0]
        if self.gate_values.held_are_zero:  # nothing to add
            if self.scope.value is None:
                self.gate_values.open_held(self.scope, self.path, outputs[0])
            return outputs[0]
        in_place = not torch.is_grad_enabled() and is_only_reference(outputs)
        y = outputs[0]
        x = first_argument(args, kwargs)
        if x.device != y.device:
            x = x.to(y.device)
        unbatched = x.ndim == self.unbatched_ndim
        if unbatched:
            x, y = x[None], y[None]
        z = self.stack.down(self.module, x)
        g = self.scope.value
        if g is None:
            g = self.gate_values.open_at_layer(self.scope, self.path, self.stack, x, z)
        gated = z * self.gate_values.unit_gates(g, self.stack, z)
        if self.gate_values.regions is not None:
            factors = self.gate_values.regions.unit_factors(self.path, self.stack, z)
            gated = gated if factors is None else gated * factors
        y = self.stack.add(y, gated, in_place=in_place)
        return y[0] if unbatched else y


class GateReaderForward(ReplacedForward):
    """Replaced forward method of a layer that a gate read in training, but that no expert changes any more.

    Only experts that are switched off changed it.
    """

    def __init__(self, module: nn.Module, gate_values: GateValues, path: str, scope: GateScope) -> None:
        self.path, self.scope, self.image = path, scope, isinstance(module, _ConvNd)
        self.unbatched_ndim = 1 + (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
        super().__init__(module, gate_values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active and self.scope.value is None:
            x = first_argument(args, kwargs)
            x = x[None] if x.ndim == self.unbatched_ndim else x
            self.gate_values.open_from_layer_input(self.scope, self.path, x, image=self.image)
        return self.inner(*args, **kwargs)


class ModelForward(ReplacedForward):
    """Replaced forward method of the whole model: begins and ends each pass, and finds its text conditioning."""

    def __init__(self, module: nn.Module, gate_values: GateValues) -> None:
        super().__init__(module, gate_values)
        self.text = ArgumentFinder(self.inner, TEXT_ARGUMENTS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            text = self.text.find(args, kwargs)
            self.gate_values.begin_pass(text if isinstance(text, Tensor) else None, args, kwargs)
        try:
            output = self.inner(*args, **kwargs)
        finally:
            if self.gate_values.regions is not None:
                self.gate_values.regions.end_pass()
        if self.active:
            self.gate_values.end_pass(output)
        return output


class ArgumentFinder:
    """Finds an argument of a forward method by its possible names, passed by position or by keyword."""

    def __init__(self, forward: Callable[..., Any], names: Sequence[str]) -> None:
        try:
            parameters = inspect.signature(forward).parameters.values()
        except (TypeError, ValueError):  # another program's wrapper without a signature: find keywords only
            parameters = ()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.names = names
        self.positions = [positional.index(name) for name in names if name in positional]

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The argument; ``None`` if it was not passed."""
        for name in self.names:
            if kwargs.get(name) is not None:
                return kwargs[name]
        for position in self.positions:
            if position < len(args):
                return args[position]
        return None

    def find_stream(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden states of a block: by name, else the last sequence among the positional arguments."""
        stream = self.find(args, kwargs)
        if isinstance(stream, Tensor):
            return stream
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sequences = [value for value in args if isinstance(value, Tensor) and value.ndim > 2]
        return (sequences[-1:] or tensors)[0]
