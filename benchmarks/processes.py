"""Several processes for one training, or for many independent jobs; each computes with one thread."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

Job = TypeVar("Job")
_PATIENCE = timedelta(hours=3)  # while one process writes or evaluates, the others wait


def together(count: int, work: Callable[..., None], *args: Any) -> None:
    """Run ``work(*args)`` in `count` processes that can share batches and average gradients; all must be picklable."""
    if count == 1:
        work(*args)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_member, (count, Path(folder) / "rendezvous", work, args), nprocs=count)


def _member(index: int, count: int, rendezvous: Path, work: Callable[..., None], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=rendezvous.as_uri(), rank=index, world_size=count, timeout=_PATIENCE
    )
    work(*args)
    distributed.destroy_process_group()


def apart(count: int, work: Callable[[Job], None], jobs: Iterable[Job]) -> None:
    """Run ``work(job)`` for every job, on the first free one of `count` processes; the first error is raised."""
    if count == 1:
        for job in jobs:
            work(job)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for _ in pool.map(work, jobs):
            pass


def is_first() -> bool:
    """Whether this is the first process of `together`, or the only one."""
    return _index() == 0


def wait() -> None:
    """Wait for the other processes of `together`."""
    if distributed.is_initialized():
        distributed.barrier()


def own_share(batch: Sequence[Tensor]) -> list[Tensor]:
    """Return every `count`-th example of a batch, another part in each process of `together`.

    Raises:
        ValueError: If the parts are not of equal size, because `average_gradients` would not weigh examples equally.
    """
    if len(batch[0]) % _count():
        raise ValueError(f"a batch of {len(batch[0])} cannot be shared equally by {_count()} processes")
    return [tensor[_index() :: _count()] for tensor in batch]


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over the processes of `together`."""
    if _count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= _count()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _index() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1
