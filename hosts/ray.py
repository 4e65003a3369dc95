"""Ray: the batches of a merge as tasks on a cluster, each worker opening the inputs by itself."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from ray.exceptions import RayError, RayTaskError

from ..core.adapter import Adapter
from ..core.errors import LegoMoleError, MergeError
from ..core.merge.tasks import BatchMerger, BatchResult, ModuleBatch
from ..core.recipes.remote import RemoteInputs, RemoteRunner

ray: Any = importlib.import_module("ray")  # type checkers would take this file for it

# Adapters stay open in a worker between its tasks: those of the merge at hand.
_opened = lru_cache(maxsize=1)(RemoteInputs.open)


@contextmanager
def cluster(address: str) -> Generator[RemoteRunner]:
    """A cluster that does the work of merges, see `core.recipes.run.run`.

    A batch is a task, which takes as many processors as this process has threads: sums come out the same to the last
    bit only if as many threads share them.

    Args:
        address: What `ray.init` takes: ``local`` starts Ray on this machine for the time of the block, ``auto`` finds
            the cluster this machine belongs to, ``HOST:PORT`` or ``ray://HOST:PORT`` is one elsewhere. Where this
            process is connected already, that is used.

    Raises:
        MergeError: There is no such cluster, or none of its machines has enough processors.
    """
    waiting: list[Any] = []
    with nullcontext() if ray.is_initialized() else _connected(address):
        try:
            yield partial(_spread, waiting)
        finally:  # of a merge that failed or was cancelled
            for reference in waiting:
                ray.cancel(reference)


@contextmanager
def _connected(address: str) -> Generator[None]:
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is started for us alone reports to nobody
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


def _spread(
    waiting: list[Any], library: RemoteInputs, work: BatchMerger, batches: Sequence[ModuleBatch]
) -> Iterator[BatchResult]:
    """The results of all batches, in order; `waiting` keeps the tasks that are not done.

    Raises:
        LegoMoleError: What a task raised. MergeError: The cluster lost it.
    """
    threads = torch.get_num_threads()
    most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if most < threads:
        raise MergeError(
            "No machine of the cluster has as many processors as this process has threads.",
            expected=f"{threads} processors",
            found=f"{most} at most",
            remedy=f"set OMP_NUM_THREADS={max(most, 1)} here",
        )
    shared = ray.put((library, work))
    task: Any = ray.remote(_merge).options(num_cpus=threads)
    waiting += [task.remote(shared, batch, threads) for batch in batches]
    while waiting:
        try:
            done: BatchResult | LegoMoleError = ray.get(waiting[0])
        except RayTaskError:  # a bug of ours, not of the cluster
            raise
        except RayError as error:
            raise MergeError(
                "The Ray cluster could not do its part.",
                found=f"{type(error).__name__}: {_first_line(error)}",
                remedy="see Ray's logs; a task needs memory for one batch of modules",
            ) from error
        del waiting[0]
        if isinstance(done, LegoMoleError):
            raise done
        yield done


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _merge(shared: tuple[RemoteInputs, BatchMerger], batch: ModuleBatch, threads: int) -> BatchResult | LegoMoleError:
    """A task. Errors of ours are values: as exceptions they would arrive inside another."""
    torch.set_num_threads(threads)
    library, work = shared
    try:
        adapters: list[Adapter] = _opened(library)
        return work(adapters, batch)
    except LegoMoleError as error:
        return error
