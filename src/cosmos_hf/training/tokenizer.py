"""Training of tokenizers (arXiv 2501.03575, section 3.2): what to build, export, validation, statistics."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..data.clips import ClipDataset, data_names
from ..data.pictures import PictureDataset, WithPictures, find_pictures
from ..data.video import to_float
from ..evaluation.codes import counting_codes, watch_codes
from ..evaluation.metrics import psnr, ssim
from ..models.tokenizer_kinds import KINDS, Tokenizer, codes_images, load_tokenizer, reconstruct
from .checkpoints import TrainingError
from .config import TokenizerConfig
from .discretize import make_discrete
from .losses import ReconstructionLoss

CODE_WINDOW = 4  # times the codebook's size: of so many of the last codes the logs tell


def build_model(config: TokenizerConfig) -> Tokenizer:
    """From `init_from` (made discrete with `fsq_levels`), or of the size `preset` with random weights.

    With `freeze_encoder` only its decoder will learn.
    """
    if config.init_from:
        model = load_tokenizer(config.init_from)
        if config.fsq_levels:
            model = make_discrete(model, config.fsq_levels, build_whole(config, config.data))
    else:
        model_class, presets = KINDS[_kind_of(config)]
        model = model_class(**presets[config.preset])
    if config.latent_noise and model.fsq is not None:
        raise ValueError("latent_noise is for continuous tokenizers: the codes of a discrete one are exact")
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.freeze_encoder:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    return model


def _kind_of(config: TokenizerConfig) -> str:
    kinds = [kind for kind, (_, presets) in KINDS.items() if config.preset in presets and config.kind in ("", kind)]
    if not kinds:
        known = "; ".join(f"{kind}: {', '.join(presets)}" for kind, (_, presets) in KINDS.items())
        raise ValueError(f"unknown preset {config.preset!r}{f' of kind {config.kind}' * bool(config.kind)}; {known}")
    return kinds[0]


def build_loss(config: TokenizerConfig, model: Tokenizer) -> ReconstructionLoss:
    """With the codes of a discrete tokenizer counted."""
    window = CODE_WINDOW * model.fsq.codebook_size if model.fsq is not None else None
    return ReconstructionLoss(config, watch_codes(model, window, only_training=True)[0])


def build_dataset(config: TokenizerConfig) -> Dataset:
    """Clips, or pictures; with pictures beside each clip where the config names folders of them as `image_data`."""
    crop = (config.crop_height, config.crop_width) if config.crop_height else None
    if all(find_pictures(path) for path in config.data):
        if config.num_frames != 1:
            raise ValueError(f"{', '.join(config.data)} hold pictures: set num_frames to 1, not {config.num_frames}")
        return PictureDataset(config.data, crop=crop, on_broken=config.on_broken)
    how = dict(num_frames=config.num_frames, on_broken=config.on_broken, views=config.camera or None)
    clips = ClipDataset(config.data, crop=crop, keep_decoded=config.keep_decoded, **how)
    if not config.image_data:
        return clips
    return WithPictures(
        clips, PictureDataset(config.image_data, crop=crop, on_broken=config.on_broken), config.images_per_clip
    )


def build_whole(config: TokenizerConfig, path: str | list[str]) -> Dataset:
    """Whole frames in a fixed order, for figures and statistics."""
    if all(find_pictures(one) for one in ([path] if isinstance(path, str) else path)):
        return PictureDataset(path, random=False, on_broken=config.on_broken)
    how = dict(num_frames=config.num_frames, on_broken=config.on_broken, views=config.camera or None)
    return ClipDataset(path, random=False, **how)


@torch.no_grad()
def export(model: Tokenizer, folder: Path):
    """Save, load again and compare one reconstruction."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).to(model.device)
    side, frames = 2 * model.config.spatial_compression, 1 + model.config.get("temporal_compression", 0)
    video = torch.linspace(-1, 1, 3 * side * side, device=model.device).view(1, 3, 1, side, side)
    video = video.expand(-1, -1, frames, -1, -1)
    if not torch.allclose(reconstruct(model, video), reconstruct(again, video), atol=1e-4):
        raise TrainingError(f"the tokenizer saved to {folder} does not compute what the trained one does")


@torch.no_grad()
def validate(model: Tokenizer, config: TokenizerConfig) -> dict:
    """PSNR (dB) and SSIM on the first clips of every validation set, whole frames: means over clips and frames.

    Of a discrete tokenizer also how many of its codes they use, and the entropy of the codes in bits.
    """
    figures = {}
    device = next(model.parameters()).device
    for name, path in zip(data_names(config.val_data), config.val_data, strict=True):
        clips, scores = build_whole(config, path), []
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
def compute_latent_stats(model: Tokenizer, dataset: Dataset, max_clips: int = 512, per_frame: bool = False):
    """Mean and standard deviation of the latents per channel (and per latent frame), written into the model's config.

    Clips must have one length. Returns (mean, std) as stored. `model.save_pretrained` keeps them.
    Raises ValueError for `per_frame` of an image tokenizer.
    """
    images = codes_images(model)
    if per_frame and images:
        raise ValueError("per_frame: the latents of an image tokenizer have no frames")
    total = square = count = 0
    for i in range(min(max_clips, len(dataset))):
        video = to_float(dataset[i]["video"])[None].to(model.device)
        if images:
            latents = model.encode(video[0].transpose(0, 1)).latents.transpose(0, 1).double()  # [C, T, H', W']
        else:
            latents = model.encode(video).latents[0].double()  # [C, T', H', W']
        dims = (2, 3) if per_frame else (1, 2, 3)
        total, square = total + latents.sum(dims), square + latents.square().sum(dims)
        count += latents[0].numel() // (latents.shape[1] if per_frame else 1)
    mean = total / count
    std = (square / count - mean**2).clamp(min=1e-12).sqrt()
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return mean, std
