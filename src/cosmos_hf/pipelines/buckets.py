"""Picture sizes by aspect ratio: the five shapes that the Cosmos-1 models were trained on (arXiv 2501.03575, section 3)."""

import logging
import math

logger = logging.getLogger(__name__)

OFF_SHAPE = 0.2  # distance of the logarithms of aspect ratios from which on a size is warned of
RATIOS = ("16:9", "4:3", "1:1", "3:4", "9:16")
# (height, width) by the published models' size class. Each is a multiple of 16, the tokenizer's factor times the patch.
SIZES = {
    "720p": {"16:9": (704, 1280), "4:3": (704, 960), "1:1": (960, 960), "3:4": (960, 704), "9:16": (1280, 704)},
    "512p": {"16:9": (384, 640), "4:3": (512, 640), "1:1": (512, 512), "3:4": (640, 512), "9:16": (640, 384)},
    "480p": {"16:9": (432, 768), "4:3": (480, 640), "1:1": (480, 480), "3:4": (640, 480), "9:16": (768, 432)},
    "256p": {"16:9": (192, 320), "4:3": (256, 320), "1:1": (256, 256), "3:4": (320, 256), "9:16": (320, 192)},
}


def nearest_ratio(height: int, width: int) -> str:
    """The bucket whose shape is nearest to a picture's, by the ratio of their aspect ratios."""
    return min(RATIOS, key=lambda name: abs(math.log(_aspect(name) * height / width)))


def size_of(ratio: str, height: int, width: int, multiple: int) -> tuple[int, int]:
    """(height, width) of a shape, for a model whose usual size is height x width.

    A published size gives the published size of this shape; any other the size of about as many pixels, in multiples of
    `multiple`.
    """
    if ratio not in RATIOS:
        raise ValueError(f"resolution must be 'auto' or one of {', '.join(RATIOS)}, got {ratio!r}")
    for sizes in SIZES.values():
        if (height, width) in sizes.values() and not any(side % multiple for side in sizes[ratio]):
            return sizes[ratio]
    area = height * width
    tall = math.sqrt(area / _aspect(ratio))
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (tall, area / tall))


def bucket_size(pipe, resolution: str | None, height, width, source: tuple[int, int] | None = None):
    """(height, width) that a call's `resolution` stands for; height and width as they are where it is None.

    `source` is the input's (height, width), which "auto" follows: the nearest shape. Raises ValueError for a resolution
    beside a height or a width, an unknown one, and "auto" without an input.
    """
    if resolution is None:
        if height and width and abs(math.log(_aspect(nearest_ratio(height, width)) * height / width)) > OFF_SHAPE:
            logger.warning(
                "%dx%d (height x width) is far from the shapes that the models were trained on: %s",
                *(height, width, ", ".join(RATIOS)),
            )
        return height, width
    if height is not None or width is not None:
        raise ValueError(f"give resolution={resolution!r} or height and width, not both")
    if resolution == "auto" and source is None:
        raise ValueError(f"resolution='auto' follows an image or a video; without one say one of {', '.join(RATIOS)}")
    ratio = nearest_ratio(*source) if resolution == "auto" else resolution
    multiple = pipe.vae.config.spatial_compression * pipe.transformer.config.patch_size[1]
    size = size_of(ratio, pipe.call_default("height"), pipe.call_default("width"), multiple)
    if resolution == "auto":
        logger.info("resolution='auto': an input of %dx%d is generated at %dx%d (%s)", *source, *size, ratio)
    return size


def _aspect(ratio: str) -> float:
    width, height = ratio.split(":")
    return int(width) / int(height)
