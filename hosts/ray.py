"""Ray: run the batches of a merge as tasks on a cluster, whose workers open the inputs themselves."""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from ray.exceptions import RayError, RayTaskError

from ..core.adapter import Adapter
from ..core.errors import LegoMoleError, MergeError
from ..core.merge.tasks import BatchMerger, BatchResult, ModuleBatch
from ..core.recipes.remote import RemoteInputs, RemoteRunner

ray: Any = importlib.import_module("ray")  # with `import ray`, type checkers take this file for the library

# A worker keeps the adapters of the current merge open between its tasks.
_open_adapters = lru_cache(maxsize=1)(RemoteInputs.open)


@contextmanager
def ray_runner(address: str) -> Generator[RemoteRunner]:
    """Connect to a Ray cluster and yield a function that runs the batches of a merge on it.

    A batch is a task that reserves as many CPUs as this process has threads: sums are equal to the last bit only if
    they are split among equally many threads.

    Args:
        address: An address for `ray.init`: ``local`` starts Ray on this machine until the block ends, ``auto`` finds
            the cluster this machine belongs to, ``HOST:PORT`` or ``ray://HOST:PORT`` is a remote one. Ignored if this
            process is already connected to a cluster.

    Yields:
        A runner for `core.recipes.run.run`.

    Raises:
        MergeError: The cluster cannot be reached. When the runner is used: no machine of the cluster has enough CPUs,
            or a task failed.
    """
    with nullcontext() if ray.is_initialized() else _connected(address):
        yield _run_batches


@contextmanager
def _connected(address: str) -> Generator[None]:
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that we start sends no usage statistics
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **local)
    except (RayError, ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise MergeError(
            "The Ray cluster cannot be reached.",
            expected="local, auto, HOST:PORT or ray://HOST:PORT",
            found=f"{address}: {_first_line(error)}",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _run_batches(inputs: RemoteInputs, merger: BatchMerger, batches: Sequence[ModuleBatch]) -> Iterator[BatchResult]:
    """Merge every batch on the cluster and yield the results in order.

    At any time the cluster has about twice as many tasks as it can run, so that little is left to run after an error or
    a cancel. Submitting all tasks and cancelling the rest is no alternative: `ray.cancel` aborts the whole process if a
    task starts in the same moment (seen in Ray 2.60, "Tried to complete task that was not pending").

    Args:
        inputs, merger, batches: See `core.recipes.remote.RemoteRunner`.

    Raises:
        MergeError: No machine has enough CPUs, or the cluster lost a task.
        LegoMoleError: A task raised it.
    """
    threads = torch.get_num_threads()
    cpus = _cpus_by_machine()
    if not any(count >= threads for count in cpus):
        most = max(cpus, default=0)
        raise MergeError(
            "No machine of the cluster has as many CPUs as this process has threads.",
            expected=f"{threads} CPUs",
            found=f"{most} at most",
            remedy=f"set OMP_NUM_THREADS={max(most, 1)} here",
        )
    shared = ray.put((inputs, merger))
    task: Any = ray.remote(_merge_batch).options(num_cpus=threads)
    waiting, submitted = deque(batches), deque[Any]()
    unfinished: list[Any] = []
    while waiting or submitted:
        if waiting:
            slots = sum(count // threads for count in _cpus_by_machine())  # counted again: clusters grow and shrink
            while waiting and len(unfinished) < 2 * max(slots, 1):
                submitted.append(task.remote(shared, waiting.popleft(), threads))
                unfinished.append(submitted[-1])
        if submitted[0] in unfinished:
            with _cluster_errors():
                _, unfinished = ray.wait(unfinished)
            continue
        with _cluster_errors():
            result: BatchResult | LegoMoleError = ray.get(submitted.popleft())
        if isinstance(result, LegoMoleError):
            raise result
        yield result


def _cpus_by_machine() -> list[int]:
    """Number of CPUs of each machine of the cluster."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


@contextmanager
def _cluster_errors() -> Generator[None]:
    """Turn the errors of Ray itself inside the block into a MergeError."""
    try:
        yield
    except RayTaskError:  # raised inside a task: a bug in our code, not a fault of the cluster
        raise
    except RayError as error:
        raise MergeError(
            "The Ray cluster failed to run a task.",
            found=f"{type(error).__name__}: {_first_line(error)}",
            remedy="see Ray's logs; a task needs memory for one batch of modules",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _merge_batch(
    shared: tuple[RemoteInputs, BatchMerger], batch: ModuleBatch, threads: int
) -> BatchResult | LegoMoleError:
    """Merge a batch inside a worker.

    A `LegoMoleError` is returned rather than raised: Ray would wrap an exception in one of its own.
    """
    torch.set_num_threads(threads)
    inputs, merger = shared
    try:
        adapters: list[Adapter] = _open_adapters(inputs)
        return merger(adapters, batch)
    except LegoMoleError as error:
        return error
