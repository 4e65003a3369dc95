"""The replaced forward method of a block: opens its gates, mixes its outputs, recomputes it in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from ..errors import MergeError
from .forwards import ArgumentFinder, ReplacedForward
from .gate_inputs import block_expert_features
from .gate_values import GateScope, GateValues
from .gates import READS_LAYER_INPUT, READS_TEXT
from .recompute import copied, recomputed
from .stack import fit_batch

_HIDDEN_STATES = ("img", "x", "hidden_states")  # a block's argument with the hidden states of the image or the text
# a block's argument with the keys and values of a language model's earlier tokens
_CACHE = ("cache", "past_key_values", "past_key_value", "layer_past")


class BlockForward(ReplacedForward):
    """Replaced forward method of a block.

    Args:
        scopes: The scopes inside the block; their gates close when the block begins, unless they read text.
        checkpointing: Whether to recompute the block in the backward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        gate_values: GateValues,
        path: str,
        scopes: Sequence[GateScope],
        *,
        checkpointing: bool,
    ) -> None:
        self.path, self.scopes, self.checkpointing = path, scopes, checkpointing
        self.scope = next((scope for scope in scopes if scope.name == path), None)
        # an outer block (of a U-Net) would run its inner blocks once more per expert for each of its own passes
        contains_blocks = any(other.startswith(f"{path}.") for other in gate_values.bank.blocks)
        self.mixes_outputs = gate_values.bank.mixing == "output" and self.scope is not None and not contains_blocks
        # tensors of more than three dimensions are images with channels first, or (in video transformers) last
        self.channels_first = any(isinstance(layer, (_ConvNd, nn.GroupNorm)) for layer in module.modules())
        super().__init__(module, gate_values)
        self.hidden_states, self.cache = ArgumentFinder(self.inner, _HIDDEN_STATES), ArgumentFinder(self.inner, _CACHE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        recompute = self.checkpointing and torch.is_grad_enabled()
        if (recompute or self.mixes_outputs) and self.cache.find(args, kwargs) is not None:
            raise MergeError(
                "A block that runs more than once would write into the key-value cache each time.",
                module=self.path,
                remedy="call the model with use_cache=False, or use delta mixing without checkpointing",
            )
        return recomputed(self, args, kwargs) if recompute else self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block itself, without recomputation."""
        values = self.gate_values
        if values.reads not in READS_TEXT:
            for scope in self.scopes:
                scope.value = None
        if self.mixes_outputs:
            return self._mixed_outputs(args, kwargs)
        if self.scope is not None and values.reads in READS_LAYER_INPUT:
            x = self._input(args, kwargs)
            values.open_from_layer_input(self.scope, "", x, image=self._is_image(x))
        return self.inner(*args, **kwargs)

    def _mixed_outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``O(x) = F(x) + sum_i g_i (F_i(x) - F(x))``: the block without experts, and once with each expert alone.

        Source: arXiv:2404.13628 eq. 5 to 8.
        """
        values, scope = self.gate_values, self.scope
        assert scope is not None
        n = values.bank.experts
        g, x = scope.value, self._input(args, kwargs)
        outputs: list[list[Any]] = []
        tree = None
        for selection in (torch.zeros(1, n, device=x.device), *torch.eye(n, device=x.device).split(1)):
            scope.value = selection
            copied_args, copied_kwargs = copied((args, kwargs))  # some blocks write into their inputs
            leaves, tree = pytree.tree_flatten(self.inner(*copied_args, **copied_kwargs))
            outputs.append(leaves)
        F, F_i = outputs[0], outputs[1:]  # leaves of the block's output, without experts and with each alone
        if g is None:
            g = values.value_without_input(scope, x)
        if g is None:
            if values.reads in READS_LAYER_INPUT:
                g = values.value_from_layer_input(scope, x, image=self._is_image(x))
            else:
                first = next(j for j, leaf in enumerate(F) if _is_float(leaf))
                E = [self._by_position(leaves[first] - F[first]) for leaves in F_i]
                g = values.evaluate(scope, *block_expert_features(E, values.reads, values.positions))
        values.open_gate(scope, g)
        mixed = [
            leaf + sum(_gated(fit_batch(g, _batch_size(leaf))[..., i], F_i[i][j] - leaf) for i in range(n))
            if _is_float(leaf)
            else leaf
            for j, leaf in enumerate(F)
        ]
        assert tree is not None
        return pytree.tree_unflatten(mixed, tree)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = self.hidden_states.find_stream(args, kwargs)
        return x[None] if x.ndim == 1 else x

    def _is_image(self, x: Tensor) -> bool:
        return self.channels_first and x.ndim > 3

    def _by_position(self, x: Tensor) -> Tensor:
        """``(B, T, d)`` of a sequence, an image or a vector."""
        if x.ndim == 1:
            return x[None, None]
        return x.flatten(2).mT if self._is_image(x) else x.flatten(1, -2) if x.ndim > 2 else x[:, None]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _batch_size(x: Tensor) -> int:
    return x.shape[0] if x.ndim > 1 else 1


def _gated(g: Tensor, x: Tensor) -> Tensor:
    """``g x`` with one gate per sample ``(B,)`` or ``(1,)``, or per position ``(B, T)``; `x` ``(B, ..)``."""
    if g.ndim > 1 and g.shape != x.shape[:2]:
        raise MergeError(
            "A gate per token was opened for other positions than its block's output has.",
            expected=f"{tuple(g.shape)} positions",
            found=tuple(x.shape),
            remedy="use delta mixing, or call the model without attention weights (output_attentions)",
        )
    return g.to(x).view(*g.shape, *(1 for _ in range(x.ndim - g.ndim))) * x
