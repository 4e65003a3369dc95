"""Batches in threads give the same results as one after the other, and stop when the merge is cancelled."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.factors import FileFactors
from legomole.core.merge.merged import Merged
from legomole.core.merge.methods import METHODS
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank
from legomole.core.merge.tasks import BatchMerger, ModuleBatch
from legomole.core.merge.threads import run_in_threads

from ...fake_gpu import CUDA, fake_gpu


@pytest.fixture(autouse=True)
def two_threads() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def adapters(n: int = 2, shapes: int = 6) -> list[Adapter]:
    """Every module of another shape: as many batches as modules."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [Adapter({f"layer{i}": LowRank(random(3, 8 + i), random(12, 3)) for i in range(shapes)}) for _ in range(n)]


class Recorder(Concat):
    """Concat that records the merged modules, the thread, and its number of threads."""

    def __init__(self) -> None:
        object.__setattr__(self, "seen", [])

    def __call__(self, pool: Pool) -> Merged:
        self.seen.append((pool.names, threading.current_thread(), torch.get_num_threads()))  # type: ignore[attr-defined]
        if pool.names == ("layer3",):
            raise MergeError("This one fails.")
        return super().__call__(pool)


def work(method: Recorder, inputs: list[Adapter]) -> tuple[BatchMerger, list[ModuleBatch]]:
    weights = [dict.fromkeys(adapter.modules, 1.0) for adapter in inputs]
    todo = [ModuleBatch((name,), (0, 1), (3, 3)) for name in inputs[0].modules]
    return BatchMerger(method, weights, torch.float32, torch.device("cpu")), todo


def test_the_numbers_are_those_of_one_thread():
    two = merge(adapters(), Lego(Rank(4)))
    torch.set_num_threads(1)
    one = merge(adapters(), Lego(Rank(4)))
    assert list(one.adapter.modules) == list(two.adapter.modules)
    for name, part in one.adapter.modules.items():
        assert torch.equal(part.A, two.adapter.modules[name].A)
        assert torch.equal(part.B, two.adapter.modules[name].B)
    assert one.report == two.report


def test_results_come_in_order_an_error_with_its_batch_and_threads_are_as_before():
    method, inputs = Recorder(), adapters()
    results = run_in_threads(*work(method, inputs)[:1], inputs, work(method, inputs)[1])
    assert [list(next(results).modules) for _ in range(3)] == [["layer0"], ["layer1"], ["layer2"]]
    with pytest.raises(MergeError, match="This one fails"):
        next(results)
    assert torch.get_num_threads() == 2
    seen = method.seen  # type: ignore[attr-defined]
    assert {threads for _, _, threads in seen} == {1}
    assert threading.main_thread() not in {thread for _, thread, _ in seen}


def test_a_merge_that_is_cancelled_leaves_the_rest_undone():
    method = Recorder()

    def cancel(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapters(shapes=3), method, progress=cancel)
    names = [names for names, _, _ in method.seen]  # type: ignore[attr-defined]
    assert ("layer0",) in names
    assert torch.get_num_threads() == 2
    assert not [thread for _, thread, _ in method.seen if thread.is_alive()]  # type: ignore[attr-defined]


def test_one_thread_needs_no_other():
    torch.set_num_threads(1)
    method, inputs = Recorder(), adapters(shapes=2)
    made, todo = work(method, inputs)
    assert len(list(run_in_threads(made, inputs, todo))) == 2
    assert {thread for _, thread, _ in method.seen} == {threading.main_thread()}  # type: ignore[attr-defined]


def test_merges_that_overlap_leave_the_number_of_threads_alone():
    """The setting of the threads that merge, and the default of threads started later."""
    torch.set_num_threads(4)
    inputs = adapters(shapes=40)
    after: list[int] = []

    def merge_later(seconds: float) -> None:
        time.sleep(seconds)
        before = torch.get_num_threads()
        merge(inputs, Lego(Rank(4)))
        after.extend((before, torch.get_num_threads()))

    started = [threading.Thread(target=merge_later, args=(0.05 * i,)) for i in range(3)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert after == [4] * 6
    assert torch.get_num_threads() == 4
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == 4


def test_a_merge_in_a_thread_of_its_own_number_leaves_the_default_alone():
    """The setting of the calling thread is not the default of others."""

    def merge_with_two() -> int:
        torch.get_num_threads()  # the default is taken at the first use of torch
        torch.set_num_threads(2)
        with ThreadPoolExecutor(1) as other:
            other.submit(torch.set_num_threads, 3).result()
        merge(adapters(shapes=4), Concat())
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as one:
        assert one.submit(merge_with_two).result() == 2
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == 3


def test_workers_that_cannot_be_started_are_an_error_and_leave_no_trace(monkeypatch):
    submit = ThreadPoolExecutor.submit

    def few(self, work, *args):
        if self._max_workers > 1 and len(self._threads) == 1:
            raise RuntimeError("can't start new thread")
        return submit(self, work, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", few)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        merge(adapters(shapes=4), Concat())
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == 2


class TestGPU:
    @pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
    @pytest.mark.parametrize("name", ["lego", "svd", "concat", "ties", "dare", "knots", "linear", "np"])
    def test_every_method_gives_the_result_of_the_cpu(self, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """On a fake GPU, which refuses tensors of the CPU and computes the same values."""
        inputs = [
            Adapter({layer: part.to(dtype) for layer, part in adapter.modules.items()})
            for adapter, dtype in zip(adapters(), dtypes, strict=True)
        ]
        method = METHODS[name](**({} if name in ("concat", "linear") else {"rank": Rank(3)}))
        with fake_gpu():
            ours = merge(inputs, method, device="cuda")
        cpu = merge(inputs, method)
        for layer, part in cpu.adapter.modules.items():
            torch.testing.assert_close(ours.adapter.modules[layer].delta(), part.delta(), rtol=1e-4, atol=1e-4)
            assert type(ours.adapter.modules[layer].A) is torch.Tensor
        assert [module.clusters for module in ours.report.modules] == [module.clusters for module in cpu.report.modules]

    def test_two_batches_at_a_time_each_on_the_stream_of_its_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        streams: list[object] = []
        used: list[tuple[threading.Thread, object]] = []

        def stream(device: torch.device) -> object:
            streams.append(object())
            return streams[-1]

        def enter(stream: object) -> AbstractContextManager[None]:
            used.append((threading.current_thread(), stream))
            return nullcontext()

        with fake_gpu():
            monkeypatch.setattr(torch.cuda, "Stream", stream)
            monkeypatch.setattr(torch.cuda, "stream", enter)
            merge(adapters(), Lego(Rank(3)), device="cuda")
            monkeypatch.undo()
        assert len(used) == 6  # one per batch
        assert 1 <= len(streams) == len({thread for thread, _ in used}) == len(set(used)) <= 2

    def test_factors_are_copied_as_they_are_stored_through_pinned_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pinned: list[tuple[int, torch.dtype]] = []
        empty = torch.empty

        def recording(*size: int, **options: Any) -> torch.Tensor:
            if options.pop("pin_memory", False):
                pinned.append((math.prod(size), options["dtype"]))
            return empty(*size, **options)

        parts = [[LowRank(torch.randn(2, 4).half(), torch.randn(3, 2).half()) for _ in range(2)] for _ in range(5)]
        with fake_gpu():
            monkeypatch.setattr(torch, "empty", recording)
            A, B = FileFactors(parts, torch.device("cuda")).whole
            monkeypatch.undo()
            assert A.device == B.device == CUDA
            assert A.dtype == B.dtype == torch.float32
            found = A.cpu(), B.cpu()
        assert pinned == [(5 * 4 * 4, torch.float16), (5 * 3 * 4, torch.float16)]
        assert all(map(torch.equal, found, FileFactors(parts, torch.device("cpu")).whole))
