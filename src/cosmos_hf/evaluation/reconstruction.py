"""How well a video comes back from a tokenizer (arXiv 2501.03575, section 3.3): PSNR, SSIM, flicker, a perceptual distance, and
Frechet distances, after a check that every frame came back in its place."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from ..data.video import to_float
from .frechet import FeatureExtractor, FrechetPair
from .metrics import flicker, mean_with_interval, psnr, ssim
from .perceptual import PerceptualDistance

MOST_OFFSET = 2  # frames earlier or later that a shifted reconstruction is looked for
CLEARLY_BETTER = 0.9  # squared error at another frame, as a share of that at its own, that counts as a shift


@torch.no_grad()
def evaluate_reconstruction(
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    clips: Iterable[dict],
    perceptual: PerceptualDistance | None = None,
    device: str | torch.device = "cpu",
    extractors: Sequence[FeatureExtractor] = (),
    allow_shift: bool = False,
) -> dict:
    """Figures of each clip and their means with 95 % bootstrap intervals over clips, as a dict ready for JSON.

    Args:
        reconstruct: video float [1, 3, T, H, W] in [-1, 1] -> the same shape, for example
            `lambda video: tokenizer(video).sample`. The result is rounded to 8 bits first, as a file would.
        clips: samples with `video` uint8 [3, T, H, W] and `key`.
        perceptual: adds its distance under its own name ("epd", ...).
        extractors: adds the Frechet distance between all results and all clips under each one's name ("efd", "fid", "fvd").
        allow_shift: report shifted frames instead of refusing them.

    Returns {"clips": [{"key", "psnr" (dB), "ssim", "flicker" (2 frames or more), "frame_offset" (3 or more), ...}],
    "summary": {"psnr": {"mean", "low", "high", "count"}, ...}, "alignment": {offset: number of clips}, and with extractors
    "frechet": {"efd": {"distance", "count", "features"}, ...}}. Raises ValueError where there is no clip, where `reconstruct`
    gives another shape or values that are not finite, or where over all clips its frames fit those before or after better
    than their own.
    """
    rows, errors, pairs = [], Counter(), [FrechetPair(extractor) for extractor in extractors]
    for clip in clips:
        video = to_float(clip["video"])[None].to(device)
        result = _checked(reconstruct(video), video, clip["key"])
        row = {
            "key": clip["key"],
            "psnr": float(psnr(result, video).mean()),
            "ssim": float(ssim(result, video).mean()),
        }
        if video.shape[2] > 1:
            row["flicker"] = float(flicker(result, video))
        if video.shape[2] > 2:
            found = offset_errors(result, video)
            errors.update(found)
            row["frame_offset"] = _best_offset(found)
        if perceptual is not None:
            row[perceptual.metric] = float(perceptual(result, video).mean())
        for pair in pairs:
            pair.update(result, video)
        rows.append(row)
    if not rows:
        raise ValueError("no clips to evaluate on")
    if errors and not allow_shift:
        _refuse_shift(errors)
    report = {"clips": rows, "summary": _summary(rows)}
    offsets = Counter(row["frame_offset"] for row in rows if "frame_offset" in row)
    report["alignment"] = {str(offset): offsets[offset] for offset in sorted(offsets)}
    if pairs:
        report["frechet"] = {pair.metric: pair.figures() for pair in pairs}
    return report


def offset_errors(result: torch.Tensor, truth: torch.Tensor) -> dict[int, float]:
    """Mean squared error of result(t) against truth(t + k) for every offset k up to `MOST_OFFSET`, over the same frames t.

    [B, C, T, H, W] twice, T >= 3. A result that lags by one frame has its least error at k = -1.
    """
    length = truth.shape[2]
    most = min(MOST_OFFSET, (length - 1) // 2)
    middle = result[:, :, most : length - most]
    return {
        k: float((middle - truth[:, :, most + k : length - most + k]).square().mean()) for k in range(-most, most + 1)
    }


def as_stored(video: torch.Tensor) -> torch.Tensor:
    """Float video, clamped to [-1, 1] and rounded to the 256 levels that a file holds."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _checked(result: torch.Tensor, video: torch.Tensor, key: str) -> torch.Tensor:
    if result.shape != video.shape:
        raise ValueError(f"{key}: the reconstruction is {tuple(result.shape)}, the video {tuple(video.shape)}")
    if not torch.isfinite(result).all():
        raise ValueError(f"{key}: the reconstruction holds NaN or infinity")
    return as_stored(result.float())


def _best_offset(errors: dict[int, float]) -> int:
    """0 unless another offset is clearly better: a clip that does not move fits everywhere."""
    best = min(errors, key=errors.get)
    return best if errors[best] < CLEARLY_BETTER * errors[0] else 0


def _refuse_shift(errors: dict[int, float]):
    best = _best_offset(errors)
    if best:
        raise ValueError(
            f"over all clips, frame t of the reconstruction fits frame t {best:+d} of the video better than frame t (squared "
            f"error {errors[best] / errors[0]:.2f} times as large): its frames are shifted, or it does not follow the motion. "
            "allow_shift=True reports the figures all the same"
        )


def _summary(rows: list[dict]) -> dict:
    names = sorted({name for row in rows for name in row} - {"key", "frame_offset"})
    return {name: mean_with_interval(torch.tensor([row[name] for row in rows if name in row])) for name in names}
