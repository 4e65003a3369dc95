"""A fake GPU: tensors whose values lie in CPU memory, but which report the device ``cuda:0`` and refuse CPU tensors.

Inside `fake_gpu` the device ``cuda`` works as on a machine with a GPU, as far as devices are concerned: an operation
on tensors of both devices raises, and so does the conversion of a GPU's tensor to numpy. Values are those of the CPU.
For torch's C++ code the tensors are on the device ``meta``.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
_DRIVER = {  # functions of torch.cuda -> what they return
    "synchronize": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "get_device_name": "fake GPU",
    "max_memory_allocated": 0,
    "current_device": 0,
    "Stream": object(),
    "stream": nullcontext(),
}
_COPIES = {"_to_copy", "copy_", "set_"}  # operations between devices


class WrongDevice(AssertionError):
    """An operation had tensors of both devices."""


class GpuTensor(Tensor):
    """A tensor on the fake GPU; `values` is its CPU tensor."""

    values: Tensor

    @staticmethod
    def __new__(cls: type[GpuTensor], values: Tensor) -> GpuTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=_META,
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, and put its results on the device where a GPU would leave them."""
    name = func.name().removeprefix("aten::").partition(".")[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = any(isinstance(x, GpuTensor) for x in tensors)
    if on_gpu and name not in _COPIES:
        # as on a real GPU, a CPU scalar is allowed anywhere, and a CPU index for a GPU's tensor
        allowed = set(map(id, tree_leaves(args[1]))) if name.startswith("index") and len(args) > 1 else set[int]()
        wrong = [tuple(x.shape) for x in tensors if not isinstance(x, GpuTensor) and x.ndim and id(x) not in allowed]
        if wrong:
            raise WrongDevice(f"{name}: CPU tensors {wrong} with tensors of {CUDA}")
    target = kwargs.get("device")
    if target is not None:
        on_gpu = torch.device(target).type == "meta"
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
    elif name == "copy_":
        on_gpu = isinstance(args[0], GpuTensor)
    values = tree_map(lambda x: x.values if isinstance(x, GpuTensor) else x, (args, kwargs))
    result = func(*values[0], **values[1])
    if name == "_to_copy" and target is not None and result is values[0][0]:
        result = result.clone()
    written = {id(x.values): x for x in tensors if isinstance(x, GpuTensor)}  # operations in place return these
    if not on_gpu or name == "_local_scalar_dense":
        return result
    return tree_map(lambda x: written[id(x)] if id(x) in written else _on_gpu(x), result)


def _on_gpu(value: Any) -> Any:
    return GpuTensor(value) if isinstance(value, Tensor) else value


class _Dispatch(TorchDispatchMode):
    """Runs the operations that create tensors on the fake GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchFunctionMode):
    """Passes the device ``meta`` to torch's C++ code instead of ``cuda``, which would start the driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.tolist and isinstance(args[0], GpuTensor):
            return args[0].tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], _with_tensors(args[1]), *args[2:])
        args, kwargs = tree_map(_without_cuda, (args, kwargs))
        kwargs.pop("pin_memory", None)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


def _with_tensors(index: Any) -> Any:
    """An index with tensors instead of lists, which torch would make tensors of without values."""
    if isinstance(index, tuple):
        return tuple(_with_tensors(part) for part in index)
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def _without_cuda(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return _META if named else value


@contextmanager
def fake_gpu() -> Generator[None]:
    """Make the device ``cuda`` a fake GPU inside the block, also in threads that are started there."""
    run = threading.Thread.run

    def run_with_gpu(thread: threading.Thread) -> None:
        with _Dispatch(), _Devices():
            run(thread)

    backward = torch.autograd._engine_run_backward

    def backward_with_gpu(*args: Any, **kwargs: Any) -> Any:
        with _Devices():  # the mode is off while it handles `Tensor.backward`, and blocks may be recomputed in that
            return backward(*args, **kwargs)

    functions: dict[str, Any] = {name: lambda *_, value=value: value for name, value in _DRIVER.items()}
    driver = mock.patch.multiple(torch.cuda, **functions)
    threads = mock.patch.object(threading.Thread, "run", run_with_gpu)
    engine = mock.patch.object(torch.autograd, "_engine_run_backward", backward_with_gpu)
    with driver, threads, engine, _Dispatch(), _Devices():
        yield
