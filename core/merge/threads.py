"""Batches of a merge beside each other, one thread each."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..adapter import Adapter
from .tasks import Batch, BatchMerger, BatchResult


def run_in_threads(work: BatchMerger, adapters: Sequence[Adapter], todo: Sequence[Batch]) -> Generator[BatchResult]:
    """Do the work on every batch, as many at a time as torch has threads, and give the results in their order.

    The operations of a merge are small: split over threads, each of them would wait for the slowest, and where other
    programs keep the processor busy that is most of the time. A batch per thread waits for nobody. No more than one
    finished batch is kept waiting, so memory stays bounded; closing the generator leaves the rest undone.
    """
    threads = min(torch.get_num_threads(), len(todo))
    if threads < 2 or work.device.type != "cpu":
        yield from (work(adapters, batch) for batch in todo)
        return
    waiting: deque[Future[BatchResult]] = deque()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for batch in todo:
            waiting.append(pool.submit(work, adapters, batch))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what a worker sets is also what threads begin with that start later
