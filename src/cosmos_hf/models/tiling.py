"""Coding large frames in overlapping tiles, blended linearly where they overlap: less memory, and an approximation.

Normalisation statistics and spatial attention then see one tile instead of the frame, so results differ from those of the
whole frame, most near the seams. Tiles are off unless `enable_tiling` is called.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .streaming import StreamState


@dataclass(frozen=True)
class Tiling:
    """Sizes in pixels: of a tile, and from the start of one to the start of the next."""

    tile_sample_min_height: int = 512
    tile_sample_min_width: int = 512
    tile_sample_stride_height: int = 448
    tile_sample_stride_width: int = 448


class TilingMixin:
    """`enable_tiling` and `disable_tiling` under diffusers' names."""

    tiling: Tiling | None = None

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ):
        """Code frames larger than a tile in tiles of `tile_sample_min_*` pixels, one every `tile_sample_stride_*` pixels.

        Defaults: tiles of 512, strides of 448, or of seven eighths of a tile whose size is given alone. All are multiples of
        `spatial_compression`, a stride no larger than its tile.
        """
        given = {
            "tile_sample_min_height": tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width,
            "tile_sample_stride_height": tile_sample_stride_height,
            "tile_sample_stride_width": tile_sample_stride_width,
        }
        factor = self.config.spatial_compression
        for name, size in given.items():
            if size is not None and (size < factor or size % factor):
                raise ValueError(f"{name} must be a positive multiple of {factor}, got {size}")
        for axis in ("height", "width"):
            tile, stride = f"tile_sample_min_{axis}", f"tile_sample_stride_{axis}"
            if given[tile] is not None and given[stride] is None:
                given[stride] = max(factor, given[tile] * 7 // 8 // factor * factor)
        tiling = replace(Tiling(), **{name: size for name, size in given.items() if size is not None})
        for axis in ("height", "width"):
            tile, stride = getattr(tiling, f"tile_sample_min_{axis}"), getattr(tiling, f"tile_sample_stride_{axis}")
            if stride > tile:
                raise ValueError(
                    f"tile_sample_stride_{axis} must be at most tile_sample_min_{axis}={tile}, got {stride}: "
                    "pixels between the tiles would be lost"
                )
        self.tiling = tiling

    def disable_tiling(self):
        """Code whole frames again."""
        self.tiling = None

    def _in_tiles(self, code: Callable, x: torch.Tensor, scale_in: int, scale_out: int, stream: StreamState | None):
        """`code(x, stream)` for x [..., H, W] -> [..., H', W'], in tiles where tiling is on and x is larger than one.

        `scale_in`, `scale_out`: pixels per position of x and of the result.
        """
        tiling, (height, width) = self.tiling, x.shape[-2:]
        if tiling is None or (
            height * scale_in <= tiling.tile_sample_min_height and width * scale_in <= tiling.tile_sample_min_width
        ):
            return code(x, stream)
        rows = tile_starts(height * scale_in, tiling.tile_sample_min_height, tiling.tile_sample_stride_height)
        columns = tile_starts(width * scale_in, tiling.tile_sample_min_width, tiling.tile_sample_stride_width)
        total = weights = None
        for index, (top, left) in enumerate((top, left) for top in rows for left in columns):
            bottom, right = top + tiling.tile_sample_min_height, left + tiling.tile_sample_min_width
            part = x[..., top // scale_in : bottom // scale_in, left // scale_in : right // scale_in]
            part = code(part, None if stream is None else stream.tile(index))
            if total is None:
                shape = (*part.shape[:-2], height * scale_in // scale_out, width * scale_in // scale_out)
                total = part.new_zeros(shape, dtype=torch.promote_types(part.dtype, torch.float32))
                weights = total.new_zeros(shape[-2:])
            top, left = top // scale_out, left // scale_out
            ramp = _ramp(rows, tiling.tile_sample_min_height, top, part.shape[-2], scale_out, total)[:, None]
            ramp = ramp * _ramp(columns, tiling.tile_sample_min_width, left, part.shape[-1], scale_out, total)
            area = (..., slice(top, top + part.shape[-2]), slice(left, left + part.shape[-1]))
            total[area] += part * ramp
            weights[area] += ramp
        return (total / weights).to(part.dtype)


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin; the last one ends with the frame, so that all have the same size."""
    return [0] if size <= tile else [*range(0, size - tile, stride), size - tile]


def _ramp(starts: list[int], tile: int, start: int, length: int, scale: int, like: torch.Tensor) -> torch.Tensor:
    """Weights along one axis of the tile that begins at `start`: they rise and fall where it overlaps its neighbours."""
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    weight = torch.ones_like(position)
    i = [s // scale for s in starts].index(start)
    if i > 0:
        overlap = (starts[i - 1] + tile - starts[i]) // scale
        weight = weight.minimum((position + 1) / (overlap + 1))
    if i < len(starts) - 1:
        overlap = (starts[i] + tile - starts[i + 1]) // scale
        weight = weight.minimum((length - position) / (overlap + 1))
    return weight
