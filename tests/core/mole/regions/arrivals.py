"""Where a map acts on a layer, and where a change of the latent arrives: both must be the same positions.

Imported by ComfyUI's own Python too, so that it needs nothing but torch and the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import attach
from legomole.core.mole.concepts import text_mask
from legomole.core.mole.forwards import ArgumentFinder
from legomole.core.mole.gate_inputs import TEXT_ARGUMENTS
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.regions.automatic import AttentionSums, Places, WatchTorch
from legomole.core.mole.regions.layouts import SequenceLayout, layout_of
from legomole.core.mole.regions.picture import patch_size, picture_of, text_lengths
from torch import Tensor, nn


class Case(NamedTuple):
    """A model, a layer that no attention comes before, and a call with a change ``(height, width)`` of the latent."""

    model: nn.Module
    layer: str
    size: tuple[int, int]
    call: Callable[[Tensor], Any]


def check_attention(case: Case) -> None:
    """Assert that automatic regions read the queries of the picture and the keys of the text.

    Of the keys in the first attention of picture and text, those that a change of the latent reaches are no text.
    """
    case.model.eval()
    seen: list[tuple[Tensor, Places]] = []
    state: dict[str, AttentionSums] = {}
    finder = ArgumentFinder(case.model.forward, TEXT_ARGUMENTS)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layout = layout_of(case.model) or SequenceLayout(order="text first")
        text, picture = finder.find(args, kwargs), picture_of(args, kwargs, frames_first=layout.frames_first)
        assert isinstance(text, Tensor)
        assert picture is not None
        texts = text_lengths(text, text_mask(kwargs, text) if layout.without_padding else None) or []
        shares = torch.ones(1, text.shape[1], 1)
        state["sums"] = AttentionSums(picture, patch_size(case.model), layout, [0], shares, texts, None)

    def read(query: Tensor, key: Tensor, *_: Any) -> None:
        if key.ndim == 4 and len(key) == state["sums"].picture.samples:
            places = state["sums"].places(query.shape[2], key.shape[2])
            seen.extend([(key[0].detach().clone(), places)] if places is not None else [])

    hook = case.model.register_forward_pre_hook(begin, with_kwargs=True)
    with torch.no_grad(), WatchTorch(read):
        case.call(torch.zeros(case.size))
        count = len(seen)
        case.call(torch.ones(case.size))
    hook.remove()
    assert count > 0
    (before, places), (after, _) = seen[0], seen[count]
    of_picture = (before != after).any(-1).any(0)
    if before.shape[1] == state["sums"].length:  # cross attention
        assert not of_picture.any()
    else:
        start, length = places.picture[0], state["sums"].texts[0]
        assert of_picture[start : start + places.grid.count].all()
        assert not of_picture[places.text : places.text + length].any()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def check(case: Case) -> None:
    """Assert: 1 in the map's quarter, 0 in the rest of the picture, the mean at text, references and padding."""
    case.model.eval()
    height, width = case.size
    quarter = torch.zeros(height, width)
    quarter[: height // 2, width // 2 :] = 1
    inside, picture = _arrivals(case, quarter), _arrivals(case, torch.ones(height, width))
    factors = _measured_factors(case, quarter)
    factors = torch.where(factors.isnan(), 0.25, factors)  # padding, whose update is 0
    assert inside.any()
    assert (picture & ~inside).any()
    expected = torch.where(inside, 1.0, torch.where(picture, 0.0, 0.25))
    torch.testing.assert_close(factors, expected, atol=1e-3, rtol=0)


def _measured_factors(case: Case, region: Tensor) -> Tensor:
    """Size of the LoRA's update at every position of the layer, in units of its size without a region."""
    layer = case.model.get_submodule(case.layer)
    adapter = Adapter({case.layer: _update(layer)})
    sizes: list[Tensor] = []
    for map_ in (None, region):
        with attach(case.model, Mixture([adapter], regions=[map_])):
            x, y = _input_and_output(case, layer)
        sizes.append((y - nn.functional.linear(x, layer.weight, layer.bias)).norm(dim=-1))
    return sizes[1] / sizes[0]


def _update(layer: nn.Module, rank: int = 2) -> LowRank:
    d_out, d_in = layer.weight.shape
    g = torch.Generator().manual_seed(0)
    return LowRank(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g))


def _input_and_output(case: Case, layer: nn.Module) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, y: seen.extend([args[0].clone(), y.clone()]))
    with torch.no_grad():
        case.call(torch.zeros(case.size))
    hook.remove()
    return seen[0], seen[1]


def _arrivals(case: Case, change: Tensor) -> Tensor:
    """The positions of the layer's input that a change of the latent reaches. Repeated last tokens are padding."""
    layer = case.model.get_submodule(case.layer)
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    with torch.no_grad():
        for size in (0, 1):
            case.call(size * change)
    hook.remove()
    repeated = nn.functional.pad((inputs[0].diff(dim=-2) == 0).all(-1), (1, 0))
    return (inputs[0] != inputs[1]).any(-1) & ~repeated
