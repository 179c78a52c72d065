"""A discrete tokenizer made from a trained continuous one; from random weights the codes collapse first and spread slowly."""

import torch
from torch.utils.data import Dataset

from ..data.video import to_float
from ..models.tokenizer_kinds import Tokenizer, codes_images

SPREAD = 1.0  # standard deviation of what enters the quantiser: its outer values are then about as frequent as the inner ones


@torch.no_grad()
def make_discrete(model: Tokenizer, levels: list[int], dataset: Dataset, max_clips: int = 32) -> Tokenizer:
    """The same network with a quantiser of `levels` between its encoder and its decoder.

    The principal components of the latents of up to `max_clips` clips are what is quantised, the largest with the most levels;
    the decoder receives the latents that a linear fit makes of the codes. Training does the rest.

    Raises ValueError for a model that is discrete already, or for more levels than latent channels.
    """
    channels = model.config.latent_channels
    if model.fsq is not None or len(levels) > channels:
        raise ValueError(
            f"fsq_levels makes a continuous tokenizer discrete, with at most as many levels as latent channels "
            f"({channels}); got {len(levels)} for a {'continuous' if model.fsq is None else 'discrete'} one"
        )
    latents = torch.cat([_latents(model, dataset[i]["video"]) for i in range(min(max_clips, len(dataset)))])
    mean = latents.mean(0)
    values, vectors = torch.linalg.eigh((latents - mean).T.cov())
    axes = (vectors / values.clamp_min(1e-12).sqrt() * SPREAD).flip(1)[:, : len(levels)]  # [C, levels], largest first
    order = sorted(range(len(levels)), key=lambda i: -levels[i])
    axes = axes[:, torch.tensor(order).argsort()]

    settings = {**model.config, "quantizer": "fsq", "fsq_levels": tuple(levels), "latent_channels": len(levels)}
    discrete = type(model).from_config(settings | dict(latents_mean=None, latents_std=None))
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("quant_conv.", "post_quant_conv."))}
    missing, unexpected = discrete.load_state_dict(kept, strict=False)
    if unexpected or any(not k.startswith(("quant_conv.", "post_quant_conv.")) for k in missing):
        raise ValueError(f"weights do not fit the discrete model: {missing + unexpected}")

    codes = discrete.fsq((latents - mean) @ axes)[0]
    back = torch.linalg.lstsq(
        torch.cat([codes, torch.ones_like(codes[:, :1])], 1), latents
    ).solution  # [levels + 1, C]
    _set(discrete.quant_conv, axes.T @ _matrix(model.quant_conv), axes.T @ (model.quant_conv.bias - mean))
    after = _matrix(model.post_quant_conv)
    _set(discrete.post_quant_conv, after @ back[:-1].T, after @ back[-1] + model.post_quant_conv.bias)
    return discrete


def _latents(model: Tokenizer, video: torch.Tensor) -> torch.Tensor:
    """uint8 [3, T, H, W] -> latents [positions, C]."""
    pixels = to_float(video)[None].to(model.device)
    pixels = pixels[0].transpose(0, 1) if codes_images(model) else pixels
    return model.encode(pixels).latents.movedim(1, -1).flatten(0, -2).float()


def _matrix(convolution) -> torch.Tensor:
    return convolution.weight.flatten(1)


def _set(convolution, weight: torch.Tensor, bias: torch.Tensor):
    convolution.weight.copy_(weight.view_as(convolution.weight))
    convolution.bias.copy_(bias)
