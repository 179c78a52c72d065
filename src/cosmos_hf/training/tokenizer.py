"""Training of tokenizers (arXiv 2501.03575, section 3.2): what to build, export, validation, statistics."""

from pathlib import Path

import torch
from torch import nn

from ..data.clips import ClipDataset
from ..data.video import to_float
from ..evaluation.codes import counting_codes
from ..evaluation.metrics import psnr, ssim
from ..models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from .checkpoints import TrainingError
from .config import TokenizerConfig
from .losses import reconstruct


def build_model(config: TokenizerConfig) -> CosmosVideoTokenizer:
    """From `init_from`, or of the size `preset` with random weights; with `freeze_encoder` only its decoder will learn."""
    if config.init_from:
        model = CosmosVideoTokenizer.from_pretrained(config.init_from)
    elif config.preset in PRESETS:
        model = CosmosVideoTokenizer(**PRESETS[config.preset])
    else:
        raise ValueError(f"unknown preset {config.preset!r}; there is {', '.join(PRESETS)}")
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.freeze_encoder:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    return model


def build_dataset(config: TokenizerConfig) -> ClipDataset:
    return ClipDataset(
        config.data,
        num_frames=config.num_frames,
        crop=(config.crop_height, config.crop_width) if config.crop_height else None,
        keep_decoded=config.keep_decoded,
        on_broken=config.on_broken,
    )


@torch.no_grad()
def export(model: nn.Module, folder: Path):
    """Save, load again and compare one reconstruction."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).to(model.device)
    side, frames = 2 * model.config.spatial_compression, 1 + model.config.get("temporal_compression", 0)
    video = torch.linspace(-1, 1, 3 * side * side, device=model.device).view(1, 3, 1, side, side)
    video = video.expand(-1, -1, frames, -1, -1)
    if not torch.allclose(reconstruct(model, video), reconstruct(again, video), atol=1e-4):
        raise TrainingError(f"the tokenizer saved to {folder} does not compute what the trained one does")


@torch.no_grad()
def validate(model: nn.Module, config: TokenizerConfig) -> dict:
    """PSNR (dB) and SSIM on the first clips of every validation set, whole frames: means over clips and frames.

    Of a discrete tokenizer also how many of its codes they use, and the entropy of the codes in bits.
    """
    figures = {}
    device = next(model.parameters()).device
    for path in config.val_data:
        clips = ClipDataset(path, num_frames=config.num_frames, random=False)
        scores, name = [], Path(path).name
        with counting_codes(model) as usage:
            for i in range(min(config.val_clips, len(clips))):
                video = to_float(clips[i]["video"])[None].to(device)
                result = reconstruct(model, video)
                scores.append(torch.stack([psnr(result, video).mean(), ssim(result, video).mean()]))
        figures[f"{name}_psnr"], figures[f"{name}_ssim"] = torch.stack(scores).mean(0).tolist()
        if usage is not None:
            used = usage.figures()
            figures |= {f"{name}_{key}": used[key] for key in ("code_usage", "code_bits")}
    return figures


@torch.no_grad()
def compute_latent_stats(
    model: CosmosVideoTokenizer, dataset: ClipDataset, max_clips: int = 512, per_frame: bool = False
):
    """Mean and standard deviation of the latents per channel (and per latent frame), written into the model's config.

    Clips must have one length. Returns (mean, std) as stored. `model.save_pretrained` keeps them.
    """
    total = square = count = 0
    for i in range(min(max_clips, len(dataset))):
        latents = (
            model.encode(to_float(dataset[i]["video"])[None].to(model.device)).latents[0].double()
        )  # [C, T', H', W']
        dims = (2, 3) if per_frame else (1, 2, 3)
        total, square = total + latents.sum(dims), square + latents.square().sum(dims)
        count += latents[0].numel() // (latents.shape[1] if per_frame else 1)
    mean = total / count
    std = (square / count - mean**2).clamp(min=1e-12).sqrt()
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return mean, std
