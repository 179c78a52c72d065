"""Distances between videos: PSNR, SSIM and temporal flicker. Videos are float [B, C, T, H, W] in [-1, 1].

All raise ValueError for videos that differ in shape or are no float videos: broadcasting would give a figure anyway.
"""

import torch
import torch.nn.functional as F


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per frame: [B, C, T, H, W] twice, in [-1, 1] -> [B, T]; 100 for equal frames."""
    _check_pair(a, b)
    error = ((a.float().clamp(-1, 1) - b.float().clamp(-1, 1)) / 2).square().mean((1, 3, 4))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: torch.Tensor, b: torch.Tensor, window: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004: Gaussian window, K1 0.01, K2 0.03) per frame, mean over channels.

    [B, C, T, H, W] twice, in [-1, 1] -> [B, T]. Raises ValueError where a frame is smaller than the window.
    """
    _check_pair(a, b)
    if min(a.shape[-2:]) < window:
        raise ValueError(f"frames of {tuple(a.shape[-2:])} are smaller than the window of {window}")
    batch, channels, frames = a.shape[:3]
    x, y = (
        (v.float().clamp(-1, 1) / 2 + 0.5).transpose(1, 2).flatten(0, 2)[:, None] for v in (a, b)
    )  # [B T C, 1, H, W]
    offsets = torch.arange(window, device=a.device) - window // 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum()

    def blur(v):
        return F.conv2d(F.conv2d(v, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    score = score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean((1, 2, 3)).view(batch, frames, channels).mean(2)


def flicker(generated: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the frame-to-frame change, [B, C, T, H, W] twice -> [B]; 0 for equal motion. In [0, 4].

    Raises ValueError for a single frame, which has no change.
    """
    _check_pair(generated, truth)
    if generated.shape[2] < 2:
        raise ValueError("flicker needs at least 2 frames")
    return (generated.float().diff(dim=2) - truth.float().diff(dim=2)).abs().mean((1, 2, 3, 4))


def bootstrap_interval(
    values: torch.Tensor, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the mean of values [N] by resampling; ValueError for no values or values that are no numbers."""
    if values.ndim != 1 or not len(values) or not torch.isfinite(values).all():
        raise ValueError(f"values must be finite numbers [N], N > 0, got {tuple(values.shape)}")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (samples, len(values)), generator=generator)
    means = values.double()[picks].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.double))
    return float(low), float(high)


def mean_with_interval(values: torch.Tensor) -> dict[str, float | int]:
    """Values [N] of N clips -> {"mean", "low", "high" (95 %, over clips), "count"}, ready for JSON."""
    low, high = bootstrap_interval(values)
    return {"mean": float(values.double().mean()), "low": low, "high": high, "count": len(values)}


def _check_pair(a: torch.Tensor, b: torch.Tensor):
    if a.shape != b.shape or a.ndim != 5 or not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(
            "need two float videos [B, C, T, H, W] of one shape, in [-1, 1], "
            f"got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
