"""Post-training of a diffusion world model with further conditions (arXiv 2501.03575, section 6), by LoRA or in full.

A run starts from a pipeline's folder. New parts start at zero, so step 0 is the base, which is checked; with LoRA the base's own
weights stay as they are, to the bit, and what was learned is exported as an adapter (`models.condition_adapters`).
Whether the conditions are followed is measured all along: `sensitivity_<condition>` is how much the output changes when
the samples of a batch exchange them, as a share of the output.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.loaders.lora_pipeline import CosmosLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from torch.utils.data import DataLoader

from ..conditioning.action import BRIDGE, DRIVING, ActionSpec, group_actions
from ..conditioning.camera import plucker_rays
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.condition_adapters import ConditionAdapter, GrownLinear, added_columns, added_parts
from ..models.dit_conditions import CAMERA_CHANNELS, channel_columns, extend_conditions
from ..models.transformer_cosmos import CosmosWorldTransformer3D
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
from .loop import TrainingError, to_device

logger = logging.getLogger(__name__)

INPUTS = {"camera": "camera", "action": "actions", "instruction": "text"}  # condition -> what a batch calls it
SPECS = {"bridge": BRIDGE, "driving": DRIVING}
# Settings of a training from scratch that a post-training takes from its base.
OF_THE_BASE = ("preset", "train_text_encoder", "text_preset", "vocab_size", "p_mean", "p_std", "scale_noise_by_frames")
OF_THE_BASE += ("num_inference_steps", "guidance_scale")


@dataclass
class PosttrainConfig(DiffusionConfig):
    conditions: list[str] = field(
        default_factory=list, metadata={"help": "what to learn: camera, action, instruction, one or several"}
    )
    lora_rank: int = field(default=16, metadata={"help": "0: train all weights instead"})
    lora_alpha: float = field(default=16.0, metadata={"help": "the LoRA counts lora_alpha / lora_rank"})
    lora_targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
        metadata={"help": "ends of the names of the layers in every block"},
    )
    condition_dropout: float = field(default=0.1, metadata={"help": "share of samples whose conditions are zeroed"})
    action_spec: str = field(
        default="",
        metadata={
            "help": "what actions mean: bridge, driving, or a folder with action_spec.json; empty: LeRobot's own"
        },
    )
    action_normalisation: str = field(default="quantile", metadata={"help": "none, standard, range or quantile"})
    num_frames: int = field(default=0, metadata={"help": "length of a window in pixel frames; 0: the base's"})
    max_sequence_length: int = field(default=0, metadata={"help": "text tokens; 0: the base's"})

    def __post_init__(self):
        if not self.init_from:
            raise ValueError("post-training starts from a pipeline: give its folder as init_from")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if given := [name for name in OF_THE_BASE if getattr(self, name) != defaults[name]]:
            raise ValueError(f"{', '.join(given)} cannot be set in post-training: the base's are kept")
        self.vae = self.vae or str(Path(self.init_from) / "vae")
        self.text_encoder = self.text_encoder or self.init_from
        super().__post_init__()
        unknown = [name for name in self.conditions if name not in INPUTS]
        if unknown or not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions must be one or several of {', '.join(INPUTS)}, got {self.conditions}")
        if self.lora_rank < 0 or self.lora_alpha <= 0 or not self.lora_targets:
            raise ValueError("lora_rank must be >= 0 (0: train all weights), lora_alpha > 0, lora_targets not empty")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}")
        index = Path(self.init_from) / "model_index.json"
        if index.exists():
            settings = json.loads(index.read_text())
            self.num_frames = self.num_frames or settings.get("num_frames", 121)
            self.max_sequence_length = self.max_sequence_length or settings.get("max_sequence_length", 512)

    @property
    def arrays(self) -> tuple[str, ...]:
        """What samples must have besides their videos and captions."""
        return tuple(INPUTS[name] for name in self.conditions if INPUTS[name] in CONDITIONS)


# ---- data ----------------------------------------------------------------------------------------------------------


def find_action_spec(config: PosttrainConfig, data: LatentDataset) -> ActionSpec | None:
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
    check_step_zero(transformer, lambda: _prepare(transformer, config, changes))
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    model = WorldModel(transformer, None, build_uncertainty(config))
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    logger.info("%.3f M of %.1f M parameters are trained", trained / 1e6, transformer.num_parameters() / 1e6)
    return model


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
    transformer.requires_grad_(False)
    add_lora(transformer, config)
    for name in added_parts(changes):
        getattr(transformer, name).requires_grad_(True)
    if groups := added_columns(changes):
        columns = channel_columns(transformer.config, transformer.patch_embed.patch_size)
        transformer.patch_embed.proj = GrownLinear(transformer.patch_embed.proj, [columns[name] for name in groups])


def add_lora(transformer: CosmosWorldTransformer3D, config: PosttrainConfig):
    """LoRA on the blocks' layers whose names end in a target; ValueError for a target that matches none."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    layers = [name.split(".", 2)[1:] for name in layers if name.startswith("transformer_blocks.")]
    blocks, found = set(), set()
    for target in config.lora_targets:
        hits = [(block, name) for block, name in layers if f".{name}".endswith(f".{target}")]
        if not hits:
            there = ", ".join(dict.fromkeys(name for _, name in layers))
            raise ValueError(f"lora_targets: {target!r} ends the name of no layer; a block has {there}")
        blocks |= {block for block, _ in hits}
        found |= {name for _, name in hits}
    count = len(transformer.transformer_blocks)
    logger.info("LoRA of rank %d in %d/%d blocks: %s", config.lora_rank, len(blocks), count, ", ".join(sorted(found)))
    pattern = "|".join(re.escape(target) for target in config.lora_targets)
    transformer.add_adapter(
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=rf"transformer_blocks\.\d+\.(?:.*\.)?(?:{pattern})",
        )
    )


@torch.no_grad()
def check_step_zero(transformer: CosmosWorldTransformer3D, change: Callable[[], None], tolerance: float = 1e-5):
    """Make the change and compare one evaluation before and after it, with conditions that are not zero.

    Raises TrainingError where they differ by more than `tolerance` of the output's size.
    """

    def output():
        config = transformer.config
        side, frames = 4 * config.patch_size[1], 3 * config.patch_size[0]
        others = wave_conditions(transformer, frames, side, "cpu")
        if transformer.takes_condition_mask:
            others["condition_mask"] = torch.zeros(1, 1, frames, side, side)
        x = torch.arange(config.out_channels * frames * side**2).float().sin().view(1, -1, frames, side, side)
        text = torch.arange(8.0 * config.text_embed_dim).cos().view(1, 8, -1)
        return transformer(x, torch.zeros(1), text, **others).sample

    before = output()
    change()
    off = (output() - before).abs().max() / before.square().mean().sqrt().clamp(min=1e-6)
    if off > tolerance:
        raise TrainingError(f"step 0 must be the base, but the output is off by {off:.2g} of its size")
    logger.info("step 0 is the base: the output is off by %.1g of its size", off)


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
    figures, device = validate(model, loss, batches, datasets, batch_size), next(model.parameters()).device
    for name, dataset in datasets.items():
        measured = []
        for batch in DataLoader(dataset, max(2, batch_size), collate_fn=batches.collate):
            if len(batch["latents"]) > 1:
                measured.append(loss.sensitivity(model, to_device(batch, device)))
        for figure in measured[0] if measured else ():
            figures[f"{name}_{figure}"] = sum(part[figure] for part in measured) / len(measured)
    return figures


# ---- export --------------------------------------------------------------------------------------------------------


def export_adapter(model: WorldModel, folder: Path, config: PosttrainConfig, batches: ConditionBatches):
    """Write what was learned beside the base: LoRA, new columns and modules, what actions mean."""
    transformer, folder = model.transformer, Path(folder)
    lora = transformer.peft_config["default"].to_dict()
    lora = {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}
    CosmosLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name="default"),
        transformer_lora_adapter_metadata=lora,
    )
    trained_on = dict(num_frames=config.num_frames, condition_dropout=config.condition_dropout)
    changes = config_changes(config, batches.action_dim)
    ConditionAdapter.of(transformer, changes, names=config.conditions, **trained_on).save(folder)
    if batches.spec is not None:
        batches.spec.save(folder)
