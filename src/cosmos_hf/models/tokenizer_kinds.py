"""Video and image tokenizers behind one call, for what trains and measures either."""

import torch
from torch import nn

from . import autoencoder_cosmos, autoencoder_cosmos_image
from .autoencoder_cosmos import CosmosVideoTokenizer
from .autoencoder_cosmos_image import CosmosImageTokenizer

Tokenizer = CosmosVideoTokenizer | CosmosImageTokenizer
KINDS = {
    "video": (CosmosVideoTokenizer, autoencoder_cosmos.PRESETS),
    "image": (CosmosImageTokenizer, autoencoder_cosmos_image.PRESETS),
}


def load_tokenizer(place: str) -> Tokenizer:
    """A saved video or image tokenizer, from a folder or a repository: its config tells which."""
    name = CosmosVideoTokenizer.load_config(place).get("_class_name")
    model_class = CosmosImageTokenizer if name == CosmosImageTokenizer.__name__ else CosmosVideoTokenizer
    return model_class.from_pretrained(place)


def codes_images(model: nn.Module) -> bool:
    """Whether a tokenizer (wrapped or not) is an image tokenizer."""
    return "temporal_compression" not in getattr(model, "module", model).config


def reconstruct(model: nn.Module, video: torch.Tensor, latent_noise: float = 0.0) -> torch.Tensor:
    """Video [B, 3, T, H, W] through a tokenizer and back; an image tokenizer takes its frames one by one."""
    if not codes_images(model):
        return model(video, latent_noise).sample
    frames = model(video.transpose(1, 2).flatten(0, 1), latent_noise).sample  # [B T, 3, H, W]
    return frames.unflatten(0, (video.shape[0], -1)).transpose(1, 2)
