"""Training of a diffusion decoder (arXiv 2501.03575, section 5.2.5): codes of a discrete tokenizer to latents of a continuous one.

Both tokenizers code the same windows of the same clips, once (`cache`); the loss is that of any diffusion model here
(`diffusion`), with the codes as its condition, which a share of the samples does not see.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..conditioning.codes import CodeGrid
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.dit_conditions import extend_conditions
from ..models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from ..schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from .cache import LatentDataset
from .diffusion import (
    DiffusionConfig,
    DiffusionLoss,
    Texts,
    WorldModel,
    build_datasets,
    build_uncertainty,
    validate,
)

EMBEDDING_WIDTH = 32  # of a code, where a network is given codes for the first time; the published one's


@dataclass
class DecoderConfig(DiffusionConfig):
    family: str = field(default="decoder", metadata={"help": "diffusion decoder"})
    vae: str = field(default="", metadata={"help": "folder of the continuous video tokenizer"})
    codes: str = field(default="", metadata={"help": "folder of the discrete video tokenizer"})
    num_frames: int = field(default=57, metadata={"help": "length of a cached window in pixel frames"})
    window_latent_frames: int = field(
        default=0,
        metadata={
            "help": "train on so many latent frames, cut anywhere from a cached window; 0: the whole of it, which begins with a "
            "latent frame of a single pixel frame"
        },
    )
    condition_dropout: float = field(default=0.2, metadata={"help": "share of samples that see no codes (all ids 0)"})
    num_inference_steps: int = field(default=15, metadata={"help": "written into the exported pipeline"})
    guidance_scale: float = field(default=1.8, metadata={"help": "written into the exported pipeline"})

    def __post_init__(self):
        super().__post_init__()
        if self.train_text_encoder:
            raise ValueError(
                "a diffusion decoder trains no text encoder: give the folder of a frozen text_encoder, or none"
            )
        if not self.vae or not self.codes:
            raise ValueError("give both tokenizers: vae, the continuous one, and codes, the discrete one")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}")
        if self.num_frames < 2:
            raise ValueError(f"num_frames must be more than one, which is no video; got {self.num_frames}")
        if self.window_latent_frames == 1 or self.window_latent_frames < 0:
            raise ValueError(
                f"window_latent_frames must be 0 (the whole window) or at least 2, got {self.window_latent_frames}"
            )

    def check_text(self):
        """Text is no must here."""
        if self.new_text:
            raise ValueError(
                "new_text is for world models with a text encoder of their own; a decoder reads a frozen one's text"
            )

    @property
    def has_text(self) -> bool:
        return bool(self.text_encoder)


# ---- what is trained ------------------------------------------------------------------------------------------------


def load_tokenizers(config: DecoderConfig) -> tuple[CosmosVideoTokenizer, CosmosVideoTokenizer, CodeGrid]:
    """(continuous, discrete, how their grids lie over each other); ValueError where they are no pair."""
    vae, codes = (CosmosVideoTokenizer.from_pretrained(folder) for folder in (config.vae, config.codes))
    if vae.fsq is not None or codes.fsq is None:
        raise ValueError(
            f"vae must be a continuous tokenizer and codes a discrete one; {config.vae} is "
            f"{'continuous' if vae.fsq is None else 'discrete'}, {config.codes} "
            f"{'continuous' if codes.fsq is None else 'discrete'}"
        )
    compressions = ((t.config.temporal_compression, t.config.spatial_compression) for t in (codes, vae))
    return vae, codes, CodeGrid.of(*compressions)


def build_model(config: DecoderConfig, codebook_size: int | None = None) -> WorldModel:
    """From `init_from` (the folder of a decoder, or of a text-to-world pipeline, which is given codes) or with random weights."""
    if config.init_from:
        transformer = CosmosWorldTransformer3D.from_pretrained(Path(config.init_from) / "transformer")
        if "condition" not in transformer.conditions and codebook_size is not None:
            extend_conditions(transformer, condition_channels=EMBEDDING_WIDTH, condition_vocab_size=codebook_size)
    elif "condition_vocab_size" in PRESETS.get(config.preset, ()):
        settings = dict(PRESETS[config.preset])
        settings["condition_vocab_size"] = codebook_size or settings["condition_vocab_size"]
        transformer = CosmosWorldTransformer3D(**settings)
    else:
        known = [name for name, settings in PRESETS.items() if "condition_vocab_size" in settings]
        raise ValueError(f"no preset of a diffusion decoder is called {config.preset!r}; there is {', '.join(known)}")
    if codebook_size is not None and transformer.conditions != ("condition",):
        raise ValueError(
            f"the model in {config.init_from} takes {', '.join(transformer.conditions)}: a diffusion decoder takes codes only"
        )
    if codebook_size not in (None, transformer.config.condition_vocab_size):
        raise ValueError(
            f"the discrete tokenizer has {codebook_size} codes, the model in {config.init_from} knows "
            f"{transformer.config.condition_vocab_size} (condition_vocab_size)"
        )
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return WorldModel(transformer, None, build_uncertainty(config))


def build_scheduler(config: DecoderConfig) -> CosmosEDMScheduler:
    """Noise of training as everywhere; sampling by the published decoder's Euler steps from 80 to 0.02."""
    noise = dict(p_mean=config.p_mean, p_std=config.p_std, scale_noise_by_frames=config.scale_noise_by_frames)
    return CosmosEDMScheduler(sigma_min=0.02, solver="euler", **noise)


# ---- data ---------------------------------------------------------------------------------------------------------


class PairedDataset(Dataset):
    """Windows of clips by both tokenizers. A sample: `latents` float32 [C, T, H, W], `condition` int64 [1, T, H', W'], `fps`,
    `caption`, `key`.

    Args:
        latents, codes: the same windows of the same clips.
        grid: how their grids lie over each other.
        frames: latent frames of a sample, cut anywhere (by the sampler's draw); 0 is all.
    """

    def __init__(self, latents: LatentDataset, codes: LatentDataset, grid: CodeGrid, frames: int = 0):
        names = [[[path.name for path, *_ in clip] for clip in part.windows] for part in (latents, codes)]
        if names[0] != names[1]:
            raise ValueError(
                "the two tokenizers did not code the same windows: a clip is broken for one of them only (the log names it)"
            )
        self.latents, self.codes, self.grid, self.frames = latents, codes, grid, frames
        self.captions = latents.captions
        if len(latents):
            self[0]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def kinds(self) -> list:
        return self.latents.kinds

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        sample = {**self.codes[index], **self.latents[index]}
        latents, condition = sample["latents"], self.grid.spread(sample.pop("indices"))[None]
        expected = self.grid.spatial * condition.shape[2], self.grid.spatial * condition.shape[3]
        if condition.shape[1] != latents.shape[1] or expected != tuple(latents.shape[2:]):
            raise ValueError(
                f"the codes of {sample['key']!r} are {tuple(condition.shape[1:])} over latents {tuple(latents.shape[1:])}: "
                f"they do not cover the same pixels"
            )
        if self.frames:
            room = latents.shape[1] - self.frames
            if room < 0:
                raise ValueError(
                    f"window_latent_frames={self.frames}, but num_frames are {latents.shape[1]} latent frames only"
                )
            draw = index[1] if isinstance(index, tuple) else 0
            start = int(np.random.default_rng([draw, 1]).integers(room + 1)) if self.latents.random else 0
            latents, condition = (part[:, start : start + self.frames] for part in (latents, condition))
        return sample | dict(latents=latents, condition=condition)


def build_pairs(
    config: DecoderConfig, vae: CosmosVideoTokenizer, codes: CosmosVideoTokenizer, grid: CodeGrid
) -> tuple[PairedDataset, dict[str, PairedDataset]]:
    """Training data, and every validation set by name; coded by both tokenizers and kept under `cache_dir`."""
    latents, of_validation = build_datasets(config, vae, config.has_text)
    indices, others = build_datasets(replace(config, vae=config.codes), codes, config.has_text)
    pair = lambda a, b: PairedDataset(a, b, grid, config.window_latent_frames)  # noqa: E731
    return pair(latents, indices), {name: pair(part, others[name]) for name, part in of_validation.items()}


class PairBatches:
    """Samples -> what `DiffusionLoss` takes, with `condition` [B, 1, T, H', W']; text is one zero vector where there is none."""

    def __init__(self, config: DecoderConfig, texts: Texts | None, text_width: int):
        self.config, self.texts, self.text_width = config, texts, text_width

    def collate(self, samples: list[dict]) -> dict:
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("latents", "condition")}
        batch["fps"] = torch.tensor([sample["fps"] for sample in samples])
        if self.texts is None:
            batch["text"] = torch.zeros(len(samples), 1, self.text_width)
        else:
            batch["text"] = self.texts.encode([sample["caption"] for sample in samples])
        return batch


class _WrongCodes:
    """Batches whose samples have each other's codes."""

    def __init__(self, batches: PairBatches):
        self.batches = batches

    def collate(self, samples: list[dict]) -> dict:
        batch = self.batches.collate(samples)
        return batch | {"condition": batch["condition"].roll(1, 0)}


# ---- loss ---------------------------------------------------------------------------------------------------------


class DecoderLoss(DiffusionLoss):
    """`compute_loss` of `fit`: the denoising error, with all ids 0 for the samples that see no codes."""

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        condition = batch["condition"]
        keep = torch.rand(len(condition), 1, 1, 1, 1, device=condition.device) >= self.config.condition_dropout
        return super().__call__(model, batch | {"condition": torch.where(keep, condition, 0)})


def validate_decoder(
    model: WorldModel, loss: DecoderLoss, batches: PairBatches, datasets: dict[str, PairedDataset], batch_size: int
) -> dict:
    """Denoising error on every validation set, and the same with the codes of other clips: how much the codes tell."""
    right = validate(model, loss, batches, datasets, batch_size)
    wrong = validate(model, loss, _WrongCodes(batches), datasets, max(2, batch_size))
    name = lambda key: key.removesuffix("_given0")  # noqa: E731
    return {name(k): v for k, v in right.items()} | {f"{name(k)}_wrong_codes": v for k, v in wrong.items()}
