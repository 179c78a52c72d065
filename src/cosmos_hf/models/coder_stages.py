"""The order in which an encoder or a decoder of the tokenizers runs its parts; what the parts are, image and video layers say.

`stream` stands for the state of a video that is coded chunk by chunk; the layers of images take none.
"""

import torch
from torch import nn


class Level(nn.Module):
    """Residual blocks, each followed by its attention where there is one, and a resampling module or none."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def forward(self, x: torch.Tensor, *stream) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, *stream)
            if self.attentions:
                x = self.attentions[i](x, *stream)
        return x if self.resample is None else self.resample(x, *stream)


class Middle(nn.Module):
    """The bottleneck: attention between two residual blocks."""

    def __init__(self, block_1: nn.Module, attention: nn.Module, block_2: nn.Module):
        super().__init__()
        self.block_1 = block_1
        self.attention = attention
        self.block_2 = block_2

    def forward(self, x: torch.Tensor, *stream) -> torch.Tensor:
        return self.block_2(self.attention(self.block_1(x, *stream), *stream), *stream)


class Coder(nn.Module):
    """What encoders and decoders share: the run of `conv_in` and the stages after it."""

    gradient_checkpointing = False

    def _run(self, stages, x: torch.Tensor, *stream) -> torch.Tensor:
        whole_clip = all(state is None for state in stream)
        x = self.conv_in(x, *stream)
        for stage in stages:
            if self.gradient_checkpointing and torch.is_grad_enabled() and whole_clip:
                x = self._gradient_checkpointing_func(stage, x)
            else:
                x = stage(x, *stream)
        return x
