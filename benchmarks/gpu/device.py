"""Timing, memory and speed of a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Block until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, call: Callable[[], Any], rounds: int = 0) -> float:
    """Return the median wall time of `call` in seconds, after one call that warms up; by default of a single call."""
    if rounds:
        call()
    spent: list[float] = []
    for _ in range(max(1, rounds)):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        spent.append(time.perf_counter() - start)
    return median(spent)


def reset_peak(device: torch.device) -> None:
    """Begin to measure the peak of the device's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """Return the peak of the device's memory since `reset_peak` in GB; ``None`` on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def describe(device: torch.device) -> str:
    """Return the name of the device with the versions that results depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def bandwidth(device: torch.device, size: int) -> float:
    """Return the memory bandwidth in bytes per second: of a copy, whose bytes are read and written.

    Args:
        size: Number of bytes to copy.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / seconds(device, lambda: target.copy_(source), 5)


def matmul_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return the floating point operations per second of a product of square matrices."""
    X = torch.ones(width, width, device=device, dtype=dtype)
    return 2 * width**3 / seconds(device, lambda: X @ X, 5)
