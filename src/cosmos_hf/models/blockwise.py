"""Block by block through a video: layers that treat frames apart, or positions, with only a block of what lies between.

A layer that normalises, activates and convolves holds several tensors as large as its input. In inference none of them is needed
later, so `by_frames` and `by_rows` pass a few frames or rows through the whole chain, write the result, and go on. The result is
that of one pass; the blocks stay in the processor's cache. Where a gradient is wanted, and while compiling, they do one pass.
"""

from collections.abc import Callable

import torch

# A block's input. Smaller blocks repeat the reordering of weights too often, larger ones leave the cache.
CPU_BLOCK = 4 * 2**20
BLOCK = 32 * 2**20  # on accelerators, which want more work at a time


def in_inference() -> bool:
    """Whether tensors that a layer made itself may be overwritten."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y; in inference x, which the caller owns, is overwritten."""
    return x.add_(y) if in_inference() and x.dtype == torch.result_type(x, y) else x + y


def by_frames(function: Callable, *tensors: torch.Tensor, into: torch.Tensor | None = None, growth: int = 1):
    """function(*tensors) of tensors [B, T, H, W, C], where it treats every frame alone.

    Args:
        into: a tensor of the result's shape that may be overwritten, also one of `tensors`, or None.
        growth: how many times larger than its input the function's result is.
    """
    x, batch = tensors[0], tensors[0].shape[:2]
    length = _length(x[:1, :1].nbytes * growth, x.device)
    if not in_inference() or length >= batch.numel():
        return function(*tensors)
    tensors = [x.flatten(0, 1)[None] for x in tensors]
    into = into.flatten(0, 1)[None] if into is not None and into.is_contiguous() else None
    return _in_blocks(function, tensors, 1, length, into)[0].unflatten(0, batch)


def by_rows(function: Callable, *tensors: torch.Tensor, into: torch.Tensor | None = None):
    """function(*tensors) of tensors [B, T, H, W, C], where it treats every position (over all frames) alone; `into` as above."""
    x = tensors[0]
    length = _length(x[:, :, :1].nbytes, x.device)
    if not in_inference() or length >= x.shape[2]:
        return function(*tensors)
    return _in_blocks(function, tensors, 2, length, into)


def _length(step_bytes: int, device: torch.device) -> int:
    """Steps along an axis that make a block."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else BLOCK) // step_bytes)


def _in_blocks(function, tensors, axis: int, length: int, into: torch.Tensor | None) -> torch.Tensor:
    total = tensors[0].shape[axis]
    length = -(-total // -(-total // length))  # as many blocks, of about one size
    for start in range(0, total, length):
        here = (*[slice(None)] * axis, slice(start, start + length))
        y = function(*(x[here] for x in tensors))
        if into is None:
            into = y.new_empty(*y.shape[:axis], total, *y.shape[axis + 1 :])
        into[here] = y
        del y  # or it would lie beside the next block's
    return into
