"""A video file through the tokenizer and back, chunk by chunk: memory does not grow with the file's length."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.video import VideoWriter, count_frames, stream_video, to_float, to_uint8
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
    window: int | None = None,
    progress: bool = True,
) -> dict:
    """Encode and decode `source` into the mp4 `target`; every frame of the input has its frame in the output.

    Frames are decoded from the file, coded and written `chunk` by `chunk`. Only the keys and values of temporal attention grow
    with the length; `window` bounds them, too.

    Args:
        height, width: size to resize (covering) and crop to; None takes the input's, cut to multiples of the tokenizer's factor.
        fps: rate to resample to; None keeps the input's.
        chunk: frames at a time, a multiple of the tokenizer's temporal factor.
        window: latent frames that temporal attention looks back at, an approximation; None is all, as in one pass.

    Returns frames, size, rate, the mean PSNR in dB, and the bytes of keys and values at the end (`attention_bytes`, of encoder and
    decoder together). Raises ValueError for an unreadable file or an illegal size; no half-written file is left then.
    """
    if (height is None) != (width is None):
        raise ValueError("give height and width together")
    factor = tokenizer.config.temporal_compression
    if chunk < 1 or chunk % factor:
        raise ValueError(f"chunk must be a positive multiple of {factor} frames, got {chunk}")
    if height is None:
        height, width = _legal_size(tokenizer, next(stream_video(source, fps))[1])
    encoder, decoder = tokenizer.encoder_stream(window), tokenizer.decoder_stream(window)
    rate, total_error, count, writer = None, 0.0, 0, None
    try:
        with tqdm(total=count_frames(source, fps)[0], unit="frame", disable=not progress) as bar:
            for rate, frames in _chunks(stream_video(source, fps, height, width), chunk):
                video = to_float(frames)[None].to(tokenizer.device, tokenizer.dtype)
                padded = video if count == 0 else _padded(video, factor)
                result = decoder.push(encoder.push(padded).latents)[:, :, : video.shape[2]]
                # Only now: a size that the tokenizer refuses leaves no empty file behind.
                writer = writer or VideoWriter(target, rate, _provenance(tokenizer, source))
                writer.write(to_uint8(result[0]))
                error = (result.float().clamp(-1, 1) - video).square().mean((0, 1, 3, 4)) / 4
                total_error += (-10 * error.clamp(min=1e-10).log10()).sum().item()
                count += video.shape[2]
                bar.update(video.shape[2])
    except BaseException:
        if writer is not None:
            writer.close()
            Path(target).unlink()
        raise
    writer.close()
    figures = dict(output=str(target), num_frames=count, height=height, width=width, fps=rate)
    return figures | dict(
        psnr=round(total_error / count, 2), attention_bytes=encoder.attention_bytes + decoder.attention_bytes
    )


def _chunks(pictures, chunk: int):
    """(rate, uint8 [3, T, H, W]): the first frame stands alone, then come whole chunks, the last perhaps shorter."""
    size = 1
    while batch := list(itertools.islice(pictures, size)):
        frames = np.stack([np.asarray(picture) for _, picture in batch])
        yield batch[0][0], torch.from_numpy(frames).permute(3, 0, 1, 2)
        size = chunk


def _provenance(tokenizer: CosmosVideoTokenizer, source) -> dict:
    return {"source": str(source), "tokenizer": dict(tokenizer.config)}


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
