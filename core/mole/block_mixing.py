"""The forward method of a block: gates inside it open anew, its outputs are mixed, it can be computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from ..errors import MergeError
from .forwards import Arguments, Forward
from .gates import INPUT, normalised, wide
from .gating import GateScope, State
from .recompute import copied, recomputed
from .stack import fit_batch

_STREAM = ("img", "x", "hidden_states")  # what blocks call the stream of the picture or text
# keys and values of a language model's earlier tokens
_CACHE = ("cache", "past_key_values", "past_key_value", "layer_past")


class Block(Forward):
    def __init__(self, module: nn.Module, state: State, path: str, inside: Sequence[GateScope], checkpointing: bool):
        self.path, self.inside, self.checkpointing = path, inside, checkpointing
        self.own = next((site for site in inside if site.name == path), None)
        # a block around other blocks (of a U-Net) would run them once more per LoRA for each of its own passes
        around = any(other.startswith(f"{path}.") for other in state.bank.blocks)
        self.output = state.bank.mixing == "output" and self.own is not None and not around
        # with more than three dimensions: an image with channels first, or (in video transformers) with them last
        self.image = any(isinstance(layer, (_ConvNd, nn.GroupNorm)) for layer in module.modules())
        super().__init__(module, state)
        self.arguments, self.cache = Arguments(self.inner, _STREAM), Arguments(self.inner, _CACHE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        recompute = self.checkpointing and torch.is_grad_enabled()
        if (recompute or self.output) and self.cache.find(args, kwargs) is not None:
            raise MergeError(
                "A block that runs more than once would write into the key-value cache each time.",
                module=self.path,
                remedy="call the model with use_cache=False, or use delta mixing without checkpointing",
            )
        return recomputed(self, args, kwargs) if recompute else self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state.reads != "text":
            for site in self.inside:
                site.value = None
        if self.output:
            return self._output_mixed(args, kwargs)
        if self.own is not None and state.reads in INPUT:
            x = self._stream(args, kwargs)
            state.hidden(self.own, "", x, image=self._image(x))
        return self.inner(*args, **kwargs)

    def _image(self, x: Tensor) -> bool:
        return self.image and x.ndim > 3

    def _output_mixed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``F(x) + sum_i g_i (F_i(x) - F(x))``: the block without experts, and once under each alone."""
        state, site = self.state, self.own
        assert site is not None
        n = state.bank.experts
        gate, x = site.value, self._stream(args, kwargs)
        alone = torch.eye(n, device=x.device)
        outputs: list[list[Any]] = []
        tree = None
        for g in (torch.zeros(1, n, device=x.device), *alone.split(1)):
            site.value = g
            copied_args, copied_kwargs = copied((args, kwargs))  # some blocks write into their inputs
            flat, tree = pytree.tree_flatten(self.inner(*copied_args, **copied_kwargs))
            outputs.append(flat)
        base, own = outputs[0], outputs[1:]
        if gate is None:
            gate = state.fixed(site, x)
        if gate is None:
            if state.reads in INPUT:
                gate = state.read_input(site, x, image=self._image(x))
            else:
                gate = state.read(site, *self._outputs_read(base, own))
        state.set(site, gate)
        mixed = [
            value + sum(_scaled(fit_batch(gate, _batch(value))[..., i], own[i][j] - value) for i in range(n))
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for j, value in enumerate(base)
        ]
        assert tree is not None
        return pytree.tree_unflatten(mixed, tree)

    def _outputs_read(self, base: list[Any], own: list[list[Any]]) -> tuple[Tensor, Tensor]:
        """The experts' outputs as published: concatenated, normalised, per position or in the mean."""
        j = next(j for j, value in enumerate(base) if isinstance(value, Tensor) and value.is_floating_point())
        deltas = [wide(self._positions(flat[j] - base[j])) for flat in own]
        E = normalised(torch.cat(deltas, -1))  # (B, T, N d)
        owner = torch.arange(len(own), device=E.device).repeat_interleave(deltas[0].shape[-1])
        if self.state.reads == "flat":
            return E.flatten(1), owner.repeat(E.shape[1])
        return self.state.reading.mean(E), owner

    def _positions(self, x: Tensor) -> Tensor:
        """``(B, T, d)`` of a sequence or an image."""
        if x.ndim == 1:
            return x[None, None]
        return x.flatten(2).mT if self._image(x) else x.flatten(1, -2) if x.ndim > 2 else x[:, None]

    def _stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = self.arguments.stream(args, kwargs)
        return x[None] if x.ndim == 1 else x


def _batch(x: Tensor) -> int:
    return x.shape[0] if x.ndim > 1 else 1


def _scaled(g: Tensor, x: Tensor) -> Tensor:
    """Gates ``(B,)``, ``(1,)`` or ``(B, T)`` of each position, times what a block adds."""
    if g.ndim > 1 and g.shape != x.shape[:2]:
        raise MergeError(
            "A gate per token was opened for other positions than its block gives out.",
            expected=f"{tuple(g.shape)} positions",
            found=tuple(x.shape),
            remedy="use delta mixing, or call the model without attention weights (output_attentions)",
        )
    return g.to(x).view(*g.shape, *(1 for _ in range(x.ndim - g.ndim))) * x
