"""Run the batches of a merge in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier, Lock, local

import torch

from ..adapter import Adapter
from .tasks import BatchMerger, BatchResult, ModuleBatch

_STREAMS = 2  # of a GPU: one batch is computed, the next one read


def run_in_threads(
    merger: BatchMerger, adapters: Sequence[Adapter], batches: Sequence[ModuleBatch]
) -> Generator[BatchResult]:
    """Merge every batch, as many at a time as torch has threads (on a GPU two), and yield the results in order.

    The operations of a merge are small. Split over threads, each would wait for the slowest thread, which takes most
    of the time where other programs use the processor too; a batch per thread waits for nothing. At most one finished
    batch is kept waiting, so memory stays bounded. Closing the generator leaves the remaining batches undone.
    """
    if merger.device.type == "cuda":
        with ThreadPoolExecutor(_STREAMS) as pool:
            yield from _in_order(pool, _OnStreams(merger), adapters, batches, _STREAMS)
        return
    threads = min(_workers.default(), len(batches))
    if threads < 2 or merger.device.type != "cpu":
        yield from (merger(adapters, batch) for batch in batches)
        return
    try:
        yield from _in_order(_workers.acquire(), merger, adapters, batches, threads)
    finally:
        _workers.release()


def _in_order(
    pool: ThreadPoolExecutor,
    merge: Callable[[Sequence[Adapter], ModuleBatch], BatchResult],
    adapters: Sequence[Adapter],
    batches: Sequence[ModuleBatch],
    threads: int,
) -> Generator[BatchResult]:
    waiting: deque[Future[BatchResult]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(merge, adapters, batch))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        wait([future for future in waiting if not future.cancel()])


class _OnStreams:
    """Merges every batch on the stream of its thread, so that one batch is read and copied while another is computed.

    A batch has left its stream when it is returned, because its result is copied to the CPU.
    """

    def __init__(self, merger: BatchMerger) -> None:
        self._merger, self._thread = merger, local()

    def __call__(self, adapters: Sequence[Adapter], batch: ModuleBatch) -> BatchResult:
        if not hasattr(self._thread, "stream"):
            self._thread.stream = torch.cuda.Stream(self._merger.device)
        with torch.cuda.stream(self._thread.stream):
            return self._merger(adapters, batch)


class _Workers:
    """Threads that compute with one thread each, shared by the merges that run at the same time.

    `torch.set_num_threads` sets the number of the calling thread, and with it the default of threads that have not
    used torch yet. The default is restored as soon as the workers have their number, once for all merges that
    overlap; only a thread whose first use of torch falls into that instant would start with one thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._merges = 0
        self._pool: ThreadPoolExecutor | None = None

    def default(self) -> int:
        """Torch's number of threads in the calling thread, never one that was meant for the workers."""
        with self._lock:
            return torch.get_num_threads()

    def acquire(self) -> ThreadPoolExecutor:
        """The workers, as many as the calling thread has threads where no other merge is running."""
        with self._lock:
            if self._pool is None:
                self._pool = _start(torch.get_num_threads())
            self._merges += 1
            return self._pool

    def release(self) -> None:
        """Stop the workers if no other merge needs them."""
        with self._lock:
            self._merges -= 1
            if self._merges == 0 and self._pool is not None:
                self._pool.shutdown()
                self._pool = None


_workers = _Workers()


def _start(threads: int) -> ThreadPoolExecutor:
    """Start workers that compute with one thread each, and leave the setting of all other threads as it was.

    The default is read and restored by a thread of its own, because that sets the number of this thread too.
    """
    started, limited = Barrier(threads), Barrier(threads)

    def limit() -> None:
        torch.get_num_threads()  # a thread takes the default at its first use of torch: before its number is set
        started.wait()  # a waiting worker takes no second task, so that each task gets a worker
        torch.set_num_threads(1)
        limited.wait()

    pool = ThreadPoolExecutor(threads)
    with ThreadPoolExecutor(1) as fresh:
        default = fresh.submit(torch.get_num_threads).result()
        try:
            wait([pool.submit(limit) for _ in range(threads)])
        except BaseException:
            started.abort()
            limited.abort()
            pool.shutdown()
            raise
        finally:
            fresh.submit(torch.set_num_threads, default).result()
    return pool
