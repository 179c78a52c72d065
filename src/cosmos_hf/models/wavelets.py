"""Haar wavelet patches of the tokenizers (arXiv 2501.03575, section 3.1), for images and videos alike.

Tensors are channels-last, [B, ..., C]. Every band is an average or a half difference, so a constant picture keeps its value.
"""

import torch


def haar_split(x: torch.Tensor, patch_size: int, axes: tuple[int, ...]) -> torch.Tensor:
    """Halve each of `axes` log2(patch_size) times; channels grow by patch_size^len(axes).

    Channel order: the band of the last pass is slowest; within a pass the bands of axes[0] are slowest; then the input channels.
    """
    for _ in range(patch_size.bit_length() - 1):
        for axis in axes:
            a, b = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.stack([a + b, a - b], dim=-2) * 0.5
        x = x.flatten(-len(axes) - 1)
    return x


def haar_merge(x: torch.Tensor, patch_size: int, axes: tuple[int, ...]) -> torch.Tensor:
    """Exact inverse of `haar_split`."""
    for _ in range(patch_size.bit_length() - 1):
        x = x.unflatten(-1, (*[2] * len(axes), -1))
        for axis in reversed(axes):
            low, high = x.unbind(-2)
            x = torch.stack([low + high, low - high], dim=axis + 1).flatten(axis, axis + 1)
    return x
