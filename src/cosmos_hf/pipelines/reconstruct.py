"""A video file through the tokenizer and back, chunk by chunk: memory does not grow with the file's length."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.video import VideoWriter, stream_video, to_float, to_uint8
from ..models.autoencoder_cosmos import CosmosVideoTokenizer


@torch.no_grad()
def reconstruct_file(
    tokenizer: CosmosVideoTokenizer,
    source: str | Path,
    target: str | Path,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    chunk: int = 16,
    progress: bool = True,
) -> dict:
    """Encode and decode `source` into the mp4 `target`; every frame of the input has its frame in the output.

    Args:
        height, width: size to resize (covering) and crop to; None takes the input's, cut to multiples of the tokenizer's factor.
        fps: rate to resample to; None keeps the input's.
        chunk: frames at a time, a multiple of the tokenizer's temporal factor.

    Returns frames, size, rate and the mean PSNR in dB. The temporal attention's keys and values are the one thing that grows,
    by a few kilobytes a frame. Raises ValueError for an unreadable file or an illegal size.
    """
    if (height is None) != (width is None):
        raise ValueError("give height and width together")
    if height is None:
        height, width = _legal_size(tokenizer, next(stream_video(source, fps))[1])
    pictures = stream_video(source, fps, height, width)
    encoder, decoder = tokenizer.encoder_stream(), tokenizer.decoder_stream()
    rate, total_error, count = None, 0.0, 0
    size, writer = 1, None  # the first frame stands alone, then whole chunks
    with tqdm(unit="frame", disable=not progress) as bar:
        while batch := list(itertools.islice(pictures, size)):
            rate = batch[0][0]
            frames = torch.from_numpy(np.stack([np.asarray(picture) for _, picture in batch])).permute(3, 0, 1, 2)
            video = to_float(frames)[None].to(tokenizer.device)
            padded = video if count == 0 else _padded(video, tokenizer.config.temporal_compression)
            result = decoder.push(encoder.push(padded).latents)[:, :, : video.shape[2]]
            # Only now: a size that the tokenizer refuses leaves no empty file behind.
            writer = writer or VideoWriter(target, rate, {"source": str(source), "tokenizer": dict(tokenizer.config)})
            writer.write(to_uint8(result[0]))
            error = (result.clamp(-1, 1) - video).square().mean((0, 1, 3, 4)) / 4
            total_error += (-10 * error.clamp(min=1e-10).log10()).sum().item()
            count += video.shape[2]
            bar.update(video.shape[2])
            size = chunk
    writer.close()
    return dict(
        output=str(target), num_frames=count, height=height, width=width, fps=rate, psnr=round(total_error / count, 2)
    )


def _padded(video: torch.Tensor, factor: int) -> torch.Tensor:
    """The last chunk may be short: repeat its last frame; the extra output is cut."""
    missing = -video.shape[2] % factor
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def _legal_size(tokenizer: CosmosVideoTokenizer, picture: Image.Image) -> tuple[int, int]:
    factor = tokenizer.config.spatial_compression
    height, width = picture.height // factor * factor, picture.width // factor * factor
    if not height or not width:
        raise ValueError(
            f"frames of {picture.height}x{picture.width} are smaller than the tokenizer's {factor} pixels"
        )
    return height, width
