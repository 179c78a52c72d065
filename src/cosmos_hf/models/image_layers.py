"""Layers of the image tokenizer (arXiv 2501.03575, section 3.1). Activations are [B, C, H, W]; borders are zero."""

import torch
import torch.nn.functional as F
from torch import nn

from .wavelets import haar_merge, haar_split

NORM_GROUPS = 32


def image_patch(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """2-D Haar wavelet patches: [B, C, H, W] -> [B, C p^2, H / p, W / p]; the bands along W are slowest within a pass."""
    return haar_split(x.permute(0, 2, 3, 1), patch_size, axes=(2, 1)).permute(0, 3, 1, 2)


def image_unpatch(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Exact inverse of `image_patch`."""
    return haar_merge(x.permute(0, 2, 3, 1), patch_size, axes=(2, 1)).permute(0, 3, 1, 2)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ImageResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))

    def start_silent(self):
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="linear")
        nn.init.zeros_(self.conv2.weight)


class ImageAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (
            project(h).flatten(2).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )  # [B, H W, C]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.to_out(out)

    def start_silent(self):
        nn.init.zeros_(self.to_out.weight)


class ImageDownsample(nn.Module):
    """Halve height and width: a strided convolution, its border on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ImageUpsample(nn.Module):
    """Double height and width by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
