"""Matrix products of linear layers where the processor's BLAS is slow.

PyTorch's builds compute float32 products with MKL, which does not use the AVX-512 units of processors that are not Intel's, while
oneDNN does. There its linear layer is the same product in half the time, and with gradients, which that one has not, a 1x1
convolution.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

# Other kinds of weights, sharded or quantised, know their own products.
_DENSE = (torch.Tensor, nn.Parameter, FakeTensor)
FEW_ROWS = 16  # up to which reading the weight is what takes the time


@cache
def blas_is_slow() -> bool:
    """Whether this processor has AVX-512 and is not Intel's."""
    cpuinfo = Path("/proc/cpuinfo")
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    return cpuinfo.exists() and "GenuineIntel" not in cpuinfo.read_text()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., I] times weight [O, I], plus bias [O] -> [..., O], as `torch.nn.functional.linear`."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling()
    plain = plain or type(weight) not in _DENSE or torch.jit.is_tracing()
    if plain or not blas_is_slow() or torch.is_autocast_enabled("cpu") or x.numel() <= FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, I, rows, 1], channels last
    # A single thread would not take oneDNN for a 1x1 kernel, but for any that is dilated; for one of 1x1 that changes nothing else.
    y = F.conv2d(rows, weight[:, :, None, None], bias, dilation=(1, 2))
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def speed_up(model: nn.Module):
    """Make every plain `nn.Linear` of a model, also those of other libraries' blocks, a `Linear`; parameters stay the same."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
