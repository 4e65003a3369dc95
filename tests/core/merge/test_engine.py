"""merge(): inputs, results and errors, by hand or against dense matrices."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.errors import FormatError, MergeError
from legomole.core.lowrank import LowRank
from legomole.core.merge import tasks
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import METHODS
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.linear import Linear
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.rank import Rank

from .adapters import named, part

# ---- the sum, and the adapters that take part


def test_heterogeneous_ranks_sum_exactly(pair):
    """k = P: 4 + 2 units, each with its own scale (2/4 and 1/2) and weight."""
    result = merge(pair, Concat(), [0.8, -1.5])
    both = result.adapter.modules["both"]
    assert both.rank == 6
    want = 0.8 * pair[0].modules["both"].delta() - 1.5 * pair[1].modules["both"].delta()
    torch.testing.assert_close(both.delta(), want)


def test_a_module_only_one_adapter_has_is_merged_from_that_one(pair):
    modules = merge(pair, Concat(), [0.5, 2.0]).adapter.modules
    assert list(modules) == ["both", "only_style", "only_subject"]
    torch.testing.assert_close(modules["only_style"].delta(), 0.5 * pair[0].modules["only_style"].delta())
    torch.testing.assert_close(modules["only_subject"].delta(), 2.0 * pair[1].modules["only_subject"].delta())


def test_weight_zero_leaves_an_adapter_out_and_says_so(pair):
    result = merge(pair, Concat(), [1.0, 0.0])
    assert set(result.adapter.modules) == {"both", "only_style"}
    assert result.adapter.modules["both"].rank == 4  # not padded with the other's units
    assert result.report.notes == ("subject has weight 0 and was left out",)


def test_nothing_to_merge():
    with pytest.raises(MergeError, match="nothing to merge"):
        merge([], Concat())


# ---- dtypes and values


@pytest.mark.parametrize(
    ("dtypes", "want"),
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),  # neither holds the other
        ((torch.bfloat16, torch.float8_e4m3fn), torch.bfloat16),  # 8-bit factors are written back as bfloat16
    ],
)
def test_the_result_has_the_widest_dtype_of_the_inputs(dtypes, want):
    a, b = (named(str(i), {"m": part(2, seed=i).to(dtype)}) for i, dtype in enumerate(dtypes))
    modules = merge([a, b], Concat()).adapter.modules
    assert modules["m"].A.dtype == modules["m"].B.dtype == want


def test_the_dtype_can_be_chosen(pair):
    modules = merge(pair, Concat(), dtype=torch.bfloat16).adapter.modules
    assert {p.A.dtype for p in modules.values()} == {torch.bfloat16}


def test_an_adapter_of_weight_0_does_not_widen_the_dtype():
    narrow = named("a", {"m": part(2).to(torch.float16)}, diffs={"m.bias": torch.ones(6)})
    wide = named("b", {"m": part(2, seed=1)}, diffs={"m.bias": torch.ones(6)})
    for weights, text_encoder_weights in (([1, 0], None), ([1, 0], [0, 0])):
        merged = merge([narrow, wide], Concat(), weights, text_encoder_weights=text_encoder_weights).adapter
        assert merged.modules["m"].dtype == merged.diffs["m.bias"].dtype == torch.float16
    switched_off = merge([narrow, wide], Concat(), module_weights=[{}, {"*": 0}]).adapter
    assert switched_off.modules["m"].dtype == torch.float16
    assert merge([narrow, wide], Concat()).adapter.modules["m"].dtype == torch.float32


def test_float16_overflow_is_an_error_not_infinity():
    """sqrt(1e10) = 1e5 on either factor is past float16's 65504."""
    adapter = named("loud", {"m": LowRank(torch.ones(1, 4).half(), torch.ones(4, 1).half())})
    with pytest.raises(MergeError, match="overflow") as caught:
        merge([adapter], Concat(), [1e10])
    assert caught.value.module == "m"
    assert "65504" in str(caught.value.expected)
    wide = merge([adapter], Concat(), [1e10], dtype=torch.float32).adapter.modules["m"]
    torch.testing.assert_close(wide.delta(), torch.full((4, 4), 1e10))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_values_that_are_not_finite_are_located(pair, bad, factor):
    broken = part(2, seed=3)
    getattr(broken, factor)[0, 1] = bad
    with pytest.raises(FormatError, match="NaN or infinite") as caught:
        merge([pair[0], named("broken", {"both": broken})], Lego(Rank(2)))
    assert caught.value.file == "loras/broken.safetensors"
    assert caught.value.module == f"both (factor {factor})"
    assert "1 of" in str(caught.value.found)


def test_alpha_zero_is_a_zero_module_not_an_error(pair):
    """A trainer may store alpha 0: the module adds nothing, and the report says so."""
    silent = named("silent", {"both": part(2, alpha=0.0)})
    result = merge([silent], Lego(Rank(1)))
    assert result.adapter.modules["both"].delta().abs().max() == 0
    assert "1 modules are zero in every LoRA: both" in result.report.notes[0]


# ---- inputs that cannot be merged


def test_different_shapes_mean_different_base_models(pair):
    other = named("sd15", {"both": part(2, 6, 9)})
    with pytest.raises(MergeError, match="same base model") as caught:
        merge([pair[0], other], Concat())
    assert caught.value.module == "both"
    assert caught.value.found == "(6, 5) in style, (6, 9) in sd15"


def test_k_over_the_pool_is_an_error_naming_the_largest(pair):
    with pytest.raises(MergeError, match="larger than all") as caught:
        merge(pair, Lego(Rank(7)))
    assert "at most 6" in str(caught.value.expected)


def test_k_is_capped_at_a_smaller_modules_pool(pair):
    """k = 5 fits the shared module (P = 6); the others have only 2 and 3 units to give."""
    ranks = {name: p.rank for name, p in merge(pair, Lego(Rank(5))).adapter.modules.items()}
    assert ranks == {"both": 5, "only_style": 2, "only_subject": 3}


def test_kernel_is_kept():
    conv = named("conv", {"m": part(2, 6, 18, kernel=(3, 3))})
    assert merge([conv, conv], SVD(Rank(2))).adapter.modules["m"].kernel == (3, 3)


@pytest.mark.parametrize("device", ["mps", "mps:0", torch.device("mps")])
def test_a_device_without_float64_is_refused(pair, device):
    with pytest.raises(MergeError, match=r"float64[\s\S]*cpu, or cuda[\s\S]*mps[\s\S]*--device cpu"):
        merge(pair, Concat(), device=device)


# ---- progress, cancelling, batches


def test_progress_counts_modules_and_cancels_by_raising(pair):
    seen = []
    merge(pair, Concat(), progress=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert {total for _, total, _ in seen} == {3}
    assert {name for _, _, name in seen} == {"both", "only_style", "only_subject"}

    class Cancelled(Exception):
        pass

    def cancel(*_):
        raise Cancelled

    with pytest.raises(Cancelled):
        merge(pair, Concat(), progress=cancel)


@pytest.mark.parametrize(
    ("method", "counts"), [(Ties(Rank(2)), [1, 2, 3]), (Dare(Rank(2)), [1, 2, 3]), (Concat(), [3])]
)
def test_slow_methods_report_progress_after_every_module(method, counts):
    """The other methods merge modules of one shape together."""
    seen = []
    adapter = named("a", {f"m{i}": part(4, seed=i) for i in range(3)})
    merge([adapter], method, progress=lambda done, *_: seen.append(done))
    assert seen == counts


@pytest.mark.parametrize("method", [Lego(Rank(3)), Lego(Rank(3), geometry="paper"), SVD(Rank(3)), Linear(), Concat()])
def test_the_result_does_not_depend_on_the_batch_size(monkeypatch, method):
    a = named("a", {f"m{i}": part(4, seed=i) for i in range(7)})
    b = named("b", {f"m{i}": part(2, seed=100 + i) for i in range(7)})
    together = merge([a, b], method)
    monkeypatch.setattr(tasks, "_BATCH_VALUES", 1)
    alone = merge([a, b], method)
    for name, want in together.adapter.modules.items():
        got = alone.adapter.modules[name]
        assert torch.equal(got.A, want.A)
        assert torch.equal(got.B, want.B)


def test_the_same_merge_twice_gives_the_same_bits(pair):
    first, second = (merge(pair, Lego(Rank(3), geometry="paper", seed=5)).adapter.modules for _ in range(2))
    for name in first:
        assert torch.equal(first[name].A, second[name].A)
        assert torch.equal(first[name].B, second[name].B)


def test_inputs_are_not_modified(pair):
    before = {name: (p.A.clone(), p.B.clone()) for name, p in pair[0].modules.items()}
    merge(pair, Lego(Rank(2)), [3.0, 1.0])
    for name, (A, B) in before.items():
        assert torch.equal(pair[0].modules[name].A, A)
        assert torch.equal(pair[0].modules[name].B, B)


# ---- the report's figures against dense matrices


def test_report_figures_equal_dense_linear_algebra(pair):
    weights = [0.8, -1.5]
    result = merge(pair, SVD(Rank(2)), weights)
    row = next(m for m in result.report.modules if m.name == "both")
    deltas = [(w * a.modules["both"].delta()).double() for w, a in zip(weights, pair, strict=True)]
    total = deltas[0] + deltas[1]
    merged = result.adapter.modules["both"].delta().double()
    assert row.adapters == (0, 1)
    assert row.ranks_in == (4, 2)
    assert row.rank_out == 2
    assert row.norms == pytest.approx([d.norm().item() for d in deltas], rel=1e-5)
    cosine = ((deltas[0] * deltas[1]).sum() / deltas[0].norm() / deltas[1].norm()).item()
    assert row.cosine[0][1] == row.cosine[1][0] == pytest.approx(cosine, abs=1e-6)
    assert row.error == pytest.approx(((merged - total).norm() / total.norm()).item(), rel=1e-4)
    # Eckart-Young: a rank-2 truncation keeps the share of the two largest squared singular values
    S = torch.linalg.svdvals(total).square()
    assert row.energy_kept == pytest.approx((S[:2].sum() / S.sum()).item(), abs=1e-5)
    assert json.loads(json.dumps(result.report.to_dict()))["modules"][0]["name"] == "both"


def test_report_names_the_method_and_the_inputs(pair):
    for name, method in {"lego": Lego(Rank(2)), "svd": SVD(Rank(2)), "linear": Linear(), "concat": Concat()}.items():
        report = merge(pair, method).report
        assert isinstance(method, METHODS[name])
        assert report.method == name
        assert report.inputs == ("style", "subject")


def test_clusters_count_every_unit_once(pair):
    report = merge(pair, Lego(Rank(3))).report
    for row in report.modules:
        assert len(row.clusters) == row.rank_out
        assert tuple(sum(counts) for counts in zip(*row.clusters, strict=True)) == row.ranks_in


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weights=st.data(),
    seed=st.integers(0, 2**16),
)
def test_concat_is_the_dense_sum_for_any_ranks_and_weights(ranks, weights, seed):
    w = weights.draw(
        st.lists(st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3), min_size=len(ranks), max_size=len(ranks))
    )
    adapters = [named(str(i), {"m": part(r, seed=seed + i, alpha=1.5)}) for i, r in enumerate(ranks)]
    got = merge(adapters, Concat(), w).adapter.modules["m"].delta()
    want = sum(x * a.modules["m"].delta() for x, a in zip(w, adapters, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
