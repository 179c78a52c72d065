"""Pictures of a video while it is sampled: a linear map from latents to colours, one pixel per latent position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class LatentPreview:
    """Colour = weight^T latent + bias, fitted to one tokenizer by `fit_latent_preview`.

    Attributes:
        weight: [C, 3], for latents as the sampler holds them (sigma_data times normalised). bias: [3]. Colours are in [0, 1].
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, T', H', W'] -> uint8 [B, 3, T', H', W']."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        colours = torch.einsum("bcthw,cd->bdthw", latents.float(), weight) + bias.view(3, 1, 1, 1)
        return (colours.clamp(0, 1) * 255).round().to(torch.uint8)

    def callback(self, show: Callable[[int, torch.Tensor], None], every: int = 1) -> Callable:
        """A `callback_on_step_end` that calls show(step, uint8 [B, 3, T', H', W']) with the present estimate of the result.

        Pass `callback_on_step_end_tensor_inputs=("denoised",)` along with it.
        """

        def on_step_end(pipe, step, timestep, tensors):
            if "denoised" not in tensors:
                raise ValueError('a preview needs callback_on_step_end_tensor_inputs=("denoised",)')
            if step % every == 0:
                show(step, self(tensors["denoised"]).cpu())
            return {}

        return on_step_end


@torch.no_grad()
def fit_latent_preview(vae, sigma_data: float, videos: torch.Tensor | None = None, seed: int = 0) -> LatentPreview:
    """Fit the map by least squares to a tokenizer.

    Args:
        vae: a continuous video tokenizer.
        sigma_data: of the scheduler that the latents will come from.
        videos: float [B, 3, T, H, W] in [-1, 1] to learn from; None takes smooth random colours.
    """
    factor, step = vae.config.spatial_compression, vae.config.temporal_compression
    if videos is None:
        coarse = torch.rand(6, 3, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
        size = (1 + 2 * step, 8 * factor, 8 * factor)
        videos = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True) * 2 - 1
    videos = videos.to(vae.device, vae.dtype)
    latents = torch.cat([vae.encode(video[None]).latents for video in videos]).float()
    latents = vae.normalize(latents) * sigma_data
    small = F.avg_pool3d(videos.float() / 2 + 0.5, (1, factor, factor))
    later = small[:, :, 1:].unflatten(2, (-1, step)).mean(3)  # a latent frame is the mean of the frames that it codes
    colours = torch.cat([small[:, :, :1], later], 2)
    inputs = latents.movedim(1, -1).flatten(0, 3).double().cpu()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(inputs, colours.movedim(1, -1).flatten(0, 3).double().cpu(), driver="gelsd").solution
    return LatentPreview(weight=solution[:-1].float(), bias=solution[-1].float())
