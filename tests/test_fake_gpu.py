"""The fake GPU behaves as a real one where devices are concerned."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from .fake_gpu import CUDA, GpuTensor, WrongDevice, fake_gpu


def test_values_are_computed_and_stay_on_the_device():
    X = torch.randn(3, 4)
    with fake_gpu():
        x = X.to("cuda")
        made = torch.zeros(2, device="cuda"), torch.tensor([1.0], device=CUDA), torch.eye(2, device=x.device)
        product = x @ x.mT
        assert {y.device for y in (x, product, *made, x[0], x.new_zeros(2), torch.zeros_like(x))} == {CUDA}
        assert type(product.cpu()) is torch.Tensor
        torch.testing.assert_close(product.cpu(), X @ X.mT)
        assert product.tolist() == (X @ X.mT).tolist()
        assert float(x.sum()) == float(X.sum())


def test_operations_in_place_write_into_the_same_memory():
    with fake_gpu():
        x = torch.zeros(2, 2, device="cuda")
        assert x.add_(1) is x
        x[:, 1:] = 5
        x[0].copy_(torch.tensor([7.0, 8.0]))  # a copy from the CPU
        assert x.tolist() == [[7, 8], [1, 5]]
        home = torch.zeros(2)
        home.copy_(x[1])
    assert home.tolist() == [1, 5]


def test_tensors_of_both_devices_in_one_operation_raise():
    with fake_gpu():
        x, y = torch.ones(2, device="cuda"), torch.ones(2)
        for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: x @ y, lambda: torch.where(y > 0, x, 0)):
            with pytest.raises(WrongDevice, match=r"CPU tensors \[\(2,\)"):
                mixed()
        with pytest.raises(WrongDevice):
            y.add_(x)
        with pytest.raises(RuntimeError):
            x.numpy()
        assert (x + torch.tensor(2.0)).tolist() == [3, 3]  # a scalar may be on the CPU
        assert x[torch.tensor([1])].tolist() == [1]  # and so may an index
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert x[[1]].tolist() == [[3, 4, 5]]
        x[:, [0, 2]] = 9
        assert x.tolist() == [[9, 1, 9], [9, 4, 9]]


def test_gradients_and_layers_are_on_the_device():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    wanted = layer.weight.grad.clone()
    layer.zero_grad()
    with fake_gpu():
        layer.to("cuda")
        assert isinstance(layer.weight, GpuTensor)
        layer(x.to("cuda")).square().sum().backward()
        assert layer.weight.grad.device == CUDA
        torch.testing.assert_close(layer.weight.grad.cpu(), wanted)
        with pytest.raises(WrongDevice):
            layer(x)


def test_new_threads_have_the_device():
    with fake_gpu(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: torch.zeros(2, device="cuda").device).result() == CUDA
