"""How close predicted futures come to what happened: per frame, next to still pictures, and where the moving things are.

The masks of a generated video are not known. They are estimated from appearance, with the true clip's static background
(the "plate"): foreground is what differs from the plate in more than brightness, so that shadows do not count. The
estimate is imperfect, therefore the true video itself is scored too: its IoU is the ceiling that a perfect prediction
would reach. With the simulator's masks as reference, on 17 frames of the table-top's validation sets (5 clips of each), the
ceiling is 0.68 to 0.76, at most 0.015 lower after noise of 30 dB, and a copied last frame has 0.06 to 0.17.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from .metrics import mean_with_interval, psnr, ssim

# Found on clips of the table-top world: highest IoU with the simulator's masks, also for noisy and for blurred videos.
COLOUR_CHANGE = 0.08  # of the range [0, 1] times 2
SHADE = (0.6, 1.6)  # a surface may get this much darker or brighter and still be the same surface
MIN_VIEWS = 3  # frames in which a pixel of the background must be seen to be known


def background_plate(video: torch.Tensor, masks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The static background of a clip from a resting camera.

    Args:
        video: float [B, 3, T, H, W] in [-1, 1].
        masks: [B, T, H, W], 0 for background. With them the plate is the median over the frames in which a pixel and its
            neighbours are background. Without them it is the median over all frames, and holds what rests most of the time.

    Returns (plate [B, 3, 1, H, W], known bool [B, 1, H, W]); unknown pixels are left out of every mask.
    """
    if masks is None:
        known = torch.ones_like(video[:, 0, :1], dtype=torch.bool)
        return video.median(2, keepdim=True).values, known
    if masks.shape != video[:, 0].shape:
        raise ValueError(f"masks {tuple(masks.shape)} do not fit a video of {tuple(video.shape)}")
    near = F.max_pool2d((masks > 0).float(), 3, 1, 1) > 0
    seen = video.masked_fill(near[:, None], float("nan"))
    known = (~near).sum(1, keepdim=True) >= MIN_VIEWS
    plate = seen.nanmedian(2, keepdim=True).values
    return torch.where(known[:, None], plate, 0.0), known


def estimate_foreground(video: torch.Tensor, plate: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Pixels of [B, 3, T, H, W] that differ from the plate in more than brightness -> bool [B, T, H, W].

    A pixel (mean of 3x3) is compared with the plate's times the factor k, within `SHADE`, that fits best.
    """
    v, g = (_smooth(x) / 2 + 0.5 for x in (video, plate))  # [B, 3, T, H, W] and [B, 3, 1, H, W] in [0, 1]
    k = (v * g).sum(1, keepdim=True) / (g * g).sum(1, keepdim=True).clamp(min=1e-4)
    change = 2 * (v - k.clamp(*SHADE) * g).abs().amax(1)  # [B, T, H, W]
    return (change > COLOUR_CHANGE) & known


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of bool masks [B, T, H, W] -> [B, T]; NaN where both are empty."""
    return (a & b).sum((2, 3)) / (a | b).sum((2, 3)).float()


@torch.no_grad()
def score_future(
    generated: torch.Tensor, truth: torch.Tensor, num_conditioning_frames: int, masks: torch.Tensor | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """Scores of predicted frames and of still pictures in their place.

    Args:
        generated, truth: float [B, 3, T, H, W] in [-1, 1], both with the conditioning frames, which are not scored.
        num_conditioning_frames: n; for 0 there is no last frame to copy.
        masks: the simulator's [B, T, H, W] of the truth, 0 for background. Without them the truth's estimated foreground is
            the reference of `iou`.

    Returns {"model", "copy_last_frame", "mean_frame", "truth"} -> {"psnr", "ssim", "iou", each [B, T - n], "motion" [B]}.
    "mean_frame" is the mean of the *true* future: of all still pictures the one of highest PSNR, which nobody can know
    beforehand. "truth" scores the true video: the ceiling of `iou`. `motion` is the mean absolute change between predicted
    frames divided by that of the truth: 0 for a still picture, 1 for as much motion as there was (noise counts as motion).
    """
    if generated.shape != truth.shape:
        raise ValueError(f"generated {tuple(generated.shape)} and truth {tuple(truth.shape)} differ in shape")
    count = num_conditioning_frames
    if not 0 <= count < truth.shape[2]:
        raise ValueError(f"num_conditioning_frames must be in 0..{truth.shape[2] - 1}, got {count}")
    if not torch.isfinite(generated).all():
        raise ValueError("the generated video holds NaN or infinity")
    plate, known = background_plate(truth, masks)
    future = truth[:, :, count:]
    rows = {"model": generated[:, :, count:], "mean_frame": future.mean(2, keepdim=True).expand_as(future)}
    if count:
        rows["copy_last_frame"] = truth[:, :, count - 1 : count].expand_as(future)
    rows["truth"] = future
    reference = estimate_foreground(future, plate, known) if masks is None else (masks[:, count:] > 0) & known
    scores = {}
    for name, video in rows.items():
        scores[name] = {
            "psnr": psnr(video, future),
            "ssim": ssim(video, future),
            "iou": overlap(estimate_foreground(video, plate, known), reference),
            "motion": _motion(video) / _motion(future).clamp(min=1e-6),
        }
    return scores


@torch.no_grad()
def latent_l2(vae, generated: Iterable[torch.Tensor], truth: Iterable[torch.Tensor], count: int) -> dict:
    """Mean squared difference between the latents of predicted frames and those of the true ones: {"mean", "low", "high", "count"}.

    Args:
        vae: a continuous `CosmosVideoTokenizer`; its normalised latents are compared, so independent ones differ by 2.
        generated, truth: clips [3, T, H, W] in [-1, 1], with the `count` given frames, whose latent frames are left out.

    As the paper's "latent L2" of action-conditioned models (Table 23), which does not say whose latents it took. ValueError for
    different numbers of clips.
    """
    errors, start = [], vae.latent_frames(count) if count else 0
    for pair in zip(generated, truth, strict=True):
        videos = torch.stack([video.to(vae.device, vae.dtype) for video in pair])
        a, b = vae.normalize(vae.encode(videos).latents)[:, :, start:].float()
        errors.append((a - b).square().mean().cpu())
    return mean_with_interval(torch.stack(errors))


def summarise_futures(scores: list[dict[str, dict[str, torch.Tensor]]], horizons: tuple[int, ...] = (8, 16)) -> dict:
    """`score_future` of several batches -> {row: {"psnr": {"mean": {...}, "frame_8": {...}, ...}, ..., "motion": {...}}}.

    Every leaf is {"mean", "low", "high" (95 % over clips), "count"}. "mean" is over all predicted frames; "frame_k" is the
    k-th predicted one, where there are so many. Frames without foreground have no IoU and are left out of it; a row's
    "gain" is its PSNR less that of "copy_last_frame" on the same clip.
    """
    if not scores:
        raise ValueError("no scores to summarise")
    result = {}
    for row in scores[0]:
        result[row] = {}
        for metric in ("psnr", "ssim", "iou"):
            result[row][metric] = _by_horizon(torch.cat([batch[row][metric] for batch in scores]), horizons)
        result[row]["motion"] = _leaf(torch.cat([batch[row]["motion"] for batch in scores]))
        if "copy_last_frame" in scores[0] and row == "model":
            gains = torch.cat([batch[row]["psnr"] - batch["copy_last_frame"]["psnr"] for batch in scores])
            result[row]["gain"] = _by_horizon(gains, horizons)
    return result


def _by_horizon(values: torch.Tensor, horizons: tuple[int, ...]) -> dict:
    """Values [B, T] -> the mean over frames, and the k-th frame's."""
    leaves = {"mean": _leaf(values.nanmean(1))}
    for k in horizons:
        if k <= values.shape[1]:
            leaves[f"frame_{k}"] = _leaf(values[:, k - 1])
    return leaves


def _leaf(values: torch.Tensor) -> dict | None:
    values = values[torch.isfinite(values)]
    return mean_with_interval(values) if len(values) else None


def _motion(video: torch.Tensor) -> torch.Tensor:
    """Mean absolute change from frame to frame [B]; NaN for a single frame."""
    return video.diff(dim=2).abs().mean((1, 2, 3, 4))


def _smooth(video: torch.Tensor) -> torch.Tensor:
    """Mean of 3x3 pixels, the edge repeated."""
    frames = F.pad(video.transpose(1, 2).flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(frames, 3, 1).unflatten(0, (video.shape[0], -1)).transpose(1, 2)
