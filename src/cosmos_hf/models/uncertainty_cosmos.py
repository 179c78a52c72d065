"""The learned uncertainty of the denoising loss by noise level (EDM2, arXiv 2312.02696, section 3.1); used in training only."""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .strict_loading import StrictLoadingMixin


class UncertaintyHead(StrictLoadingMixin, ModelMixin, ConfigMixin):
    """u(c_noise) = w . sqrt(2) cos(freqs * c_noise + phases): random Fourier features that stay fixed, and one linear map.

    It starts at u = 0, the plain weighted loss.

    Args:
        num_features: number of Fourier features.
    """

    @register_to_config
    def __init__(self, num_features: int = 128):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_features))
        self.linear = nn.Linear(num_features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """c_noise [B] -> log variance [B], float32."""
        features = math.sqrt(2) * (timestep.float()[:, None] * self.freqs.float() + self.phases.float()).cos()
        return self.linear(features.to(self.linear.weight.dtype)).float().squeeze(1)
