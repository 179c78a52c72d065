"""Training of diffusion world models (arXiv 2501.03575, section 5.1): what to build, the loss, validation.

Latents come from `cache`, noise and weights from `CosmosEDMScheduler`, given frames from `conditioning.frames`; this module
joins them. Text is a small T5 encoder trained along, or the cached embeddings of a frozen one.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from ..conditioning.frames import FrameCondition, condition_indicator, condition_mask
from ..data.clips import ClipDataset, data_names
from ..data.sampling import in_order
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from ..models.uncertainty_cosmos import UncertaintyHead
from ..schedulers.scheduling_edm_cosmos import CosmosEDMScheduler, with_uncertainty
from .cache import LatentDataset, cache_latents, cache_text, load_text
from .config import WindowSettings
from .devices import at_work, process_state
from .loop import TrainingError, to_device
from .text import build_text_encoder, embed_tokens, load_or_train_vocabulary, tokenize

# Edges of the noise bands that the loss is logged by, in units of sigma_data: details, shapes, layout, next to nothing left.
BANDS = (0.0, 0.5, 2.0, 8.0, float("inf"))
# What the transformer may be given of a batch besides text and frames, by the names of its arguments.
CONDITIONS = ("actions", "camera", "condition")


@dataclass
class DiffusionConfig(WindowSettings):
    family: str = field(default="diffusion", metadata={"help": "kind of world model"})
    vae: str = field(default="", metadata={"help": "folder of the continuous video tokenizer"})
    num_frames: int = field(
        default=17, metadata={"help": "length of a window in pixel frames, 1 + k * the tokenizer's"}
    )
    train_text_encoder: bool = field(default=False, metadata={"help": "train a small T5 encoder and vocabulary along"})
    text_preset: str = field(default="nano", metadata={"help": "its size: a name in TEXT_PRESETS"})
    vocab_size: int = 1024
    new_text: bool = field(
        default=False,
        metadata={"help": "with init_from: a new vocabulary and text encoder, for captions of other worlds"},
    )
    text_encoder: str = field(default="", metadata={"help": "else: folder with text_encoder/ and tokenizer/, frozen"})
    max_sequence_length: int = field(
        default=512, metadata={"help": "text tokens; shorter texts are padded with zeros"}
    )
    text_dropout: float = field(default=0.2, metadata={"help": "share of samples that see no text"})
    min_condition_frames: int = field(default=0, metadata={"help": "latent frames given: uniform from this on"})
    max_condition_frames: int = field(default=2, metadata={"help": "latent frames given: uniform up to this"})
    learned_uncertainty: bool = True
    p_mean: float = field(default=0.0, metadata={"help": "mean of ln(sigma)"})
    p_std: float = 1.0
    scale_noise_by_frames: bool = field(default=False, metadata={"help": "sigma times sqrt(latent frames)"})
    num_inference_steps: int = field(default=35, metadata={"help": "written into the exported pipeline"})
    guidance_scale: float = field(default=7.0, metadata={"help": "written into the exported pipeline"})

    def __post_init__(self):
        super().__post_init__()
        expected = type(self).__dataclass_fields__["family"].default
        if self.family != expected:
            raise ValueError(f"family must be {expected}, got {self.family!r}")
        self.check_text()
        if not 0 <= self.text_dropout < 1:
            raise ValueError(f"text_dropout must be in [0, 1), got {self.text_dropout}")
        if not 0 <= self.min_condition_frames <= self.max_condition_frames:
            raise ValueError(
                f"min_condition_frames must be in 0..max_condition_frames, got {self.min_condition_frames} of "
                f"{self.max_condition_frames}"
            )

    def check_text(self):
        if self.train_text_encoder == bool(self.text_encoder):
            raise ValueError("give either train_text_encoder: true or the folder of a frozen text_encoder")
        if self.new_text and not (self.train_text_encoder and self.init_from):
            raise ValueError(
                "new_text replaces the trained text encoder of a base: give init_from and train_text_encoder"
            )


class WorldModel(nn.Module):
    """All that a run trains, as one module: the transformer, and where there are such the text encoder and the uncertainty.

    A container, so that one `forward` goes through accelerate's wrappers; each part is saved on its own.
    """

    def __init__(
        self,
        transformer: CosmosWorldTransformer3D,
        text_encoder: T5EncoderModel | None = None,
        uncertainty: UncertaintyHead | None = None,
    ):
        super().__init__()
        self.transformer, self.text_encoder, self.uncertainty = transformer, text_encoder, uncertainty
        # What FSDP gathers as one.
        parts = [part for part in (transformer, text_encoder) if part is not None]
        self._no_split_modules = [name for part in parts for name in part._no_split_modules or []]

    def forward(self, hidden_states, timestep, text, keep, fps, condition_mask, **conditions):
        """Raw output [B, C, T', H', W'] and log variance [B] (None without uncertainty).

        text: (ids [B, N], mask [B, N]) for the encoder, or embeddings [B, N, D]. keep [B]: 0 where a sample sees no text.
        conditions: `actions`, `camera` and `view_indices`, of a transformer that takes them.
        """
        embeds = text if self.text_encoder is None else embed_tokens(self.text_encoder, *text)
        embeds = embeds * keep[:, None, None].to(embeds.dtype)
        given = dict(fps=fps, condition_mask=condition_mask, **conditions)
        output = self.transformer(hidden_states, timestep, embeds, **given).sample
        return output, None if self.uncertainty is None else self.uncertainty(timestep)


def build_model(config: DiffusionConfig) -> WorldModel:
    """From `init_from` (a pipeline's folder; its `uncertainty` beside it where a run exported it) or with random weights."""
    base = Path(config.init_from) if config.init_from else None
    if base:
        transformer = CosmosWorldTransformer3D.from_pretrained(base / "transformer")
    elif config.preset in PRESETS:
        transformer = CosmosWorldTransformer3D(**PRESETS[config.preset])
    else:
        raise ValueError(f"unknown preset {config.preset!r}; there is {', '.join(PRESETS)}")
    text_encoder = None
    if config.train_text_encoder:
        if base and not config.new_text:
            text_encoder = T5EncoderModel.from_pretrained(base / "text_encoder")
        else:
            text_encoder = build_text_encoder(config.text_preset, config.vocab_size)
        if text_encoder.config.d_model != transformer.config.text_embed_dim:
            raise ValueError(
                f"the text encoder is {text_encoder.config.d_model} wide, the transformer takes "
                f"{transformer.config.text_embed_dim} (text_embed_dim): choose another text_preset"
            )
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return WorldModel(transformer, text_encoder, build_uncertainty(config))


def build_uncertainty(config: DiffusionConfig) -> UncertaintyHead | None:
    """That of `init_from` where it has one."""
    if not config.learned_uncertainty:
        return None
    kept = Path(config.init_from) / "uncertainty"
    return UncertaintyHead.from_pretrained(kept) if config.init_from and kept.is_dir() else UncertaintyHead()


def build_scheduler(config: DiffusionConfig) -> CosmosEDMScheduler:
    return CosmosEDMScheduler(
        p_mean=config.p_mean, p_std=config.p_std, scale_noise_by_frames=config.scale_noise_by_frames
    )


# ---- data ---------------------------------------------------------------------------------------------------------


class Texts:
    """Captions of a batch -> what `WorldModel` takes: ids and mask, or a frozen encoder's embeddings from the disk.

    Attributes: `tokenizer`, and `encoder` where it is frozen (on the CPU; a pipeline is exported with it).
    """

    def __init__(self, config: DiffusionConfig, captions: list[str], val_captions: list[str]):
        self.length, self.paths, self.encoder = config.max_sequence_length, None, None
        if config.train_text_encoder:
            source = Path(config.output_dir) / "tokenizer"
            of_base = Path(config.init_from) / "tokenizer"
            if config.init_from and not getattr(config, "new_text", False) and of_base.is_dir():
                source = of_base
            with process_state().main_process_first():
                self.tokenizer = load_or_train_vocabulary(source, captions, config.vocab_size)
            tokenize(self.tokenizer, sorted(set(captions + val_captions)), self.length)  # too long ones show up now
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(Path(config.text_encoder) / "tokenizer")
            self.encoder = T5EncoderModel.from_pretrained(Path(config.text_encoder) / "text_encoder")
            with process_state().main_process_first():
                self.paths = cache_text(
                    captions + val_captions,
                    self.tokenizer,
                    self.encoder,
                    config.cache_dir,
                    self.length,
                    config.progress,
                )

    def encode(self, captions: list[str]):
        if self.paths is None:
            return tokenize(self.tokenizer, captions, self.length)
        return torch.stack([load_text(self.paths[caption], self.length) for caption in captions])

    def collate(self, samples: list[dict]) -> dict:
        captions = [caption for sample in samples for caption in texts_of(sample)]
        text = self.encode(captions)
        if len(captions) > len(samples):  # the views' texts one after the other
            text = text.unflatten(0, (len(samples), -1)).flatten(1, 2)
        latents = torch.stack([sample["latents"] for sample in samples])
        return {"latents": latents, "text": text, "fps": torch.tensor([sample["fps"] for sample in samples])}


def texts_of(sample: dict) -> list[str]:
    """The captions of a sample's views, or its only one."""
    return sample.get("view_captions") or [sample["caption"]]


def build_datasets(
    config: DiffusionConfig,
    vae: CosmosVideoTokenizer,
    need_caption: bool = True,
    arrays: tuple[str, ...] = (),
    views: tuple[str, ...] | None = None,
) -> tuple[LatentDataset, dict[str, LatentDataset]]:
    """Latents of the training data, and of every validation set by name (first window, first `val_clips` clips).

    `arrays` are the names of what samples have besides, such as `actions` and `camera`; `views` those of the cameras to read
    together; without them a clip of several is read as one of `config.camera`.
    """
    if (config.num_frames - 1) % vae.config.temporal_compression:
        raise ValueError(f"num_frames must be 1 + k * {vae.config.temporal_compression}, got {config.num_frames}")
    if vae.config.latents_mean is None and vae.config.quantizer is None:
        raise ValueError(
            f"{config.vae} has no latents_mean and latents_std in its config: run compute_latent_stats first"
        )
    state = process_state()

    def cached(paths, starts, random):
        clips = ClipDataset(
            paths,
            size=(config.height, config.width) if config.height else None,
            fps=config.fps or None,
            random=False,
            need_caption=need_caption,
            on_broken=config.on_broken,
            views=views or config.camera or None,
        )
        share = dict(progress=config.progress, rank=state.process_index, world_size=state.num_processes, arrays=arrays)
        with at_work(vae):
            return cache_latents(clips, vae, config.cache_dir, config.num_frames, starts, random, **share)

    train = cached(config.data, config.window_starts, True)
    validation = {}
    for name, path in zip(data_names(config.val_data), config.val_data, strict=True):
        whole = cached(path, config.window_starts[:1] or [0], False)
        validation[name] = whole.first(config.val_clips)
    state.wait_for_everyone()
    return train, validation


# ---- loss ---------------------------------------------------------------------------------------------------------


class DiffusionLoss:
    """`compute_loss` of `fit`: the weighted denoising error with the learned uncertainty (spec of EDM2)."""

    def __init__(self, config: DiffusionConfig, scheduler: CosmosEDMScheduler, takes_condition_mask: bool):
        self.config, self.scheduler, self.takes_condition_mask = config, scheduler, takes_condition_mask
        if config.min_condition_frames and not takes_condition_mask:
            raise ValueError("min_condition_frames: no frames can be given to this network; it is text-to-world")

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        latents, device = batch["latents"], batch["latents"].device
        counts = self.draw_counts(batch) if self.takes_condition_mask else None
        keep = (torch.rand(len(latents), device=device) >= self.config.text_dropout).float()
        return self.objective(model, batch, counts, keep)

    def objective(self, model: nn.Module, batch: dict, counts, keep: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Loss and figures for the log of one draw of noise; the arguments are those of `losses`."""
        plain, log_variance, sigma = self.losses(model, batch, counts, keep)
        loss = with_uncertainty(plain, log_variance)
        return loss.mean(), {"denoising": plain.detach().mean(), **self._by_band(plain.detach(), sigma)}

    def num_views(self, batch: dict) -> int:
        """How many views the time axis of the latents holds."""
        return 1

    def draw_counts(self, batch: dict) -> torch.Tensor:
        """Latent frames given to each sample; the reference draws once per process, where a batch is a sample or two."""
        latents, least, most = batch["latents"], self.config.min_condition_frames, self.config.max_condition_frames
        return torch.randint(least, most + 1, (len(latents),), device=latents.device)

    def equal_counts(self, batch: dict, count: int) -> torch.Tensor | None:
        """`count` latent frames given to each sample, in every view; None for a network that takes none."""
        views, size = self.num_views(batch), len(batch["latents"])
        shape = (size,) if views == 1 else (size, views)
        return torch.full(shape, count, device=batch["latents"].device) if self.takes_condition_mask else None

    def losses(self, model: nn.Module, batch: dict, counts: torch.Tensor | None, keep: torch.Tensor):
        """(weighted squared error [B], about 1 for a model that knows nothing; log variance [B] or None; sigma [B]).

        counts [B], or [B, V] of several views: latent frames given. Draws noise levels and noises from torch's global generator.
        """
        scheduler = self.scheduler
        latents = batch["latents"] * scheduler.config.sigma_data  # [B, C, T', H', W']
        size, frames, device = len(latents), latents.shape[2], latents.device
        sigma = scheduler.sample_training_sigmas(size, frames // self.num_views(batch), device=device)
        noisy = scheduler.add_noise(latents, torch.randn_like(latents), sigma)
        condition = mask = None
        if counts is not None:
            indicator = condition_indicator(frames, counts, device)
            mask = condition_mask(indicator, *latents.shape[3:])
            condition = FrameCondition(
                latents=latents,
                indicator=indicator,
                augment_sigma=scheduler.sample_augment_sigmas(size, device=device),
                augment_noise=torch.randn_like(latents),
                release=False,
            )
        log_variance, others = None, {name: batch[name] for name in (*CONDITIONS, "view_indices") if name in batch}

        def network(hidden_states, c_noise):
            nonlocal log_variance
            c_noise = c_noise.reshape(-1).expand(size)
            output, log_variance = model(hidden_states, c_noise, batch["text"], keep, batch["fps"], mask, **others)
            return output

        denoised = scheduler.denoise(network, noisy, sigma, condition)
        weights = self.weights(latents, self.num_views(batch))
        return scheduler.loss(denoised, latents, sigma, weights=weights), log_variance, sigma

    def weights(self, latents: torch.Tensor, views: int) -> torch.Tensor | None:
        """How much each element of latents [B, C, T', H', W'] of so many views counts in the error; None: all the same."""
        return None

    def _by_band(self, plain: torch.Tensor, sigma: torch.Tensor) -> dict:
        """Mean error in each band of noise; NaN, which the log leaves out, where the batch has none there."""
        level = sigma / self.scheduler.config.sigma_data
        pairs = zip(BANDS[:-1], BANDS[1:], strict=True)
        return {f"denoising_{low:g}_{high:g}": plain[(level >= low) & (level < high)].mean() for low, high in pairs}


@torch.no_grad()
def validate(
    model: WorldModel, loss: DiffusionLoss, texts: Texts, datasets: dict[str, LatentDataset], batch_size: int
) -> dict:
    """Denoising error on every validation set, with as few frames given as in training, 1 and as many; the same draws each time."""
    device, figures = next(model.parameters()).device, {}
    least, most = loss.config.min_condition_frames, loss.config.max_condition_frames
    given = sorted({least, max(least, 1), most}) if loss.takes_condition_mask else [0]
    for name, dataset in datasets.items():
        for count in given:
            errors = []
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                for batch in in_order(dataset, batch_size, texts.collate):
                    batch = to_device(batch, device)
                    keep = torch.ones(len(batch["latents"]), device=device)
                    errors.append(loss.losses(model, batch, loss.equal_counts(batch, count), keep)[0])
            figures[f"{name}_denoising_given{count}"] = torch.cat(errors).mean().item()
    return figures


@torch.no_grad()
def check_reload(model: WorldModel, again: WorldModel, text, num_frames: int = 2):
    """Compare one forward pass of two models; TrainingError where they differ. text: as `WorldModel.forward` takes it, B = 1."""
    device = next(model.parameters()).device
    config = model.transformer.config
    side, num_frames = 2 * config.patch_size[1], num_frames * config.num_views
    x = torch.linspace(-1, 1, config.out_channels * num_frames * side * side, device=device)
    x = x.view(1, config.out_channels, num_frames, side, side)
    mask = x.new_zeros(1, 1, num_frames, side, side) if model.transformer.takes_condition_mask else None
    text = tuple(t.to(device) for t in text) if isinstance(text, tuple) else text.to(device)
    inputs = (x, x.new_zeros(1), text, x.new_ones(1), 24.0, mask)
    others = wave_conditions(model.transformer, num_frames, side, device)
    training = model.training
    a, b = (m.to(device).eval()(*inputs, **others)[0] for m in (model, again))
    model.train(training)
    if not torch.allclose(a.float(), b.float(), atol=1e-4):
        raise TrainingError(
            f"the saved model does not compute what the trained one does (off by {(a - b).abs().max():.3g})"
        )


def wave_conditions(
    transformer: CosmosWorldTransformer3D, num_frames: int, side: int, device
) -> dict[str, torch.Tensor]:
    """Some fixed actions, rays and token ids for latents [1, C, num_frames, side, side], as far as the transformer takes them."""
    config, shapes = transformer.config, {}
    if config.action_dim is not None:
        shapes["actions"] = (1, num_frames if config.action_form == "intended" else 1, config.action_dim)
    if config.camera_channels:
        shapes["camera"] = (1, config.camera_channels, num_frames, side, side)
    conditions = {
        name: torch.arange(math.prod(shape), device=device).float().cos().view(shape) for name, shape in shapes.items()
    }
    if config.condition_vocab_size is not None:
        ids = torch.arange(num_frames * side * side, device=device) % config.condition_vocab_size
        conditions["condition"] = ids.view(1, 1, num_frames, side, side)
    return conditions
