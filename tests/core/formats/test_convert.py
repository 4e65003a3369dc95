"""LoHa, LoKr and full deltas against the dense definition."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import FormatError
from legomole.core.formats import from_state_dict
from legomole.core.lowrank import LowRank
from torch import Tensor

M = "lora_unet_x"


def read(parts: dict[str, Tensor], k: int, alpha: float | None = None) -> LowRank:
    state = {f"{M}.{key}": value for key, value in parts.items()}
    if alpha is not None:
        state[f"{M}.alpha"] = torch.tensor(alpha)
    return from_state_dict(state, convert_rank=k).modules[M]


def best(dense: Tensor, k: int) -> Tensor:
    """Eckart-Young, by the SVD of the dense matrix."""
    U, S, Vh = torch.linalg.svd(dense.double().flatten(1), full_matrices=False)
    return ((U[:, :k] * S[:k]) @ Vh[:k]).float()


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def loha() -> dict[str, Tensor]:
    return {"hada_w1_a": rand(7, 2), "hada_w1_b": rand(2, 9), "hada_w2_a": rand(7, 2) + 1, "hada_w2_b": rand(2, 9) - 1}


@pytest.mark.parametrize("k", [1, 3, 4])
def test_loha(k: int) -> None:
    p = loha()
    dense = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * (3.0 / 2)
    found = read(p, k, alpha=3.0)
    assert (found.rank, found.scale) == (k, 1.0)
    torch.testing.assert_close(found.delta(), best(dense, k), rtol=1e-4, atol=1e-5)


def test_loha_without_alpha_has_scale_one() -> None:
    p = loha()
    dense = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    torch.testing.assert_close(read(p, 4).delta(), dense, rtol=1e-4, atol=1e-5)


def test_loha_tucker() -> None:
    """w_n[o, c, h, w] = sum_ij t_n[i, j, h, w] a_n[i, o] b_n[j, c], multiplied elementwise."""
    p = {f"hada_t{n}": rand(2, 2, 3, 3) + n for n in (1, 2)}
    p |= {f"hada_w{n}_a": rand(2, 5) + n for n in (1, 2)} | {f"hada_w{n}_b": rand(2, 4) - n for n in (1, 2)}
    w1, w2 = (torch.einsum("ijhw,io,jc->ochw", p[f"hada_t{n}"], p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]) for n in (1, 2))
    found = read(p, 4, alpha=1.0)
    assert found.kernel == (3, 3)
    torch.testing.assert_close(found.delta(), (w1 * w2 * 0.5).flatten(1), rtol=1e-4, atol=1e-3)


W1 = {"full": {"lokr_w1": rand(2, 3)}, "product": {"lokr_w1_a": rand(2, 1), "lokr_w1_b": rand(1, 3)}}
W2 = {
    "full": {"lokr_w2": rand(5, 4)},
    "product": {"lokr_w2_a": rand(5, 2), "lokr_w2_b": rand(2, 4)},
    "conv": {"lokr_w2": rand(5, 4, 3, 3)},
    "conv product": {"lokr_w2_a": rand(5, 2), "lokr_w2_b": rand(2, 4, 3, 3)},
    "tucker": {"lokr_t2": rand(2, 2, 3, 3), "lokr_w2_a": rand(2, 5), "lokr_w2_b": rand(2, 4)},
}
# alpha / rows of w2_b, else of w1_b, else ignored
SCALES = {("full", "full"): 1.0, ("full", "conv"): 1.0, ("product", "full"): 3.0, ("product", "conv"): 3.0}


@pytest.mark.parametrize("first", W1)
@pytest.mark.parametrize("second", W2)
@pytest.mark.parametrize("k", [2, 10])
def test_lokr(first: str, second: str, k: int) -> None:
    a, b = W1[first], W2[second]
    w1 = a["lokr_w1"] if first == "full" else a["lokr_w1_a"] @ a["lokr_w1_b"]
    if second == "tucker":
        w2 = torch.einsum("ijhw,io,jc->ochw", b["lokr_t2"], b["lokr_w2_a"], b["lokr_w2_b"]).contiguous()
    elif "lokr_w2" in b:
        w2 = b["lokr_w2"]
    else:
        w2 = torch.tensordot(b["lokr_w2_a"], b["lokr_w2_b"], 1)
    kernel = w2.shape[2:]
    dense = torch.kron(w1[(...,) + (None,) * len(kernel)], w2) * SCALES.get((first, second), 1.5)
    found = read(a | b, k, alpha=3.0)
    assert found.kernel == tuple(kernel)
    torch.testing.assert_close(found.delta(), best(dense, k), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 4, 3, 3)])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_full_delta(shape: tuple[int, ...], k: int) -> None:
    delta = rand(*shape)
    found = read({"diff": delta}, k)
    torch.testing.assert_close(found.delta(), best(delta, k), rtol=1e-4, atol=1e-5)


def test_full_delta_of_low_rank_stays_finite() -> None:
    delta = torch.outer(rand(6), rand(9))
    found = read({"diff": delta}, 4)
    assert bool(torch.isfinite(found.A).all() & torch.isfinite(found.B).all())
    torch.testing.assert_close(found.delta(), delta, rtol=1e-4, atol=1e-6)
    assert not read({"diff": torch.zeros(6, 9)}, 4).delta().any()


def test_a_full_delta_beside_factors_is_added() -> None:
    delta, down, up = rand(6, 9), rand(2, 9), rand(6, 2)
    found = read({"diff": delta, "lora_down.weight": down, "lora_up.weight": up}, 6)
    torch.testing.assert_close(found.delta(), delta + up @ down, rtol=1e-4, atol=1e-4)


def test_no_conversion_without_a_rank() -> None:
    with pytest.raises(FormatError, match=r"4 keys: [\s\S]*hada_w1_a[\s\S]*--convert-rank"):
        from_state_dict({f"{M}.{key}": value for key, value in loha().items()})
    with pytest.raises(FormatError, match="at least 1"):
        read(loha(), 0)


def test_missing_factor() -> None:
    p = loha()
    del p["hada_w2_b"]
    with pytest.raises(FormatError, match="no hada_w2_b"):
        read(p, 2)
    with pytest.raises(FormatError, match="no lokr_w2_b"):
        read({"lokr_w1": rand(2, 3), "lokr_w2_a": rand(5, 2)}, 2)
    with pytest.raises(FormatError, match="do not fit"):
        read({**loha(), "hada_w2_b": rand(3, 9)}, 2)
