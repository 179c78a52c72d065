"""Tiny tokenizers whose weights are all random: a new model's residual branches are silent, and a test would not see them."""

import torch

from cosmos_hf.models.autoencoder_cosmos import PRESETS as VIDEO
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.autoencoder_cosmos_image import PRESETS as IMAGE
from cosmos_hf.models.autoencoder_cosmos_image import CosmosImageTokenizer

DISCRETE = dict(quantizer="fsq", latent_channels=6)


def tiny_video(**changes) -> CosmosVideoTokenizer:
    return _randomised(CosmosVideoTokenizer(**{**VIDEO["tiny"], **changes}))


def tiny_image(**changes) -> CosmosImageTokenizer:
    return _randomised(CosmosImageTokenizer(**{**IMAGE["tiny"], **changes}))


def _randomised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    return model.eval()
