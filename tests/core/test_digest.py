"""Hashes of tensors and adapters: equal for equal content, different for any other."""

from __future__ import annotations

import hashlib

import pytest
import torch
from legomole.core.digest import content_hash


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
def test_a_tensor_that_was_written_to_is_hashed_again(write) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    before = content_hash(x)
    write(x)
    assert content_hash(x) != before
    assert content_hash(x) == content_hash(x.clone())


def test_a_tensor_of_inference_mode_is_hashed_every_time() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
        before = content_hash(x)
        x += 1
        assert content_hash(x) != before


def test_a_tensor_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(6.0)
    before = content_hash(x)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda *_: pytest.fail("it is read again"))
    assert content_hash(x) == before
