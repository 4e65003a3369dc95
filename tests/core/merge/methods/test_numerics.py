"""Unusual values in every method, from adapters to stored factors: finite results or our errors, always the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError, SaveError
from legomole.core.formats import load, save
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import METHODS, MergeMethod
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.linear import Linear
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.recipes.method_settings import build_method
from torch import Tensor

D_IN, D_OUT, R = 12, 10, 3
NAME = "model.layer"
SETTINGS = {
    **{name: {} for name in METHODS},
    "lego paper": {"geometry": "paper"},
    "lego l2": {"parameter_reweight": True, "norm": "l2", "starts": 2},
    "ties votes": {"sign_election": "frequency"},
}
ALL = pytest.mark.parametrize("name", SETTINGS)


def method(name: str, rank: str = "2") -> MergeMethod:
    kind = name.split()[0]
    if kind in ("concat", "linear"):
        return METHODS[kind]()
    settings = {"rank": rank, **SETTINGS[name]}
    if kind in ("calibrated", "ssr"):
        settings["statistics"] = Statistics({NAME: ModuleStatistics({0: torch.eye(D_IN), 1: 2 * torch.eye(D_IN)})})
    return build_method(kind, settings)


def lora(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float32, alpha: float | None = None) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(R, D_IN, generator=g), torch.randn(D_OUT, R, generator=g)
    return Adapter({NAME: LowRank((size * A).to(dtype), (size * B).to(dtype), alpha)})


def changed(adapter: Adapter, A: Callable[[Tensor], Tensor] = lambda x: x, B: Callable[[Tensor], Tensor] = lambda x: x):
    part = adapter.modules[NAME]
    return Adapter({NAME: LowRank(A(part.A), B(part.B), part.alpha)})


def total(adapters: list[Adapter], weights: list[float]) -> Tensor:
    parts = [adapter.modules[NAME] for adapter in adapters]
    return sum(
        (w * p.scale * (p.B.double() @ p.A.double()) for p, w in zip(parts, weights, strict=True)),
        torch.zeros(D_OUT, D_IN, dtype=torch.float64),
    )


def merged(adapters: list[Adapter], name: str, weights: list[float] | None = None, rank: str = "2", **kw) -> LowRank:
    """The merged factors; finite, and the same a second time to the last bit."""
    first, again = (merge(adapters, method(name, rank), weights, **kw).adapter.modules[NAME] for _ in range(2))
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    assert torch.isfinite(first.A.float()).all()
    assert torch.isfinite(first.B.float()).all()
    return first


def refused_or_merged(adapters: list[Adapter], name: str, weights: list[float] | None = None) -> LowRank | None:
    """`merged`, or ``None`` where that was refused with an error that names the module."""
    try:
        return merged(adapters, name, weights)
    except MergeError as error:
        if NAME in str(error):
            return None
        raise


def delta(part: LowRank) -> Tensor:
    return part.scale * (part.B.double() @ part.A.double())


RANK_ONE = torch.ones(R, 1) * torch.linspace(-1, 1, D_IN)
PAIRS = {
    "denormal factors": lambda: [lora(1, 1e-40), lora(2, 1e-40)],
    "denormal in float16": lambda: [lora(1, 1e-6, torch.float16), lora(2, 1e-6, torch.float16)],
    "tiny beside huge": lambda: [lora(1, 1e-18), lora(2, 1e15)],
    "huge factors": lambda: [lora(1, 1e18), lora(2, 1e18)],
    "the largest of float16": lambda: [
        changed(lora(1, 1.0, torch.float16), A=lambda A: A.sign() * 65504),
        lora(2, 1.0, torch.float16),
    ],
    "one entry only": lambda: [
        changed(lora(1), A=lambda A: torch.eye(R, D_IN) * torch.tensor([[1.0], [0], [0]])),
        lora(2),
    ],
    "rank-deficient": lambda: [changed(lora(1), A=lambda A: RANK_ONE), changed(lora(2), A=lambda A: -2 * RANK_ONE)],
    "zero beside another": lambda: [changed(lora(1), B=torch.zeros_like), lora(2)],
    "zero A": lambda: [changed(lora(1), A=torch.zeros_like), lora(2)],
    "all zero": lambda: [changed(lora(1), B=torch.zeros_like), changed(lora(2), B=torch.zeros_like)],
    "zero, each otherwise": lambda: [changed(lora(1), B=torch.zeros_like), changed(lora(2), A=torch.zeros_like)],
    "the same twice": lambda: [lora(1), lora(1)],
    "opposite": lambda: [lora(1), changed(lora(1), B=torch.neg)],
    "alpha 0": lambda: [lora(1, alpha=0.0), lora(2, alpha=0.0)],
    "alpha 0 beside another": lambda: [lora(1, alpha=0.0), lora(2, alpha=4.0)],
    "negative alpha": lambda: [lora(1, alpha=-3.0), lora(2)],
    "huge alpha": lambda: [lora(1, alpha=1e30), lora(2, alpha=1.0)],
    "minus zero": lambda: [changed(lora(1), A=lambda A: A * 0.0 * -1.0), lora(2)],
}


@ALL
@pytest.mark.parametrize("case", PAIRS)
def test_unusual_loras(name: str, case: str) -> None:
    adapters = PAIRS[case]()
    part = refused_or_merged(adapters, name)
    if part is None:  # too large for what the result is written in, or for what it is computed in
        assert case in ("huge factors", "huge alpha", "tiny beside huge", "the largest of float16")
    elif name == "concat":
        expected = total(adapters, [1.0, 1.0])
        assert (delta(part) - expected).norm() <= 2e-3 * expected.norm() + 1e-30


@ALL
@pytest.mark.parametrize("case", ["all zero", "opposite", "alpha 0", "zero, each otherwise"])
def test_a_sum_of_nothing(name: str, case: str) -> None:
    """Zeros give zeros, except for methods on the factors, which have cross terms (B of one with A of another).

    Opposite LoRAs give nothing where the sum counts; DARE's masks differ, centroids differ.
    """
    if case == "zero, each otherwise" and name in ("linear", "lego paper"):
        assert merged(PAIRS[case](), name).B.any()
        return
    found = delta(merged(PAIRS[case](), name)).norm()
    size = total([lora(1)], [1.0]).norm()
    if case != "opposite" or name in ("concat", "svd", "linear"):
        assert found <= 1e-6 * size
    else:
        assert found <= 2.5 * size  # no blow-up of what is left


@pytest.mark.parametrize("name", ["lego", "concat", "svd"])
def test_a_lora_and_its_copy_are_the_lora_at_twice_the_strength(name: str) -> None:
    """The other methods drop entries, average or weigh."""
    adapters = PAIRS["the same twice"]()
    part = merged(adapters, name, rank=str(R))
    expected = total(adapters, [1.0, 1.0])
    assert (delta(part) - expected).norm() <= 1e-5 * expected.norm()


@ALL
@pytest.mark.parametrize("weight", [1e-30, 1e8, -1e8, 1e30, 1e150, 1e300])
def test_enormous_strengths(name: str, weight: float) -> None:
    part = refused_or_merged([lora(1), lora(2)], name, [weight, 1.0])
    if part is None:
        assert abs(weight) >= 1e30
    elif name == "concat":
        expected = total([lora(1), lora(2)], [weight, 1.0])
        assert (delta(part) - expected).norm() <= 1e-5 * expected.norm()


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_overflows_the_output_is_refused(name: str, dtype: torch.dtype) -> None:
    """In float16 factors beyond 65504 are an error, not stored as infinity; wider dtypes hold them."""
    adapters = [lora(1, 3e4), lora(2, 3e4)]
    if dtype is torch.float16:
        with pytest.raises(MergeError, match=rf"overflow[\s\S]*{NAME}[\s\S]*float16"):
            merge(adapters, method(name), [400.0, 400.0], dtype=dtype)
    else:
        assert merged(adapters, name, [400.0, 400.0], dtype=dtype).dtype is dtype


@pytest.mark.parametrize("value", [3e4, -3e4])
def test_a_bias_that_overflows_is_refused(value: float) -> None:
    """Biases are summed in full, and checked likewise."""
    parts = lora(1, dtype=torch.float16).modules
    adapter = Adapter(parts, {f"{NAME}.bias": torch.full((D_OUT,), value, dtype=torch.float16)})
    with pytest.raises(MergeError, match=rf"overflow[\s\S]*{NAME}\.bias[\s\S]*65504[\s\S]*90000"):
        merge([adapter] * 3, Concat())
    assert merge([adapter] * 2, Concat()).adapter.diffs[f"{NAME}.bias"][0] == 2 * value


def test_a_bias_is_saved_in_the_requested_dtype(tmp_path) -> None:
    adapter = Adapter(lora(1).modules, {f"{NAME}.bias": torch.full((D_OUT,), 1e30)})
    with pytest.raises(SaveError, match=r"too large[\s\S]*model\.layer\.bias"):
        save(adapter, tmp_path / "x", format="comfy", dtype=torch.float16)
    written = load(save(adapter, tmp_path / "x", format="comfy", dtype=torch.bfloat16))
    assert written.diffs[f"{NAME}.bias"].dtype is torch.bfloat16


@ALL
@pytest.mark.parametrize("rank", ["1", "95%", "auto", "1x"])
def test_any_rank_of_unusual_loras(name: str, rank: str) -> None:
    for case in ("rank-deficient", "zero beside another", "all zero", "opposite", "the same twice"):
        merged(PAIRS[case](), name, rank=rank)


@ALL
def test_any_size_gives_a_result_or_our_error(name: str) -> None:
    for exponent in range(-45, 39, 6):
        adapters = [lora(1, 10.0**exponent), lora(2, 1.0)]
        if not all(torch.isfinite(x.modules[NAME].A).all() for x in adapters):
            continue
        assert refused_or_merged(adapters, name) is not None or exponent > 8


def test_the_table_is_complete() -> None:
    assert {name.split()[0] for name in SETTINGS} == set(METHODS)
    assert isinstance(method("linear"), Linear)
    assert isinstance(method("calibrated"), Calibrated)
    assert method("svd", "3").rank == Rank(3)
