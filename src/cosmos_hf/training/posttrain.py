"""Post-training of a diffusion world model with further conditions (arXiv 2501.03575, section 6), by LoRA or in full.

A run starts from a pipeline's folder. New parts start at zero, so step 0 is the base, which is checked; with LoRA the base's own
weights stay as they are, to the bit, and what was learned is exported as an adapter (`models.condition_adapters`).
Whether the conditions are followed is measured all along: `sensitivity_<condition>` is how much the output changes when
the samples of a batch exchange them, as a share of the output.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..conditioning.action import BRIDGE, DRIVING, ActionSpec, group_actions
from ..conditioning.camera import plucker_rays
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.condition_adapters import GrownLinear, added_columns, added_parts
from ..models.dit_conditions import CAMERA_CHANNELS, channel_columns, extend_conditions
from ..models.transformer_cosmos import CosmosWorldTransformer3D
from .adaptation import (
    AdapterSettings,
    add_lora,
    check_init_from,
    check_same_output,
    freeze,
    pipeline_settings,
    save_adapter,
    tell_trained,
)
from .cache import LatentDataset
from .diffusion import (
    CONDITIONS,
    DiffusionConfig,
    DiffusionLoss,
    Texts,
    WorldModel,
    build_uncertainty,
    validate,
    wave_conditions,
)
from .loop import to_device

INPUTS = {"camera": "camera", "action": "actions", "instruction": "text"}  # condition -> what a batch calls it
SPECS = {"bridge": BRIDGE, "driving": DRIVING}
# Settings of a training from scratch that a post-training takes from its base.
OF_THE_BASE = ("preset", "train_text_encoder", "text_preset", "vocab_size", "p_mean", "p_std", "scale_noise_by_frames")
OF_THE_BASE += ("num_inference_steps", "guidance_scale")


@dataclass
class PosttrainConfig(AdapterSettings, DiffusionConfig):
    conditions: list[str] = field(
        default_factory=list, metadata={"help": "what to learn: camera, action, instruction, one or several"}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
        metadata={"help": "ends of the names of the layers in every block"},
    )
    num_frames: int = field(default=0, metadata={"help": "length of a window in pixel frames; 0: the base's"})
    max_sequence_length: int = field(default=0, metadata={"help": "text tokens; 0: the base's"})

    def __post_init__(self):
        check_init_from(self, OF_THE_BASE, {f.name: f.default for f in dataclasses.fields(self)})
        self.vae = self.vae or str(Path(self.init_from) / "vae")
        self.text_encoder = self.text_encoder or self.init_from
        super().__post_init__()
        unknown = [name for name in self.conditions if name not in INPUTS]
        if unknown or not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions must be one or several of {', '.join(INPUTS)}, got {self.conditions}")
        if settings := pipeline_settings(self.init_from):
            self.num_frames = self.num_frames or settings.get("num_frames", 121)
            self.max_sequence_length = self.max_sequence_length or settings.get("max_sequence_length", 512)

    @property
    def arrays(self) -> tuple[str, ...]:
        """What samples must have besides their videos and captions."""
        return tuple(INPUTS[name] for name in self.conditions if INPUTS[name] in CONDITIONS)


# ---- data ----------------------------------------------------------------------------------------------------------


def find_action_spec(config: AdapterSettings, data: LatentDataset) -> ActionSpec | None:
    """What the actions of the run mean, with the normalisation and the range of its data; None for a run without actions."""
    if "action" not in config.conditions:
        return None
    if config.action_spec in SPECS:
        spec = SPECS[config.action_spec]
    elif config.action_spec:
        spec = ActionSpec.load(config.action_spec)
    elif (Path(config.data[0]) / "meta" / "info.json").exists():
        from ..data.lerobot import LeRobotClips

        spec = LeRobotClips(config.data[0]).action_spec()
    else:
        raise ValueError(
            f"say what the actions mean: action_spec must be {', '.join(SPECS)}, or a folder with an action_spec.json "
            "(cosmos_hf.conditioning.action.ActionSpec(...).save(folder))"
        )
    if spec.normalisation != "none":
        return spec
    return spec.with_statistics([arrays["actions"] for arrays in data.arrays], config.action_normalisation)


class ConditionBatches:
    """Samples -> batches with the network's inputs: `actions` [B, T', f A] and `camera` [B, 6, T', H', W'].

    Text is as `Texts` gives it, and zero for samples without a caption.
    """

    def __init__(self, config: PosttrainConfig, texts: Texts, vae: CosmosVideoTokenizer, spec: ActionSpec | None):
        self.config, self.texts, self.spec = config, texts, spec
        self.spatial, self.temporal = vae.config.spatial_compression, vae.config.temporal_compression

    @property
    def action_dim(self) -> int | None:
        return None if self.spec is None else self.temporal * self.spec.width

    def collate(self, samples: list[dict]) -> dict:
        batch = self.texts.collate(samples)
        told = torch.tensor([bool(sample["caption"]) for sample in samples])
        batch["text"] = batch["text"] * told[:, None, None]
        if self.spec is not None:
            actions = [self.spec.normalise(sample["actions"], sample["fps"]) for sample in samples]
            batch["actions"] = torch.stack([group_actions(part, self.temporal) for part in actions])
        if "camera" in self.config.conditions:
            height, width = (size * self.spatial for size in batch["latents"].shape[-2:])
            size = height, width, self.spatial, self.temporal
            cameras = [sample["camera"] for sample in samples]
            batch["camera"] = torch.stack([plucker_rays(c["intrinsics"], c["extrinsics"], *size) for c in cameras])
        return batch


# ---- model ---------------------------------------------------------------------------------------------------------


def build_model(config: PosttrainConfig, action_dim: int | None) -> WorldModel:
    """The base with the run's conditions, and with LoRA where that is asked for; what is trained requires a gradient.

    Raises TrainingError where it does not compute what the base does, ValueError for LoRA targets that match nothing.
    """
    transformer = CosmosWorldTransformer3D.from_pretrained(Path(config.init_from) / "transformer")
    changes = config_changes(config, action_dim)
    if config.lora_rank:
        freeze(transformer, config)
    check_step_zero(transformer, lambda: _prepare(transformer, config, changes))
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    tell_trained(transformer)
    return WorldModel(transformer, None, build_uncertainty(config))


def config_changes(config: PosttrainConfig, action_dim: int | None) -> dict:
    """The conditions as fields of the transformer's config."""
    changes = {"camera_channels": CAMERA_CHANNELS} if "camera" in config.conditions else {}
    return changes | ({"action_dim": action_dim, "action_form": "intended"} if "action" in config.conditions else {})


def _prepare(transformer: CosmosWorldTransformer3D, config: PosttrainConfig, changes: dict):
    for name in changes:
        if name != "action_form" and transformer.config[name] not in (None, 0):
            raise ValueError(f"the base has {name}={transformer.config[name]} already; post-train one without it")
    extend_conditions(transformer, **changes)
    if not config.lora_rank:
        return
    add_lora(transformer, config, "transformer_blocks")
    for name in added_parts(changes):
        getattr(transformer, name).requires_grad_(True)
    if groups := added_columns(changes):
        columns = channel_columns(transformer.config, transformer.patch_embed.patch_size)
        transformer.patch_embed.proj = GrownLinear(transformer.patch_embed.proj, [columns[name] for name in groups])


def check_step_zero(transformer: CosmosWorldTransformer3D, change: Callable[[], None]):
    """`check_same_output` of one evaluation with conditions that are not zero."""
    mixed = any(parameter.dtype == torch.bfloat16 for parameter in transformer.parameters())

    def output():
        config = transformer.config
        side, frames = 4 * config.patch_size[1], 3 * config.patch_size[0]
        others = wave_conditions(transformer, frames, side, "cpu")
        if transformer.takes_condition_mask:
            others["condition_mask"] = torch.zeros(1, 1, frames, side, side)
        x = torch.arange(config.out_channels * frames * side**2).float().sin().view(1, -1, frames, side, side)
        text = torch.arange(8.0 * config.text_embed_dim).cos().view(1, 8, -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return transformer(x, torch.zeros(1), text, **others).sample.float()

    check_same_output(output, change)


# ---- loss ----------------------------------------------------------------------------------------------------------


class ConditionedLoss(DiffusionLoss):
    """`compute_loss` of `fit`: conditions are zeroed for a share of samples, and once per log line their effect is measured."""

    calls = 0

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        size, device, logs = len(batch["latents"]), batch["latents"].device, {}
        if self.calls % (self.config.log_every * self.config.gradient_accumulation) == 0:
            logs = {name: value for name, value in self.sensitivity(model, batch).items() if name.startswith("sens")}
        self.calls += 1
        keep = (torch.rand(size, device=device) >= self.config.condition_dropout).float()
        seen = {
            name: batch[name] * keep.view(-1, *[1] * (batch[name].ndim - 1)) for name in CONDITIONS if name in batch
        }
        loss, more = super().__call__(model, batch | seen)
        return loss, more | logs

    @torch.no_grad()
    def sensitivity(self, model: nn.Module, batch: dict) -> dict[str, float]:
        """For every condition of the run what changes when each sample gets the next one's, the first frame being given.

        `sensitivity_<name>`: rms of the output's change over rms of the output, of the frames that are not given.
        `error_ratio_<name>`: denoising error with the wrong condition over that with the right one; above 1 where it is of use.
        NaN for a single sample. Leaves the random generators as they are.
        """
        device, size = batch["latents"].device, len(batch["latents"])
        given = int(self.takes_condition_mask)
        counts = torch.ones(size, dtype=torch.long, device=device) if given else None
        outputs = []

        def recorded(*args, **kwargs):
            output, log_variance = model(*args, **kwargs)
            outputs.append(output[:, :, given:].float())
            return output, log_variance

        def error(inputs):
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                return self.losses(recorded, inputs, counts, torch.ones(size, device=device))[0].mean()

        figures, right = {}, error(batch)
        for name in self.config.conditions:
            key = INPUTS[name]
            wrong = error(batch | {key: batch[key].roll(1, 0)})
            change = (outputs[-1] - outputs[0]).square().mean().sqrt() / outputs[0].square().mean().sqrt()
            figures[f"sensitivity_{name}"] = float(change) if size > 1 else float("nan")
            figures[f"error_ratio_{name}"] = float(wrong / right) if size > 1 else float("nan")
        return figures


def validate_conditions(
    model: WorldModel,
    loss: ConditionedLoss,
    batches: ConditionBatches,
    datasets: dict[str, LatentDataset],
    batch_size: int,
) -> dict:
    """`diffusion.validate`, and the sensitivity to every condition on every validation set."""
    return validate(model, loss, batches, datasets, batch_size) | sensitivities(
        model, loss, batches, datasets, batch_size
    )


def sensitivities(model: nn.Module, loss, batches, datasets: dict[str, LatentDataset], batch_size: int) -> dict:
    """`loss.sensitivity` on every validation set, in batches of two samples or more."""
    figures, device = {}, next(model.parameters()).device
    for name, dataset in datasets.items():
        measured = []
        for batch in DataLoader(dataset, max(2, batch_size), collate_fn=batches.collate):
            if len(batch["tokens" if "tokens" in batch else "latents"]) > 1:
                measured.append(loss.sensitivity(model, to_device(batch, device)))
        for figure in measured[0] if measured else ():
            figures[f"{name}_{figure}"] = sum(part[figure] for part in measured) / len(measured)
    return figures


# ---- export --------------------------------------------------------------------------------------------------------


def export_adapter(model: WorldModel, folder: Path, config: PosttrainConfig, batches: ConditionBatches):
    """Write what was learned beside the base: LoRA, new columns and modules, what actions mean."""
    trained_on = dict(num_frames=config.num_frames, condition_dropout=config.condition_dropout)
    changes = config_changes(config, batches.action_dim)
    save_adapter(model.transformer, Path(folder), changes, batches.spec, names=config.conditions, **trained_on)
