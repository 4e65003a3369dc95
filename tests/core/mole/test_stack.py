"""Stack: all experts at once against one after the other, for every kind of layer; the paper's gate input."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.mole.adapted_layers import rows_of, stacks
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.stack import ExpertSlice, Stack, fit_batch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..merge.pools import close

CONVS = {
    "1d": (nn.Conv1d(3, 6, 3, padding=1), (3, 9)),
    "2d": (nn.Conv2d(3, 6, 3, stride=2, padding=1), (3, 7, 6)),
    "2d, 1 x 1": (nn.Conv2d(3, 6, 1), (3, 4, 4)),
    "2d, oblong, dilated": (nn.Conv2d(3, 6, (3, 5), padding=(2, 0), dilation=(2, 1), bias=False), (3, 7, 8)),
    "2d, circular": (nn.Conv2d(3, 6, 3, padding=2, padding_mode="circular"), (3, 5, 5)),
    "2d, reflect, same": (nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect"), (3, 5, 5)),
    "3d": (nn.Conv3d(3, 6, (3, 1, 1), padding=(1, 0, 0)), (3, 4, 3, 3)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def update(rank: int, d_out: int, d_in: int, seed: int = 0, **kw) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), **kw)


def lora_of(low: LowRank) -> Adapter:
    return Adapter({"c": low})


def apply(stack: Stack, layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    return stack.add(layer(x), stack.gated(stack.down(layer, x), g))


class TestLinear:
    @given(
        st.integers(0, 1000),
        st.lists(
            st.tuples(st.integers(1, 4), st.sampled_from([1.0, -0.7, 0.0, 2.5]), st.sampled_from([None, 1.0, -3.0])),
            min_size=1,
            max_size=5,
        ),
        st.sampled_from([(4,), (3, 4), (2, 3, 4)]),
        st.booleans(),
    )
    @settings(max_examples=40, deadline=None)
    def test_equals_the_loop_over_experts(self, seed, experts, shape, each):
        """``y + sum_i g_i w_i scale_i B_i A_i x`` in float64, sample by sample."""
        torch.manual_seed(seed)
        layer, x = nn.Linear(4, 6).requires_grad_(False), torch.randn(2, *shape)
        parts = [
            ExpertSlice(i, update(rank, 6, 4, seed + i, alpha=alpha), 0, 6, weight)
            for i, (rank, weight, alpha) in enumerate(experts)
        ]
        g = torch.randn(x.shape[0] if each else 1, len(experts))
        expected = layer(x).double()
        for i, part in enumerate(parts):
            delta = part.weight * part.update.delta().double()
            gate = g[:, i].double().view(-1, *(1 for _ in range(x.ndim - 1)))
            expected = expected + gate * (x.double() @ delta.mT)
        stack = Stack(parts, 6)
        assert stack.whole
        for taking in (False, True):  # outputs are not overwritten if gradients are enabled
            with torch.set_grad_enabled(taking):
                assert close(apply(stack, layer, x, g), expected)

    def test_by_hand(self):
        # A = (1, 1), B = (2, 4)^T, alpha 2 at rank 1, strength .5: delta = [[2, 2], [4, 4]]; x = (1, 2): (6, 12)
        # gates .5 and -1 for the two samples, the layer's output is 0
        layer = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(layer.weight)
        low = LowRank(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [4.0]]), alpha=2.0)
        y = apply(
            Stack([ExpertSlice(0, low, 0, 2, 0.5)], 2),
            layer,
            torch.tensor([[1.0, 2.0]] * 2),
            torch.tensor([[0.5], [-1]]),
        )
        assert torch.allclose(y, torch.tensor([[3.0, 6.0], [-6.0, -12.0]]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_near_float32(self, dtype):
        torch.manual_seed(0)
        layer, x, g = (
            nn.Linear(64, 48).requires_grad_(False),
            torch.randn(2, 5, 64),
            torch.tensor([[0.5, 1.5], [1.0, -0.3]]),
        )
        parts = [ExpertSlice(i, update(4, 48, 64, i, alpha=1.0), 0, 48) for i in range(2)]
        expected = apply(Stack(parts, 48), layer, x, g)
        y = apply(Stack(parts, 48, dtype=dtype), layer.to(dtype), x.to(dtype), g)
        assert y.dtype == dtype
        assert close(y, expected, 0.02 if dtype == torch.bfloat16 else 0.003)

    def test_factors_follow_the_dtype_of_the_input_and_the_output(self):
        """A host may cast a layer's weights to the dtype of its input (here float32), or cast its output."""
        layer, x, g = nn.Linear(4, 6).requires_grad_(False), torch.randn(2, 4), torch.ones(1, 1)
        stack = Stack([ExpertSlice(0, update(2, 6, 4), 0, 6)], 6, dtype=torch.bfloat16)
        assert apply(stack, layer, x, g).dtype == torch.float32
        y = stack.add(layer(x).half(), stack.gated(stack.down(layer, x), g))
        assert y.dtype == torch.float16

    def test_the_transposed_layer_of_gpt2(self):
        layer, x, low = Conv1D(6, 4).requires_grad_(False), torch.randn(2, 3, 4), update(2, 6, 4)
        built = stacks(Mixture((lora_of(low),)), {"c": layer}, {"c": ("c", 0, 6, None)})["c"]
        assert close(apply(built, layer, x, torch.ones(1, 1)), layer(x) + x @ low.delta().mT)
        with pytest.raises(MergeError, match=r"another base model[\s\S]*\(6, 4\)[\s\S]*\(6, 5\)"):
            stacks(Mixture((lora_of(update(2, 6, 5)),)), {"c": layer}, {"c": ("c", 0, 6, None)})


class TestConvolution:
    @pytest.mark.parametrize("kind", CONVS)
    def test_equals_the_loop_over_experts(self, kind):
        layer, shape = CONVS[kind]
        torch.manual_seed(0)
        x, g = torch.randn(2, *shape), torch.tensor([[0.5, 1.5], [1.0, -0.3]])
        d_in = 3 * layer.weight[0, 0].numel()
        parts = [ExpertSlice(i, update(2 + i, 6, d_in, i, alpha=1.0), 0, 6, 1.0 - i * 1.5) for i in range(2)]
        expected = layer.double().requires_grad_(False)(x.double())
        for i, part in enumerate(parts):
            delta = (part.weight * part.update.delta().double()).reshape(layer.weight.shape)
            own = layer._conv_forward(x.double(), delta, None)
            expected = expected + g[:, i].double().view(-1, *(1 for _ in shape)) * own
        layer.float()
        stack = Stack(parts, 6, tuple(layer.kernel_size))
        assert close(apply(stack, layer, x, g), expected)
        with torch.no_grad():
            assert close(apply(stack, layer, x, g), expected)

    def test_channels_last(self):
        layer = CONVS["2d"][0].requires_grad_(False)
        x = torch.randn(2, 3, 7, 6).to(memory_format=torch.channels_last)
        stack = Stack([ExpertSlice(0, update(2, 6, 27), 0, 6)], 6, (3, 3))
        g = torch.ones(1, 1)
        for taking in (False, True):
            with torch.set_grad_enabled(taking):
                assert close(apply(stack, layer, x, g), apply(stack, layer, x.contiguous(), g))


class TestRowGroups:
    """A fused layer whose rows belong to different modules of a file."""

    def test_split_q_k_v_in_a_fused_layer(self):
        torch.manual_seed(0)
        layer, x, g = (
            nn.Linear(4, 9).requires_grad_(False),
            torch.randn(2, 5, 4),
            torch.tensor([[0.5, 1.5, 1.0], [1.0, -0.3, 2.0]]),
        )
        parts = [
            ExpertSlice(0, update(2, 3, 4, 0), 0, 3),  # to_q of expert 0
            ExpertSlice(0, update(2, 3, 4, 1), 6, 9),  # its to_v
            ExpertSlice(1, update(3, 9, 4, 2), 0, 9, -0.5),  # a fused qkv
            ExpertSlice(2, update(1, 3, 4, 3), 3, 6),  # to_k
            ExpertSlice(1, update(1, 3, 4, 4), 3, 6),
        ]
        expected = layer(x).double()
        for part in parts:
            delta = torch.zeros(9, 4, dtype=torch.float64)
            delta[part.start : part.stop] = part.weight * part.update.delta()
            expected = expected + g[:, part.expert].double().view(-1, 1, 1) * (x.double() @ delta.mT)
        stack = Stack(parts, 9)
        assert not stack.whole
        assert close(apply(stack, layer, x, g), expected)
        with torch.no_grad():
            assert close(apply(stack, layer, x, g), expected)

    def test_convolutions_have_row_groups_too(self):
        torch.manual_seed(0)
        layer, x, low = nn.Conv2d(3, 6, 3, padding=1).requires_grad_(False), torch.randn(2, 3, 4, 4), update(2, 2, 27)
        expected = layer(x)
        expected[:, 4:6] += layer._conv_forward(x, low.delta().view(2, 3, 3, 3), None)
        assert close(apply(Stack([ExpertSlice(0, low, 4, 6)], 6, (3, 3)), layer, x, torch.ones(1, 1)), expected)

    def test_a_row_order_is_applied(self):
        """A host that swaps the halves of a layer (scale and shift) swaps them in the update."""
        torch.manual_seed(0)
        layer, x, low = nn.Linear(4, 6).requires_grad_(False), torch.randn(2, 4), update(2, 6, 4)
        stack = Stack([ExpertSlice(0, low, 0, 6, 1.0, ((3, 6), (0, 3)))], 6)
        expected = layer(x) + x @ low.delta()[[3, 4, 5, 0, 1, 2]].mT
        assert close(apply(stack, layer, x, torch.ones(1, 1)), expected)

    def test_gradients_reach_the_gates_past_the_layer_below(self):
        """The output of a layer is not overwritten while its backward pass may need it."""
        x = torch.randn(2, 4, requires_grad=True)
        g = torch.ones(1, 1, requires_grad=True)
        stack = Stack([ExpertSlice(0, update(2, 3, 4), 0, 3)], 6)
        y = torch.tanh(nn.Linear(4, 6)(x))  # its gradient is computed from its output
        stack.add(y, stack.gated(stack.down(nn.Identity(), x), g)).square().sum().backward()
        assert x.grad is not None
        assert float(g.grad.abs()) > 0


class TestNormalised:
    @pytest.mark.parametrize("kernel", [(), (3, 3)])
    @pytest.mark.parametrize("grouped", [False, True])
    def test_equals_the_literal_form(self, kernel, grouped):
        """``e (N, N d_out)`` on the concatenated, normalised outputs equals ``(e U) (z / rho)``."""
        torch.manual_seed(0)
        N, d_out = 3, 6
        layer = nn.Conv2d(2, d_out, 3, padding=1) if kernel else nn.Linear(4, d_out)
        x = torch.randn(2, 2, 5, 4) if kernel else torch.randn(2, 5, 4)
        d_in = 18 if kernel else 4
        rows = [(0, 6), (0, 6), (0, 6)] if not grouped else [(0, 3), (0, 6), (3, 6)]
        parts = [ExpertSlice(i, update(2 + i, b - a, d_in, i), a, b, 1.0 - i) for i, (a, b) in enumerate(rows)]
        parts += [ExpertSlice(0, update(1, 3, d_in, 7), 3, 6)] if grouped else []
        stack = Stack(parts, d_out, kernel)
        z = stack.down(layer, x)
        f = stack.normalised_outputs(z, N)  # (B, T, R)
        # computed literally
        flat = (z.flatten(2).mT if kernel else z).double()  # (B, T, R)
        E = torch.zeros(*flat.shape[:2], N, d_out, dtype=torch.float64)
        U = torch.zeros(N, d_out, flat.shape[-1], dtype=torch.float64)  # each expert's, of all units
        for (start, stop, a, b), up in zip(stack.groups, stack.U, strict=True):
            for unit in range(a, b):
                U[int(stack.owner[unit]), start:stop, unit] = up[:, unit - a].double()
        E = torch.einsum("ndr,btr->btnd", U, flat).flatten(2)  # (B, T, N d_out)
        e = torch.randn(N, N * d_out, dtype=torch.float64)
        literal = (E / E.square().mean(-1, keepdim=True).sqrt()) @ e.mT
        assert close(f.double() @ (e @ U.flatten(0, 1)).mT, literal, 1e-5)

    def test_positions_where_no_expert_does_anything_give_zero(self):
        stack = Stack([ExpertSlice(0, update(2, 6, 4), 0, 6)], 6)
        f = stack.normalised_outputs(torch.zeros(1, 3, 2), 1)
        assert torch.equal(f, torch.zeros(1, 3, 2))

    def test_sorted_by_expert(self):
        parts = [
            ExpertSlice(1, update(2, 3, 4), 0, 3),
            ExpertSlice(0, update(1, 3, 4), 3, 6),
            ExpertSlice(1, update(1, 3, 4), 3, 6),
        ]
        stack = Stack(parts, 6)
        assert stack.owner.tolist() == [1, 1, 0, 1]
        z, owner = stack.by_expert(torch.tensor([[10.0, 11.0, 20.0, 12.0]]))
        assert owner.tolist() == [0, 1, 1, 1]
        assert z.tolist() == [[20.0, 10.0, 11.0, 12.0]]

    def test_outputs_of_zero_have_a_gradient(self):
        """At 0: a position where the experts add nothing must not make other gradients NaN."""
        stack = Stack([ExpertSlice(0, update(2, 5, 4), 0, 5)], 5)
        z = torch.zeros(1, 2, 2)
        z[0, 1] = torch.tensor([1.0, 2.0])
        z.requires_grad_()
        stack.normalised_outputs(z, 1).square().sum().backward()
        assert torch.isfinite(z.grad).all()


class TestFitBatch:
    def test_by_hand(self):
        g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        assert fit_batch(g[:1], 7) is not g  # one gate value for all samples
        assert fit_batch(g[:1], 7).tolist() == [[1.0, 2.0]]
        assert fit_batch(g, 2).tolist() == g.tolist()
        assert fit_batch(g, 6)[:, 0].tolist() == [1.0, 1.0, 1.0, 3.0, 3.0, 3.0]  # three frames each
        assert fit_batch(g, 1).tolist() == [[2.0, 3.0]]  # one row for both
        assert fit_batch(g, 3).tolist() == [[2.0, 3.0]]


class TestStacks:
    def test_strengths_and_scale_are_folded_in(self):
        layer, low = nn.Linear(4, 6), update(2, 6, 4, alpha=3.0)
        mixture = Mixture((lora_of(low), lora_of(low)), strengths=(0.5, -2.0), scale=1.5)
        stack = stacks(mixture, {"c": layer}, {"c": ("c", 0, 6, None)})["c"]
        total = sum(U @ stack.D[a:b] for (_, _, a, b), U in zip(stack.groups, stack.U, strict=True))
        assert close(total, 1.5 * (0.5 - 2.0) * low.delta())
        assert stack.owner.tolist() == [0, 0, 1, 1]

    @pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3)])
    def test_grouped_and_transposed_convolutions_are_refused(self, layer):
        with pytest.raises(MergeError, match=r"cannot be mixed[\s\S]*c \(adapter\)"):
            stacks(Mixture((lora_of(update(2, 6, 36)),)), {"c": layer}, {"c": ("c", 0, 6, None)})

    @pytest.mark.parametrize("layer", [nn.MultiheadAttention(4, 2).out_proj, nn.Embedding(6, 4)])
    def test_layers_that_are_not_called_are_refused(self, layer):
        with pytest.raises(MergeError, match=r"weight is used without calling the layer[\s\S]*c \(adapter\)"):
            stacks(Mixture((lora_of(update(2, 4, 4)),)), {"c": layer}, {"c": ("c", 0, 4, None)})

    @pytest.mark.parametrize(
        ("layer", "low", "rows", "found"),
        [
            (nn.Linear(4, 6), update(2, 6, 5), (0, 6), r"\(6, 4\)[\s\S]*\(6, 5\)"),
            (nn.Linear(4, 6), update(2, 5, 4), (0, 6), r"\(6, 4\)[\s\S]*\(5, 4\)"),
            (nn.Linear(4, 6), update(2, 4, 4), (3, 7), r"\(4, 4\)"),
            (nn.Conv2d(4, 6, 3), update(2, 6, 4), (0, 6), r"\(6, 36\)[\s\S]*\(6, 4\)"),
        ],
    )
    def test_updates_of_another_shape_are_refused(self, layer, low, rows, found):
        with pytest.raises(MergeError, match=rf"another base model[\s\S]*{found}"):
            stacks(Mixture((lora_of(low),)), {"c": layer}, {"c": ("c", *rows, None)})

    def test_rows_of(self):
        assert rows_of(nn.Linear(2, 3)) == 3
        assert rows_of(nn.Conv2d(2, 5, 1)) == 5
        assert rows_of(nn.Identity()) is None

    def test_never_gets_gradients_and_moves_as_a_module(self):
        stack = Stack([ExpertSlice(0, update(2, 6, 4), 0, 6)], 6)
        assert list(stack.parameters()) == []
        moved = stack.to(torch.float64)
        assert {U.dtype for U in (moved.D, *moved.U)} == {torch.float64}
        assert moved.owner.dtype == torch.long
