"""Finite scalar quantisation (FSQ, arXiv 2309.15505) as in the discrete tokenizers (arXiv 2501.03575, section 3)."""

import math

import torch
from torch import nn


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel to one of `levels[i]` values; parameter-free, the codebook is the product of the levels.

    Everything is computed in float32 whatever the dtype of the input, so that casting a model never changes an index.
    Channel 0 is the least significant digit of an index; codes lie in [-1, 1].

    Args:
        levels: number of values per channel, e.g. (8, 8, 8, 5, 5, 5) for 64000 codes.
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)

    def _constants(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        levels = torch.tensor(self.levels, device=device, dtype=torch.int64)
        basis = torch.cat([levels.new_ones(1), levels[:-1].cumprod(0)])
        return levels, levels // 2, basis

    def _bound(self, z: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Squash each channel so that rounding yields `levels` integers (an even count is shifted by one half)."""
        half = (levels - 1).float() * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return (z + torch.atanh(offset / half)).tanh() * half - offset

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z [..., C] -> codes [..., C] in z's dtype (straight-through gradient), indices [...] int64."""
        levels, half_width, basis = self._constants(z.device)
        bounded = self._bound(z.float(), levels)
        quantized = bounded.round()
        indices = ((quantized.long() + half_width) * basis).sum(-1)
        # The straight-through term is formed so that the forward value is the code itself, to the bit.
        rounded = _StraightThrough.apply(bounded) if z.requires_grad else quantized
        codes = rounded / half_width.float()
        return codes.to(z.dtype), indices

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """indices [...] int in [0, codebook_size) -> float32 codes [..., C]. Raises ValueError outside that range."""
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"indices must be integers, got {indices.dtype}")
        looked_at = indices.numel() and not indices.is_meta and not torch.compiler.is_compiling()
        if looked_at and (indices.min() < 0 or indices.max() >= self.codebook_size):
            raise ValueError(
                f"indices must lie in [0, {self.codebook_size}) for levels {self.levels}, "
                f"got {int(indices.min())}..{int(indices.max())}"
            )
        levels, half_width, basis = self._constants(indices.device)
        digits = (indices.long()[..., None] // basis) % levels
        return (digits - half_width) / half_width.float()

    def indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Inverse of `decode`: codes [..., C] -> indices [...] int64. Raises ValueError for values that are no codes."""
        levels, half_width, basis = self._constants(codes.device)
        scaled = codes.float() * half_width
        digits = scaled.round().nan_to_num(-1e6).long() + half_width
        if (scaled - scaled.round()).abs().max() > 1e-2 or (digits < 0).any() or (digits >= levels).any():
            raise ValueError(f"these are no codes of levels {self.levels}: every value must be a level's")
        return (digits * basis).sum(-1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bounded):
        return bounded.round()

    @staticmethod
    def backward(ctx, grad):
        return grad
