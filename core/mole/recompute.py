"""Recompute blocks in the backward pass, and keep gradients exact where blocks write in place."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..errors import MergeError
from .gate_values import GateValues
from .observers import CollectedGates


class RecomputableBlock(Protocol):
    """A block's replaced forward method, see `core.mole.block_mixing.BlockForward`."""

    path: str
    module: nn.Module
    gate_values: GateValues
    active: bool

    def run(self, *args: Any, **kwargs: Any) -> Any: ...


def recomputed(block: RecomputableBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block that keeps only its inputs, and runs again in the backward pass. It may write in place."""
    flat, tree = pytree.tree_flatten((args, kwargs))
    tensor_indices = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    open_scopes = [scope for scope in block.gate_values.scopes.values() if scope.value is not None]
    observer, input_observer = block.gate_values.observer, block.gate_values.input_observer
    # The graph keeps `run`. If `run` kept an observer that keeps gates of the graph, neither would ever be freed.
    observed = observer is not None
    snapshot = block.gate_values.snapshot()._replace(values={})  # the values are passed to `checkpoint`, below
    opened: dict[str, Tensor] = {}  # gates that open inside the block; as outputs they get gradients
    output_tree: Any = None

    def run(anchor: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        nonlocal opened, output_tree
        if not block.active:
            raise _detached_too_early(block.path)
        gate_values, collected = block.gate_values, CollectedGates()
        leaves = list(flat)
        for i, value in zip(tensor_indices, tensors[len(open_scopes) :], strict=True):
            leaves[i] = value.clone()
        inner_args, inner_kwargs = pytree.tree_unflatten(leaves, tree)
        # gates of this graph must not be visible to other blocks
        with gate_values.replay(snapshot, collected if observed else None, input_observer):
            for scope, value in zip(open_scopes, tensors, strict=False):
                scope.value = value
            with exact_gradients():
                outputs, output_tree = pytree.tree_flatten(block.run(*inner_args, **inner_kwargs))
            opened = collected.values
            # `checkpoint` differentiates tensors only, not containers; copies, because views must not be written into
            return tuple(copied([anchor, *outputs, *opened.values()]))

    inputs = [scope.value for scope in open_scopes] + [flat[i] for i in tensor_indices]
    for i in tensor_indices:
        flat[i] = None  # `checkpoint` keeps them
    anchor = torch.zeros((), requires_grad=True)  # `checkpoint` requires an input and an output with a gradient
    uses_random_numbers = block.module.training  # dropout must draw the same numbers both times
    results = checkpoint(run, anchor, *inputs, use_reentrant=True, preserve_rng_state=uses_random_numbers)
    outputs = list(cast("tuple[Any, ...]", results))[1:]
    n_outputs = len(outputs) - len(opened)
    if observer is not None:
        for name, value in zip(opened, outputs[n_outputs:], strict=True):
            observer.gate_opened(name, value)
    return pytree.tree_unflatten(outputs[:n_outputs], output_tree)


def recomputable(
    gate_values: GateValues, function: Callable[..., Any], is_attached: Callable[[], bool]
) -> Callable[..., Any]:
    """Wrap a part of a pass that runs now and, by the model's own checkpointing, again in the backward pass.

    By then the pass is over, its gate values are forgotten and other passes may have followed. The second call restores
    the gate values of the time of wrapping, and does not notify observers again.

    Args:
        gate_values: Gate values of the attachment. function: The part of the pass.
        is_attached: Whether the mixture is still attached.
    """
    # the observer itself is not kept: a graph that keeps an observer of its gates would never be freed
    snapshot, observed, has_run = gate_values.snapshot(), gate_values.observer is not None, False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_run
        if not has_run:
            has_run = True
            return function(*args, **kwargs)
        if not is_attached():
            raise _detached_too_early(None)
        # with an observer if there was one: the same operations must run again
        with gate_values.replay(snapshot, CollectedGates() if observed else None):
            return function(*args, **kwargs)

    return run


def _detached_too_early(path: str | None) -> MergeError:
    return MergeError(
        "The mixture was detached before the backward pass, which runs blocks again.",
        module=path,
        remedy="call backward() inside the `with attach(..)` block",
    )


@contextmanager
def exact_gradients() -> Generator[None]:
    """Keep gradients exact where blocks write into tensors that autograd has saved (``img += ..``)."""
    with torch.autograd.graph.saved_tensors_hooks(_clone_unless_parameter, lambda t: t):
        yield


def _clone_unless_parameter(t: Tensor) -> Tensor:
    """Clone saved tensors, except parameters, which are never modified in place."""
    return t if isinstance(t if t._base is None else t._base, nn.Parameter) else t.clone()


def copied(tree: Any) -> Any:
    """The same tuples, lists and dicts with cloned tensors."""
    return pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, tree)
