"""Reconstruction losses of the tokenizers (arXiv 2501.03575, section 3.2).

The paper's first stage takes L1 and a perceptual loss on VGG-19 features, its second an optical-flow loss and a Gram loss;
an adversarial loss fine-tunes the largest compressions (`adversarial`). Here the features are EfficientNet's, or VGG-16's
where its weights are given (`evaluation.perceptual`). The flow loss needs RAFT in the paper; here the error is warped along
the flow of the true frames, by an estimator that can be exchanged (`evaluation.optical_flow`). A cheaper term without flow,
the L1 error of frame differences (`temporal_weight`), penalises flicker, too, but takes moving things for flicker.
"""

import torch
from torch import nn

from ..data.video import to_float
from ..evaluation.codes import CodeUsage
from ..evaluation.optical_flow import load_estimator, warp_error
from ..evaluation.perceptual import PerceptualDistance
from ..models.tokenizer_kinds import codes_images, reconstruct
from .config import TokenizerConfig


class ReconstructionLoss:
    """`compute_loss` of `fit` for tokenizers.

    Perceptual, Gram and flow terms are computed on a few random frames of each clip, since they cost more than the tokenizer
    itself where that is small. With `codes`, which counts a discrete tokenizer's codes (`watch_codes`), the logs tell how its
    codebook is used.
    """

    def __init__(self, config: TokenizerConfig, codes: CodeUsage | None = None):
        self.config, self.codes = config, codes
        self.distance = None
        if config.perceptual_weight or config.gram_weight:
            self.distance = PerceptualDistance(
                config.perceptual_backbone, config.vgg_weights or None, config.lpips_weights or None
            )
        self.estimator = load_estimator(config.flow_estimator) if config.flow_weight else None

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        video = self.draw(batch, only_images=codes_images(model))
        loss, logs = self.compare(reconstruct(model, video, self.config.latent_noise), video)
        return loss, logs | self.code_figures()

    def draw(self, batch: dict, only_images: bool = False) -> torch.Tensor:
        """The clips, or with the probability `image_share` images: the joint training of the paper.

        The images are the batch's `pictures` [B, n, 3, H, W] where there are such, else frames of the clips.
        """
        config, video = self.config, batch["video"]
        wanted = config.image_share > 0 and torch.rand(()).item() < config.image_share
        if not wanted and not only_images:
            return to_float(video)
        if "pictures" in batch:
            pictures = batch["pictures"].flatten(0, 1)
        else:
            frames = torch.randperm(video.shape[2])[: config.images_per_clip].to(video.device)
            pictures = video[:, :, frames].transpose(1, 2).flatten(0, 1)
        return to_float(pictures.unsqueeze(2))  # [B n, 3, 1, H, W]

    def compare(self, result: torch.Tensor, video: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Two videos [B, 3, T, H, W] -> (weighted sum, each term by name)."""
        config, error = self.config, result - video
        terms = {"l1": error.abs().mean(), "l2": error.square().mean()}
        if config.temporal_weight:
            # An image has no differences; the term is then zero, and its gradient too.
            terms["temporal"] = error.diff(dim=2).abs().sum() / max(1, error[:, :, 1:].numel())
        if self.estimator is not None:
            terms["flow"] = self._flow(error, video)
        if self.distance is not None:
            self.distance.to(video.device)
            frames = torch.randperm(video.shape[2])[: config.perceptual_frames].to(video.device)
            distance, gram = self.distance.losses(result[:, :, frames], video[:, :, frames])
            terms["perceptual"], terms["gram"] = distance.mean(), gram.mean()
        loss = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
        logs = {name: value.detach() for name, value in terms.items()}
        return loss, logs | {"psnr": -10 * torch.log10(logs.pop("l2") / 4)}

    def _flow(self, error: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        """Warp error of a stretch of `flow_frames` frames; zero, with a gradient of zero, for images."""
        length = min(self.config.flow_frames, video.shape[2])
        if length < 2:
            return (error * 0).sum()
        start = int(torch.randint(video.shape[2] - length + 1, ()))
        stretch = slice(start, start + length)
        return warp_error(error[:, :, stretch], video[:, :, stretch], self.estimator)

    def code_figures(self) -> dict[str, float]:
        return self.codes.figures() if self.codes is not None and self.codes.total else {}
