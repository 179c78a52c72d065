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

FEW_CHANNELS = 64  # below, sums and copies take what the products save


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x [..., C] is better convolved so: on a processor, in inference, with enough channels."""
    return x.device.type == "cpu" and in_inference() and min(weight.shape[:2]) >= FEW_CHANNELS


def minimal_taps(weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, ...]:
    """The four factors of the products for a weight [O, I, ...] with three taps along `axis`, which stays with length 1."""
    first, middle, last = weight.split(1, axis)
    ends = first + last
    return first, (ends + middle) / 2, (ends - middle) / 2, last


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
