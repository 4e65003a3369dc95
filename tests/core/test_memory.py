"""Running out of memory is a clear error."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.memory import report_out_of_memory
from legomole.core.merge.engine import merge
from legomole.core.merge.merged import Merged
from legomole.core.merge.pool import Pool

TOO_MUCH = 1 << 60  # bytes; no machine has them


def test_an_error_of_torch() -> None:
    with (
        pytest.raises(MergeError, match=r"not enough memory[\s\S]*1152921504606846976 bytes[\s\S]*to do:"),
        report_out_of_memory(),
    ):
        torch.empty(TOO_MUCH, dtype=torch.uint8)


def test_an_error_of_python() -> None:
    with pytest.raises(MergeError, match="not enough memory"), report_out_of_memory():
        bytearray(TOO_MUCH)


def test_other_errors_and_those_of_cuda_pass() -> None:
    for error in (RuntimeError("mat1 and mat2"), torch.cuda.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error)) as caught, report_out_of_memory():
            raise error
        assert caught.value is error


def test_with_a_remedy_cuda_errors_are_converted_too() -> None:
    with (
        pytest.raises(MergeError, match=r"not enough memory[\s\S]*found: *CUDA full\n  to do: *smaller"),
        report_out_of_memory("smaller"),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA full\nDetails")
    with pytest.raises(MergeError, match=r"not enough memory[\s\S]*to do: *smaller"), report_out_of_memory("smaller"):
        torch.empty(TOO_MUCH, dtype=torch.uint8)


def test_a_method_that_needs_too_much() -> None:
    class Greedy:
        def __call__(self, pool: Pool) -> Merged:
            return Merged(torch.empty(TOO_MUCH), pool.B, torch.ones(1))

    adapter = Adapter({"x": LowRank(torch.ones(2, 3), torch.ones(4, 2))})
    with pytest.raises(MergeError, match="not enough memory"):
        merge([adapter], Greedy())
