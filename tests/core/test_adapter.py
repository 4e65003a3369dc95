"""Adapter: immutable, named, finite."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter, Source, is_text_encoder
from legomole.core.errors import FormatError
from legomole.core.lowrank import LowRank


def part(dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(torch.ones(2, 3).to(dtype), torch.ones(4, 2).to(dtype))


def test_changing_the_given_dict_changes_nothing() -> None:
    modules = {"x": part()}
    adapter = Adapter(modules)
    modules["y"] = part()
    assert list(adapter.modules) == ["x"]
    with pytest.raises(TypeError):
        adapter.modules["y"] = part()  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("", "adapter"),
        ("a/b.safetensors", "b"),
        ("a\\b.safetensors", "b"),
        ("a/folder/", "folder"),
        ("v1.0.safetensors", "v1.0"),
    ],
)
def test_label(path: str, label: str) -> None:
    assert Adapter({}, source=Source(path)).label == label


def test_widest_dtype() -> None:
    assert Adapter({}).dtype == torch.float32
    assert Adapter({"a": part(torch.float16)}).dtype == torch.float16
    # neither holds the other: float32 holds both
    assert Adapter({"a": part(torch.float16), "b": part(torch.bfloat16)}).dtype == torch.float32
    assert Adapter({"a": part(torch.float8_e4m3fn)}).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_not_finite(value: float, dtype: torch.dtype) -> None:
    A = torch.ones(2, 3)
    A[1, 2] = value
    bad = Adapter({"a.b": LowRank(A.to(dtype), torch.ones(4, 2).to(dtype))}, source=Source("f.safetensors"))
    with pytest.raises(FormatError, match=r"f\.safetensors[\s\S]*a\.b \(factor A\)[\s\S]*1 of 6"):
        bad.check_finite()
    with pytest.raises(FormatError, match=r"n\.weight"):
        Adapter({}, {"n.weight": A}).check_finite()


def test_large_numbers_are_finite() -> None:
    huge = torch.full((2, 3), 3e38)  # their sum is not
    Adapter({"x": LowRank(huge, torch.ones(4, 2))}).check_finite()


@pytest.mark.parametrize("name", ["lora_te_x", "lora_te2_x", "text_encoder.x", "text_encoders.clip_l.x"])
def test_text_encoders(name: str) -> None:
    assert is_text_encoder(name)
    assert not is_text_encoder(name.replace("te", "unet", 1))
