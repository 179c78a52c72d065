"""How well a video comes back from a tokenizer (arXiv 2501.03575, section 3.3): PSNR, SSIM, flicker and a perceptual distance."""

from collections.abc import Callable, Iterable

import torch

from ..data.video import to_float
from .metrics import flicker, mean_with_interval, psnr, ssim
from .perceptual import PerceptualDistance


@torch.no_grad()
def evaluate_reconstruction(
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    clips: Iterable[dict],
    perceptual: PerceptualDistance | None = None,
    device: str | torch.device = "cpu",
) -> dict:
    """Figures of each clip and their means with 95 % bootstrap intervals over clips, as a dict ready for JSON.

    Args:
        reconstruct: video float [1, 3, T, H, W] in [-1, 1] -> the same shape, for example
            `lambda video: tokenizer(video).sample`. The result is rounded to 8 bits first, as a file would.
        clips: samples with `video` uint8 [3, T, H, W] and `key`.
        perceptual: adds its distance under its own name ("epd", ...).

    Returns {"clips": [{"key", "psnr" (dB), "ssim", "flicker" (clips of 2 frames or more), ...}],
    "summary": {"psnr": {"mean", "low", "high", "count"}, ...}}. Raises ValueError where there is no clip, or where
    `reconstruct` gives another shape or values that are not finite.
    """
    rows = []
    for clip in clips:
        video = to_float(clip["video"])[None].to(device)
        result = reconstruct(video).float()
        if result.shape != video.shape:
            raise ValueError(
                f"{clip['key']}: the reconstruction is {tuple(result.shape)}, the video {tuple(video.shape)}"
            )
        if not torch.isfinite(result).all():
            raise ValueError(f"{clip['key']}: the reconstruction holds NaN or infinity")
        result = as_stored(result)
        row = {
            "key": clip["key"],
            "psnr": float(psnr(result, video).mean()),
            "ssim": float(ssim(result, video).mean()),
        }
        if video.shape[2] > 1:
            row["flicker"] = float(flicker(result, video))
        if perceptual is not None:
            row[perceptual.metric] = float(perceptual(result, video).mean())
        rows.append(row)
    if not rows:
        raise ValueError("no clips to evaluate on")
    summary = {}
    for name in rows[0].keys() - {"key"}:
        summary[name] = mean_with_interval(torch.tensor([row[name] for row in rows if name in row]))
    return {"clips": rows, "summary": dict(sorted(summary.items()))}


def as_stored(video: torch.Tensor) -> torch.Tensor:
    """Float video, clamped to [-1, 1] and rounded to the 256 levels that a file holds."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
