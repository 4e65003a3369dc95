"""Run the batches of a merge in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier, Lock

import torch

from ..adapter import Adapter
from .tasks import Batch, BatchMerger, BatchResult

_starting = Lock()  # held while torch's default number of threads is changed


def run_in_threads(work: BatchMerger, adapters: Sequence[Adapter], todo: Sequence[Batch]) -> Generator[BatchResult]:
    """Merge every batch, as many at a time as torch has threads, and yield the results in order.

    The operations of a merge are small. Split over threads, each would wait for the slowest thread, which takes most
    of the time where other programs use the processor too; a batch per thread waits for nothing. At most one finished
    batch is kept waiting, so memory stays bounded. Closing the generator leaves the remaining batches undone.
    """
    threads = min(torch.get_num_threads(), len(todo))
    if threads < 2 or work.device.type != "cpu":
        yield from (work(adapters, batch) for batch in todo)
        return
    waiting: deque[Future[BatchResult]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        _start(pool, threads)
        for batch in todo:
            waiting.append(pool.submit(work, adapters, batch))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(pool: ThreadPoolExecutor, threads: int) -> None:
    """Start all workers of a pool, each to compute with one thread, and leave the setting of other threads as it was.

    `torch.set_num_threads` sets the number of the calling thread and the default of threads that have not used torch
    yet. The default is therefore read, and restored, by a thread of its own; that also leaves the number of the
    thread that merges alone. The lock keeps merges that start at the same time from reading each other's 1. (A thread
    of somebody else's whose first use of torch falls into this instant would still start with 1.)
    """
    started = Barrier(threads)  # a worker that waits takes no second task, so that every task gets a worker

    def limit() -> None:
        torch.get_num_threads()  # a thread takes the default at its first use of torch: before the number is set
        torch.set_num_threads(1)
        started.wait()

    with _starting, ThreadPoolExecutor(1) as fresh:
        default = fresh.submit(torch.get_num_threads).result()
        try:
            wait([pool.submit(limit) for _ in range(threads)])
        except BaseException:
            started.abort()
            raise
        finally:
            fresh.submit(torch.set_num_threads, default).result()
