"""Forward methods in place of a module's own: of adapted layers, and of the whole model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .gating import TEXT, GateScope, State
from .ownership import is_only_reference
from .stack import Stack


class Forward:
    """A forward method in place of a module's own, which it calls.

    Offloading hooks (accelerate's) keep the method they wrap as `_old_forward` and put it back as the module's own
    whenever they are renewed, which diffusers does after every picture. So we go below them.
    """

    def __init__(self, module: nn.Module, state: State) -> None:
        self.module, self.state, self.active = module, state, True
        slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        found = module.__dict__.get(slot)
        self.previous: Any = _at_work(found)
        self.inner: Callable[..., Any] = getattr(module, slot) if self.previous is found else self._below()
        setattr(module, slot, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __signature__(self) -> inspect.Signature:
        """The module's own: pipelines and `generate` look there for what a model takes."""
        return inspect.signature(self.inner)

    def remove(self) -> None:
        self.active = False  # should another program have put something on top, this only passes calls on
        self.previous = previous = _at_work(self.previous)
        own = self.module.__dict__
        if own.get("forward") is self and previous is None:
            del self.module.forward
        elif own.get("forward") is self:
            self.module.forward = previous
        if own.get("_old_forward") is self:  # also if the hooks came after us
            setattr(self.module, "_old_forward", self._below())  # noqa: B010

    def _below(self) -> Any:
        """What a call goes on to: the forward that was there, else the one of the module's class."""
        return self.previous or type(self.module).forward.__get__(self.module)


def _at_work(forward: Any) -> Any:
    """A forward, or what is below it if it was taken off while another program was on top."""
    while isinstance(forward, Forward) and not forward.active:
        forward = forward.previous
    return forward


def first_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


class Layer(Forward):
    """Adds the gated experts to a layer's output."""

    def __init__(self, module: nn.Module, state: State, path: str, stack: Stack, site: GateScope) -> None:
        self.path, self.stack, self.site = path, stack, site
        self.unbatched = 1 + len(stack.kernel)  # dimensions of an input without a batch
        super().__init__(module, state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [self.inner(*args, **kwargs)]
        if not self.active:
            return outputs[0]
        in_place = not torch.is_grad_enabled() and is_only_reference(outputs)
        y = outputs[0]
        x = first_given(args, kwargs)
        if x.device != y.device:
            x = x.to(y.device)
        unbatched = x.ndim == self.unbatched
        if unbatched:
            x, y = x[None], y[None]
        z = self.stack.down(self.module, x)
        g = self.site.value
        if g is None:
            g = self.state.open(self.site, self.path, self.stack, x, z)
        y = self.stack.add(y, z * self.state.spread(g, self.stack, z), in_place=in_place)
        return y[0] if unbatched else y


class Reader(Forward):
    """Opens a gate where it read in training, at a layer that only experts changed which are switched off now."""

    def __init__(self, module: nn.Module, state: State, path: str, site: GateScope) -> None:
        self.path, self.site, self.image = path, site, isinstance(module, _ConvNd)
        self.unbatched = 1 + (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
        super().__init__(module, state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active and self.site.value is None:
            x = first_given(args, kwargs)
            x = x[None] if x.ndim == self.unbatched else x
            self.state.hidden(self.site, self.path, x, image=self.image)
        return self.inner(*args, **kwargs)


class Root(Forward):
    def __init__(self, module: nn.Module, state: State) -> None:
        super().__init__(module, state)
        self.arguments = Arguments(self.inner, TEXT)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            text = self.arguments.find(args, kwargs)
            if self.state.following is not None:
                batch = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1), 0)
                self.state.following.start(kwargs, batch)
            self.state.start(text if isinstance(text, Tensor) else None, kwargs)
            self.state.begin(args, kwargs)
        output = self.inner(*args, **kwargs)
        if self.active:
            self.state.finish(output)
        return output


class Arguments:
    """Finds one of a forward method's arguments by name, however it is passed."""

    def __init__(self, forward: Callable[..., Any], names: Sequence[str]) -> None:
        try:
            parameters = inspect.signature(forward).parameters.values()
        except (TypeError, ValueError):  # another program's wrapper that does not tell: by keyword only
            parameters = ()
        known = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.names = names
        self.positions = [known.index(name) for name in names if name in known]

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name in self.names:
            if kwargs.get(name) is not None:
                return kwargs[name]
        for position in self.positions:
            if position < len(args):
                return args[position]
        return None

    def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The stream of the picture (or the text): by name, else the last of the sequences given by position."""
        found = self.find(args, kwargs)
        if isinstance(found, Tensor):
            return found
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sequences = [value for value in args if isinstance(value, Tensor) and value.ndim > 2]
        return (sequences[-1:] or tensors)[0]
