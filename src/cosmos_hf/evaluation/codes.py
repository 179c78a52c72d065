"""How a discrete tokenizer uses its codebook: share of codes in use, entropy, entropy of each level."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class CodeUsage:
    """Counts codes over a sliding window, or over all that is given.

    Args:
        levels: values per channel of the finite scalar quantizer; channel 0 is the least significant digit of an index.
        window: how many of the last indices count (their histogram fades exponentially over it); None: all, without fading.
    """

    def __init__(self, levels: tuple[int, ...], window: int | None = None):
        self.levels, self.window = tuple(levels), window
        self.size = math.prod(levels)
        self.counts = torch.zeros(self.size, dtype=torch.float64)
        self.last_seen = torch.full((self.size,), -math.inf, dtype=torch.float64)
        self.total = 0

    @torch.no_grad()
    def update(self, indices: torch.Tensor):
        """indices: int64 of any shape."""
        new = torch.bincount(indices.flatten(), minlength=self.size).cpu()
        number = indices.numel()
        if self.window is not None:
            self.counts *= math.exp(-number / self.window)
        self.counts += new
        self.total += number
        self.last_seen[new > 0] = self.total

    def figures(self) -> dict[str, float]:
        """`code_usage` and `dead_codes`: shares of the codebook that were and were not seen; `code_bits`: entropy of the
        histogram, at most log2 of the codebook's size, and too low where few indices were counted; `level_entropy_i`: entropy of
        channel i as a share of its maximum. Raises ValueError before any index was counted."""
        if not self.total:
            raise ValueError("no codes were counted")
        since = self.total - self.window if self.window is not None else -1
        usage = float((self.last_seen > since).double().mean())
        shares = self.counts / self.counts.sum()
        figures = {"code_usage": usage, "dead_codes": 1 - usage, "code_bits": _bits(shares)}
        grid = shares.view(*reversed(self.levels))  # the last axis is channel 0
        for i, level in enumerate(self.levels):
            others = [axis for axis in range(grid.ndim) if axis != grid.ndim - 1 - i]
            figures[f"level_entropy_{i}"] = _bits(grid.sum(others) if others else grid) / math.log2(level)
        return figures


def _bits(shares: torch.Tensor) -> float:
    shares = shares[shares > 0]
    return float(-(shares * shares.log2()).sum()) + 0.0  # no -0.0


@contextmanager
def counting_codes(model: nn.Module, window: int | None = None) -> Iterator[CodeUsage | None]:
    """Inside the block every code that the tokenizer makes is counted; None for a continuous tokenizer."""
    usage, handle = watch_codes(model, window)
    try:
        yield usage
    finally:
        if handle:
            handle.remove()


def watch_codes(model: nn.Module, window: int | None = None, only_training: bool = False):
    """Count a tokenizer's codes from now on, whatever wraps its `forward` -> (CodeUsage, handle), (None, None) if continuous.

    only_training: leave out what it codes in evaluation mode. `handle.remove()` ends it.
    """
    quantizer = getattr(model, "fsq", None)
    if quantizer is None:
        return None, None
    usage = CodeUsage(quantizer.levels, window)

    def count(module, inputs, output):
        if module.training or not only_training:
            usage.update(output[1])

    return usage, quantizer.register_forward_hook(count)
