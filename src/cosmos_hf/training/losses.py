"""Reconstruction losses of the video tokenizers (arXiv 2501.03575, section 3.2).

The paper's first stage takes L1 and a perceptual loss on VGG-19 features, its second an optical-flow loss and a Gram loss;
an adversarial loss fine-tunes the largest compressions (`adversarial`). Here the features are EfficientNet's, or VGG-16's
where its weights are given (`evaluation.perceptual`). The flow loss needs RAFT, which this package does not have; in its
place stands the L1 error of frame differences, which also penalises flicker and wrong motion but follows no motion path.
"""

import torch
from torch import nn

from ..data.video import to_float
from ..evaluation.perceptual import PerceptualDistance
from .config import TokenizerConfig


class ReconstructionLoss:
    """`compute_loss` of `fit` for tokenizers.

    Perceptual and Gram terms are computed on `perceptual_frames` random frames of each clip, since they cost more than the
    tokenizer itself where that is small.
    """

    def __init__(self, config: TokenizerConfig):
        self.config = config
        self.distance = None
        if config.perceptual_weight or config.gram_weight:
            self.distance = PerceptualDistance(
                config.perceptual_backbone, config.vgg_weights or None, config.lpips_weights or None
            )

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        video = self.draw(to_float(batch["video"]))
        return self.compare(model(video).sample, video)

    def draw(self, video: torch.Tensor) -> torch.Tensor:
        """The clips, or with the probability `image_share` some of their frames as images: the joint training of the paper."""
        config = self.config
        if not config.image_share or torch.rand(()).item() >= config.image_share:
            return video
        frames = torch.randperm(video.shape[2])[: config.images_per_clip].to(video.device)
        return video[:, :, frames].transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [B n, 3, 1, H, W]

    def compare(self, result: torch.Tensor, video: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Two videos [B, 3, T, H, W] -> (weighted sum, each term by name)."""
        config, error = self.config, result - video
        terms = {"l1": error.abs().mean(), "l2": error.square().mean()}
        if config.temporal_weight:
            # An image has no differences; the term is then zero, and its gradient too.
            terms["temporal"] = error.diff(dim=2).abs().sum() / max(1, error[:, :, 1:].numel())
        if self.distance is not None:
            self.distance.to(video.device)
            frames = torch.randperm(video.shape[2])[: config.perceptual_frames].to(video.device)
            distance, gram = self.distance.losses(result[:, :, frames], video[:, :, frames])
            terms["perceptual"], terms["gram"] = distance.mean(), gram.mean()
        loss = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
        logs = {name: value.detach() for name, value in terms.items()}
        return loss, logs | {"psnr": -10 * torch.log10(logs.pop("l2") / 4)}
