"""Hashes of tensors and adapters: equal for equal content, different for any other."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.digest import content_hash, content_key, digest, identity
from legomole.core.formats import load
from legomole.core.lowrank import LowRank
from legomole.core.mole.trained import Expert
from safetensors.torch import save_file


def test_content_is_dtype_shape_and_values() -> None:
    x = torch.arange(6.0)
    expected = hashlib.sha256(b"torch.float32 (6,)" + x.numpy().tobytes()).digest()
    assert content_hash(x) == expected
    others = [x.reshape(2, 3), x.reshape(3, 2), x.double(), x.bfloat16(), x + 1, x[:5]]
    hashes = {content_hash(other) for other in others}
    assert len(hashes) == len(others)
    assert expected not in hashes
    assert content_hash(torch.arange(12.0)[::2] / 2) == expected  # wherever it is


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[0].fill_(9), lambda x: x.view(6)[5:].neg_()])
def test_a_tensor_that_was_written_to_has_another_key(write) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    before = content_key(x)
    assert content_key(x) == before
    assert content_key(x.clone()) != before
    write(x)
    assert content_key(x) != before


def test_a_tensor_of_inference_mode_has_the_key_of_its_values() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
        before = content_key(x)
        assert content_key(x.clone()) == before
        x += 1
        assert content_key(x) != before


def test_values_are_not_read_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "numpy", lambda *_: pytest.fail("it is read"))
    content_key(torch.arange(6.0))


def test_a_new_tensor_never_has_the_key_of_one_that_was_freed() -> None:
    assert len({content_key(torch.zeros(2)) for _ in range(50)}) == 50


def test_a_digest_depends_on_shapes() -> None:
    x = torch.arange(6.0)
    assert len({digest([x]), digest([x.reshape(2, 3)]), digest([x.reshape(3, 2)]), digest([x[:3], x[3:]])}) == 4
    assert digest([x.half()]) == digest([x])  # equal values


def lora(A: tuple[int, int] = (2, 3), B: tuple[int, int] = (3, 2), **kw) -> LowRank:
    return LowRank(torch.arange(6.0).reshape(A), torch.arange(6.0).reshape(B), **kw)


def test_an_adapter_without_a_file_is_identified_by_its_updates() -> None:
    adapters = [
        Adapter({"x": part})
        for part in (
            lora(),
            lora((3, 2), (2, 3)),
            lora((1, 6), (6, 1)),
            lora(alpha=1.0),
            lora((1, 6), (6, 1), kernel=(2,)),
        )
    ]
    adapters += [Adapter({"y": lora()}), Adapter({"x": lora(), "y": lora()})]
    assert len({identity(adapter) for adapter in adapters}) == len(adapters)
    assert identity(Adapter({"x": lora().to(torch.float16)})) == identity(adapters[0])


def test_the_hash_of_a_file_is_its_adapters_identity_unless_it_was_approximated() -> None:
    source = Source("x.safetensors", "ab" * 32)
    adapters = [Adapter({"x": lora()}, source=replace(source, convert_rank=rank)) for rank in (0, 4, 8)]
    found = [identity(adapter) for adapter in adapters]
    assert found[0] == "ab" * 32
    assert len(set(found)) == 3
    assert all(len(one) == 64 and set(one) <= set("0123456789abcdef") for one in found)


def test_a_file_that_is_approximated_is_another_adapter_at_every_rank(tmp_path: Path) -> None:
    loha = {f"x.hada_w{i}": torch.randn(6, 6) for i in ("1_a", "1_b", "2_a", "2_b")}
    save_file(loha, tmp_path / "loha.safetensors")
    save_file({"x.lora_A.weight": torch.ones(2, 6), "x.lora_B.weight": torch.ones(6, 2)}, tmp_path / "lora.safetensors")
    approximated = [load(tmp_path / "loha.safetensors", convert_rank=rank) for rank in (1, 2, 2)]
    first, second, third = map(identity, approximated)
    assert first != second == third
    assert approximated[0].source.sha256 == approximated[1].source.sha256 != first
    gates = Expert.of(approximated[0])
    assert gates.sha256 == first
    plain = load(tmp_path / "lora.safetensors", convert_rank=4)  # nothing to approximate
    assert identity(plain) == plain.source.sha256
