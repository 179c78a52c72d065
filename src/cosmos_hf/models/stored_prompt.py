"""The text of a model that always gets the same one: its embedding, kept so that no text encoder is needed."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .strict_loading import StrictLoadingMixin


class CosmosStoredPrompt(StrictLoadingMixin, ModelMixin, ConfigMixin):
    """`embeds` [num_tokens, width] of one prompt, zero past its end; `text` says what it was."""

    @register_to_config
    def __init__(self, num_tokens: int = 512, width: int = 1024, text: str = ""):
        super().__init__()
        self.embeds = nn.Parameter(torch.zeros(num_tokens, width), requires_grad=False)

    @classmethod
    def of(cls, embeds: torch.Tensor, mask: torch.Tensor | None = None, text: str = "") -> "CosmosStoredPrompt":
        """From embeddings [N, D] or [1, N, D] and a mask [N] or [1, N], 0 past the text's end."""
        if embeds.ndim == 3 and len(embeds) == 1:
            embeds = embeds[0]
        if embeds.ndim != 2 or not embeds.isfinite().all():
            raise ValueError(f"a prompt's embedding must be finite and [tokens, width], got {tuple(embeds.shape)}")
        if mask is not None:
            if mask.numel() != len(embeds):
                raise ValueError(f"the mask of {len(embeds)} tokens has shape {tuple(mask.shape)}")
            embeds = embeds * mask.reshape(-1, 1).to(embeds)
        prompt = cls(*embeds.shape, text=text)
        prompt.embeds.data = embeds.detach().clone()
        return prompt
