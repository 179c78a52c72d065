"""What the pipelines return, and the way from decoded tensors to it."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class CosmosPipelineOutput(BaseOutput):
    """Result of a pipeline.

    `frames`, by `output_type`: "pil" a list (batch) of lists (frames) of PIL images; "np" float32 [B, T, H, W, 3] in
    [0, 1]; "pt" [B, T, 3, H, W] in [0, 1]; "latent" the sampler's result [B, C, T', H', W'], that is `sigma_data` times
    the normalised latents (`vae.denormalize(latents / sigma_data)` decodes), and the codes [B, T', H', W'] of an
    autoregressive pipeline. Of several views a dict by their names.
    `fps`: frames per second that the video was generated for.
    """

    frames: torch.Tensor | np.ndarray | list[list[Image.Image]] | dict
    fps: float


def decode_latents(vae, latents: torch.Tensor, sigma_data: float, output_type: str, letterbox=None):
    """The sampler's result [B, C, T', H', W'] -> frames as `output_type` wants them.

    Items are decoded one by one: peak memory does not grow with the batch, and an item does not depend on its neighbours.
    Pixels outside `letterbox` (a `data.video.Box`) are cut away; latents keep them.
    """
    if output_type == "latent":
        return latents
    latents = vae.denormalize(latents / sigma_data).to(vae.dtype)
    video = torch.cat([vae.decode(item[None]).sample.float() for item in latents])
    if letterbox is not None:
        video = letterbox.cut(video)
    return VideoProcessor(vae_scale_factor=vae.config.spatial_compression).postprocess_video(video, output_type)


def decode_views(pipe, latents: torch.Tensor, views, output_type: str, letterbox=None):
    """As `decode_latents` with the pipeline's parts; for names in `views` a dict of what [B, C, V * T', H', W'] holds for each."""
    sigma_data = pipe.scheduler.config.sigma_data
    if not views:
        return decode_latents(pipe.vae, latents, sigma_data, output_type, letterbox)
    parts = zip(views, latents.chunk(len(views), dim=2), strict=True)
    return {name: decode_latents(pipe.vae, part, sigma_data, output_type, letterbox) for name, part in parts}


def decode_indices(vae, indices: torch.Tensor, output_type: str):
    """Codes [B, T', H', W'] -> frames as `output_type` wants them ("latent": the codes), item by item."""
    if output_type == "latent":
        return indices
    video = torch.cat([vae.decode_indices(item[None]).sample.float() for item in indices])
    return VideoProcessor(vae_scale_factor=vae.config.spatial_compression).postprocess_video(video, output_type)
