"""Conditioning on frames (video-to-world, arXiv 2501.03575, section 5.1.3): which latent frames are given, and with what noise.

Axes: B batch, C channels, T latent frames, H and W latent height and width.
"""

from dataclasses import dataclass

import torch


def condition_indicator(
    latent_frames: int, num_condition_frames: int | torch.Tensor, device: torch.device | str | None = None
) -> torch.Tensor:
    """1 on the first frames: [1, 1, T, 1, 1] for a count, [B, 1, T, 1, 1] for counts [B]; counts are latent frames.

    With counts [B, V] the T frames are those of V views, one view after the other, each with its own count.
    Raises ValueError for a count outside 0..latent_frames, of a view's frames where there are several.
    """
    counts = torch.as_tensor(num_condition_frames, device=device)
    if counts.ndim == 2:
        batch, views = counts.shape
        if latent_frames % views:
            raise ValueError(f"the {latent_frames} latent frames must be a multiple of the {views} views")
        return condition_indicator(latent_frames // views, counts.flatten()).reshape(batch, 1, latent_frames, 1, 1)
    counts = counts.reshape(-1, 1)
    if counts.min() < 0 or counts.max() > latent_frames:
        raise ValueError(
            f"num_condition_frames must be between 0 and the clip's {latent_frames} latent frames, "
            f"got {counts.flatten().tolist()}"
        )
    indicator = torch.arange(latent_frames, device=counts.device) < counts  # [B, T]
    return indicator.float()[:, None, :, None, None]


def condition_mask(indicator: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The indicator [B, 1, T, 1, 1] as the network's mask channel [B, 1, T, H, W]."""
    return indicator.expand(-1, -1, -1, height, width)


@dataclass
class FrameCondition:
    """Frames that are given, as `CosmosEDMScheduler.denoise` takes them.

    Attributes:
        latents: clean latents [B, C, T, H, W]; only the indicated frames are read.
        indicator: [B or 1, 1, T, 1, 1], 1 on the given frames.
        augment_sigma: noise on the given frames as the network sees them, a number or [B]. 0.001 at inference.
        augment_noise: unit noise [B, C, T, H, W]; one draw serves all steps of a sampling run.
        release: whether given frames that carry no less noise than the sample (augment_sigma >= sigma) are denoised like
            the others, as the published sampler does; training keeps them whatever sigma is.
    """

    latents: torch.Tensor
    indicator: torch.Tensor
    augment_sigma: float | torch.Tensor
    augment_noise: torch.Tensor
    release: bool = True

    def __post_init__(self):
        batch, _, frames = self.latents.shape[:3]
        if self.augment_noise.shape != self.latents.shape:
            raise ValueError(
                f"augment_noise must have the shape of latents {tuple(self.latents.shape)}, "
                f"got {tuple(self.augment_noise.shape)}"
            )
        if self.indicator.shape not in ((batch, 1, frames, 1, 1), (1, 1, frames, 1, 1)):
            raise ValueError(f"indicator must be [{batch} or 1, 1, {frames}, 1, 1], got {tuple(self.indicator.shape)}")
