"""record_second_moments: the inputs that hooks record, on layers of every kind."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.train.second_moments import (
    SecondMoments,
    convolution_patches,
    find_shared_inputs,
    record_second_moments,
)
from torch import nn


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # inputs (1, 2), (3, 0) and (0, 0): sums 1 + 9, 2, 4 over n = 3
    moment = SecondMoments()
    moment.add(torch.tensor([[1.0, 2.0]]))
    moment.add(torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]))
    assert moment.n == 3
    assert torch.allclose(moment.value, torch.tensor([[10.0, 2.0], [2.0, 4.0]]) / 3)


def test_batch_sizes_do_not_matter():
    X = randn(30, 5)
    whole, parts = SecondMoments(), SecondMoments()
    whole.add(X)
    for part in X.split(7):
        parts.add(part)
    assert torch.allclose(whole.value, parts.value, atol=1e-6)
    assert torch.allclose(whole.value, X.mT @ X / 30, atol=1e-6)


def test_merging_two_adds_their_inputs():
    X = randn(30, 5)
    whole, parts = SecondMoments(), SecondMoments()
    whole.add(X)
    for part in (*X.split(7), X[:0]):
        one = SecondMoments()
        one.add(part)
        parts.merge(one)
    parts.merge(SecondMoments())
    assert parts.n == 30
    assert torch.allclose(whole.value, parts.value, atol=1e-6)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_summed_in_float32_at_least_also_inside_autocast(dtype, kept):
    X = randn(64, 5).to(dtype)
    moment = SecondMoments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moment.add(X)
    assert moment.value.dtype == kept
    assert torch.allclose(moment.value.double(), X.double().mT @ X.double() / 64, atol=1e-6)


def test_a_module_without_input_is_an_error():
    with record_second_moments({"layer": nn.Linear(2, 2)}) as moments:
        pass
    with pytest.raises(MergeError, match="had no input"):
        _ = moments["layer"].value


def test_measures_a_running_model_and_leaves_it_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = randn(2, 5, 4)  # batch, tokens, width
    before = model(x)
    with record_second_moments({"first": model[0], "last": model[2]}) as moments:
        during = model(x)
        model(x)
    assert torch.equal(before, during)
    flat, hidden = x.reshape(-1, 4), model[:2](x).reshape(-1, 6)
    assert torch.allclose(moments["first"].value, flat.mT @ flat / 10, atol=1e-6)
    assert torch.allclose(moments["last"].value, hidden.mT @ hidden / 10, atol=1e-6)
    assert not moments["last"].value.requires_grad
    model(x)
    assert moments["first"].n == 20  # two passes of ten tokens; the third came after the block


def test_hooks_are_removed_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="stop"), record_second_moments({"layer": layer}) as moments:
        raise RuntimeError("stop")
    layer(torch.ones(1, 2))
    assert moments["layer"].n == 0
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(3, 5, 4, stride=2, padding=1), (2, 3, 11)),
        (nn.Conv2d(3, 5, 1), (2, 3, 4, 6)),
        (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 6)),
        (nn.Conv2d(3, 5, 3, dilation=2, padding="same", padding_mode="reflect"), (2, 3, 7, 6)),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 7, 6)),
        (nn.Conv2d(3, 5, 3, padding="valid"), (3, 7, 6)),  # without a batch dimension
        (nn.Conv3d(2, 5, (2, 3, 1), stride=(1, 2, 1)), (2, 2, 4, 7, 3)),
    ],
)
def test_a_convolution_is_a_matrix_on_its_patches(conv, shape):
    # the patches times the flattened kernel must be the convolution itself
    x = randn(*shape)
    n = len(conv.kernel_size)
    out = conv(x) if x.ndim == n + 2 else conv(x)[None]
    patches = convolution_patches(conv, x)
    assert torch.allclose(patches @ conv.weight.flatten(1).mT + conv.bias, out.movedim(1, -1), atol=1e-5)
    with record_second_moments({"conv": conv}) as moments:
        conv(x)
    flat = patches.reshape(-1, patches.shape[-1])
    assert torch.allclose(moments["conv"].value, flat.mT @ flat / len(flat), atol=1e-5)


def test_grouped_convolutions_are_refused():
    with (
        pytest.raises(MergeError, match=r"Grouped[\s\S]*conv"),
        record_second_moments({"conv": nn.Conv2d(4, 4, 3, groups=2)}),
    ):
        pass


def test_inputs_passed_by_keyword_are_recorded():
    layer = nn.Linear(2, 2)
    with record_second_moments({"layer": layer}) as moments, find_shared_inputs({"layer": layer}) as inputs:
        layer(input=torch.tensor([[1.0, 2.0]]))
    assert torch.equal(moments["layer"].value, torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    assert inputs["layer"].d_in == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_shared_inputs_are_found_by_identity_not_by_value(mode):
    q, k, v, conv, unused = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(4, 3), nn.Conv1d(4, 2, 3), nn.Linear(4, 4)
    layers = {"q": q, "k": k, "v": v, "conv": conv, "again": conv, "unused": unused}
    x = randn(2, 5, 4)
    with mode(), find_shared_inputs(layers) as inputs:
        q(x), k(x)
        v(x.clone())  # equal, but another tensor: it may differ in the next pass
        conv(x.mT)
    assert inputs["q"].tensors == inputs["k"].tensors
    assert len({inputs[name].tensors for name in ("q", "v", "conv", "again")}) == 4
    assert {name: observed.d_in for name, observed in inputs.items()} == {
        "q": 4,
        "k": 4,
        "v": 4,
        "conv": 12,
        "again": 12,
    }
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_was_modified_counts_as_another(mode):
    first, second, third = (nn.Linear(3, 3) for _ in range(3))
    with mode(), find_shared_inputs({"first": first, "second": second, "third": third}) as inputs:
        x = randn(2, 3)
        first(x)
        x.mul_(2)
        second(x)
        second(x)  # called twice, unlike the others
        third(x)
    assert len({observed.tensors for observed in inputs.values()}) == 3
