"""Recompute blocks in the backward pass, and keep gradients exact where blocks work in place."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..errors import MergeError
from .gating import CollectedGates, State


class Recomputable(Protocol):
    """A block's forward method, see `core.mole.block_mixing.Block`."""

    path: str
    module: nn.Module
    state: State
    active: bool

    def run(self, *args: Any, **kwargs: Any) -> Any: ...


def recomputed(block: Recomputable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep only the inputs; run the block again in the backward pass. Right for blocks that work in place."""
    flat, tree = pytree.tree_flatten((args, kwargs))
    at = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    sites = [site for site in block.state.sites.values() if site.value is not None]
    watch, measure = block.state.watch, block.state.measure
    # the graph keeps `run`: if that kept a watcher, who keeps gates of the graph, neither would ever be freed
    watched = watch is not None
    before = block.state.snapshot()._replace(values={})  # their tensors go through the library, below
    opened: dict[str, Tensor] = {}  # the gates that open inside: with a graph only as outputs, too
    shape: Any = None

    def run(anchor: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        nonlocal opened, shape
        if not block.active:
            raise _taken_off(block.path)
        state, seen = block.state, CollectedGates()
        values = list(flat)
        for i, value in zip(at, tensors[len(sites) :], strict=True):
            values[i] = value.clone()
        inner_args, inner_kwargs = pytree.tree_unflatten(values, tree)
        with state.again(before, seen if watched else None, measure):  # no other block may see this graph
            for site, value in zip(sites, tensors, strict=False):
                site.value = value
            with exact_gradients():
                leaves, shape = pytree.tree_flatten(block.run(*inner_args, **inner_kwargs))
            opened = seen.values
            # only tensors get gradients, not what holds them; copies, because views must not be written into later
            return tuple(copied([anchor, *leaves, *opened.values()]))

    inside = [site.value for site in sites] + [flat[i] for i in at]
    for i in at:
        flat[i] = None  # the library keeps them
    anchor = torch.zeros((), requires_grad=True)  # an input and output with a gradient: the library asks for one
    random = block.module.training  # dropout must fall alike both times
    found = checkpoint(run, anchor, *inside, use_reentrant=True, preserve_rng_state=random)
    found = list(found)[1:]  # type: ignore[call-overload]
    leaves = len(found) - len(opened)
    if watch is not None:
        for name, value in zip(opened, found[leaves:], strict=True):
            watch.seen(name, value)
    return pytree.tree_unflatten(found[:leaves], shape)


def repeatable(state: State, part: Callable[..., Any], at_work: Callable[[], bool]) -> Callable[..., Any]:
    """A part of a pass that runs now and, by a model's own checkpointing, once more in the backward pass.

    By then the pass is over, its gates are closed and others may have followed: the second time everything is put back
    to where it stood now, and nobody is told of the gates again.

    Args:
        state: Of the mixture. part: What runs. at_work: Whether the mixture still is on the model.
    """
    # not the watcher itself: a graph that keeps who keeps its gates would never be freed
    snapshot, watched, again = state.snapshot(), state.watch is not None, False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal again
        if not again:
            again = True
            return part(*args, **kwargs)
        if not at_work():
            raise _taken_off(None)
        with state.again(snapshot, CollectedGates() if watched else None):  # the same operations again
            return part(*args, **kwargs)

    return run


def _taken_off(path: str | None) -> MergeError:
    return MergeError(
        "The mixture was taken off before the backward pass, which runs blocks again.",
        module=path,
        remedy="call backward() inside the `with attach(..)` block",
    )


@contextmanager
def exact_gradients() -> Generator[None]:
    """Gradients that stay right where blocks write into tensors kept for the backward pass (``img += ..``)."""
    with torch.autograd.graph.saved_tensors_hooks(_kept, lambda t: t):
        yield


def _kept(t: Tensor) -> Tensor:
    """What to keep for the backward pass: a copy, but of weights, which nobody writes into, the tensor itself."""
    return t if isinstance(t if t._base is None else t._base, nn.Parameter) else t.clone()


def copied(tree: Any) -> Any:
    """The same tuples, lists and dicts, with copies of the tensors."""
    return pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, tree)
