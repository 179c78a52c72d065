"""Convolutions by three taps along an axis with four products for two results, where the plain way takes six.

Winograd's minimal filtering F(2, 3): of four neighbours d0 to d3 and taps g0 to g2 the results are

    y0 = m0 + m1 + m2    m0 = g0 (d0 - d2)                 m1 = (g0 + g1 + g2) / 2 (d1 + d2)
    y1 = m1 - m2 - m3    m2 = (g0 - g1 + g2) / 2 (d2 - d1) m3 = g2 (d1 - d3)

With a tap a matrix, or a row of a 3x3 kernel, products take nearly all of the time and the sums little. It is as exact as
the plain way, for fewer terms are added up: on a layer of 512 channels the largest error is half of it. Schemes with fewer products
yet, F(4, 3) or both axes of a kernel at once, are not: their error is 3 to 9 times larger.
"""

from collections.abc import Callable

import torch

from .blockwise import in_inference

# With fewer channels sums and copies take what the products save; a product of a kernel's row is three of one tap.
LEAST_CHANNELS, LEAST_CHANNELS_PER_TAP = 64, 256


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x [..., C] is better convolved so with a weight [O, I, ...]: on a processor, in inference, with enough channels.

    Not in 16 bits, where the sums would be rounded.
    """
    least = LEAST_CHANNELS if weight.shape[-1] > 1 else LEAST_CHANNELS_PER_TAP
    exact = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and exact and in_inference() and min(weight.shape[:2]) >= least


def minimal_taps(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four factors for a weight [O, I, 3, n] whose taps lie along the third axis: each [O, I, 1, n], channels last."""
    taps = weight.new_empty(4, weight.shape[0], 1, weight.shape[3], weight.shape[1])
    first, middle, last = weight.permute(0, 2, 3, 1).split(1, dim=1)
    taps[0], taps[3], middle = first, last, middle.contiguous()
    torch.add(taps[0], taps[3], out=taps[1])
    torch.sub(taps[1], middle, out=taps[2])
    taps[1] += middle
    taps[1:3] /= 2
    return taps.permute(0, 1, 4, 2, 3).unbind()


def convolve_pairs(
    x: torch.Tensor,
    taps: tuple[torch.Tensor, ...],
    bias: torch.Tensor,
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """x [N, L + 2, ...] convolved along its second axis -> [N, L, ...].

    multiply(x [N, pairs, ...], factor, bias or None): the product with one of `taps`.
    """
    length = x.shape[1] - 2
    pairs = (length + 1) // 2  # the last one may be half
    d0, d1, d2 = (x[:, i : i + 2 * pairs - 1 : 2] for i in range(3))
    d3 = x[:, 3::2]
    both, differ = multiply(d1 + d2, taps[1], bias), multiply(d2 - d1, taps[2], None)
    y = both.new_empty(both.shape[0], pairs, 2, *both.shape[2:])
    even, odd = y[:, :, 0], y[:, : d3.shape[1], 1]
    torch.add(both, differ, out=even)
    torch.sub(both[:, : d3.shape[1]], differ[:, : d3.shape[1]], out=odd)
    del both, differ
    even += multiply(d0 - d2, taps[0], None)
    odd -= multiply(d1[:, : d3.shape[1]] - d3, taps[3], None)
    return y.flatten(1, 2)[:, :length]
