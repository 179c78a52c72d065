"""`linear` is `torch.nn.functional.linear`, by whichever way it goes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cosmos_hf.models import linear as module
from cosmos_hf.models.linear import Linear, blas_is_slow, linear, speed_up


@pytest.fixture(params=[False, True], ids=["blas", "convolution"])
def way(request, monkeypatch):
    monkeypatch.setattr(module, "blas_is_slow", lambda: request.param)
    calls = []
    monkeypatch.setattr(F, "conv2d", lambda *args, conv2d=F.conv2d, **how: calls.append(1) or conv2d(*args, **how))
    yield request.param
    assert bool(calls) == request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (2, 3, 5, 24), (1, 17, 24)])
def test_values_and_gradients(way, shape, bias):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(8, 24, requires_grad=True)
    inputs = (x, weight, torch.randn(8, requires_grad=True)) if bias else (x, weight)
    ours, theirs = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    push = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, push), torch.autograd.grad(theirs, inputs, push), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_other_inputs_go_the_plain_way(monkeypatch):
    """Few rows, other precisions, autocast and views that are no plain batch of rows."""
    monkeypatch.setattr(module, "blas_is_slow", lambda: True)
    weight = torch.randn(8, 24)
    for x in (torch.randn(24), torch.randn(2, 24), torch.randn(0, 24), torch.randn(40, 24).double()):
        assert torch.equal(linear(x, weight.to(x)), F.linear(x, weight.to(x)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(40, 24), weight).dtype == torch.bfloat16
    transposed = torch.randn(24, 40).T
    torch.testing.assert_close(linear(transposed, weight), F.linear(transposed, weight), atol=1e-5, rtol=1e-5)


def test_layers_keep_their_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2, bias=False)), nn.Conv2d(1, 1, 1))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    speed_up(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [Linear, Linear]
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert blas_is_slow() in (True, False)
