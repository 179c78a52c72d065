"""Post-training of a diffusion world model with further conditions (arXiv 2501.03575, section 6), by LoRA or in full.

A run starts from a pipeline's folder. New parts start at zero, so step 0 is the base, which is checked; with LoRA the base's own
weights stay as they are, to the bit, and what was learned is exported as an adapter (`models.condition_adapters`).
Whether the conditions are followed is measured all along (`conditioned_loss`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..conditioning.action import ActionSpec, group_actions
from ..conditioning.camera import plucker_rays, relative_extrinsics
from ..conditioning.trajectory import NUM_POINTS, trajectory_points, trajectory_vector
from ..conditioning.views import join_views, reference_view
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.condition_adapters import GrownLinear, added_columns, added_parts, has_condition
from ..models.dit_conditions import (
    ACTION_FORMS,
    CAMERA_CHANNELS,
    HOW_ACTIONS_ENTER,
    channel_columns,
    extend_conditions,
)
from ..models.transformer_cosmos import CosmosWorldTransformer3D
from ..schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from .action_specs import reference_poses, without_range
from .adaptation import (
    AdapterSettings,
    add_lora,
    check_init_from,
    check_run_views,
    check_same_output,
    errors_of,
    freeze,
    go_on_from,
    learn_as_new,
    pipeline_settings,
    save_adapter,
    tell_trained,
)
from .conditioned_loss import INPUTS
from .diffusion import DiffusionConfig, Texts, WorldModel, build_uncertainty, texts_of, wave_conditions

# The array that a clip must have for a condition.
ARRAYS = {"camera": "camera", "action": "actions", "trajectory": "camera"}
VIEW_EMBED_DIM = 6  # of the published multi-view models
# Settings of a training from scratch that a post-training takes from its base.
OF_THE_BASE = (
    "preset",
    "train_text_encoder",
    "text_preset",
    "vocab_size",
    "new_text",
    "scale_noise_by_frames",
    "num_inference_steps",
    "guidance_scale",
)


@dataclass
class PosttrainConfig(AdapterSettings, DiffusionConfig):
    conditions: list[str] = field(
        default_factory=list,
        metadata={"help": "what to learn: camera, action, trajectory, instruction, views, one or several"},
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
        metadata={"help": "ends of the names of the layers in every block"},
    )
    views: list[str] = field(
        default_factory=list, metadata={"help": "names of the clips' cameras, in the model's order"}
    )
    views_per_step: int = field(
        default=0, metadata={"help": "draw so many of the views for every step, which costs less; 0: all"}
    )
    whole_views: float = field(
        default=0.3, metadata={"help": "share of samples of which some views, a random subset, are given whole"}
    )
    action_form: str = field(
        default="intended",
        metadata={"help": "intended: an action for every frame; as_written: the paper's, the next one alone"},
    )
    action_hidden_dim: int = field(
        default=0, metadata={"help": "width within the actions' MLPs; 0: 4 times the network's, as published"}
    )
    text_refiner_layers: int = field(
        default=0,
        metadata={
            "help": "layers that read the text once more and are learned; for a base whose text encoder tells too little"
        },
    )
    trajectory_points: int = field(
        default=NUM_POINTS, metadata={"help": "points of a trajectory, spread over the window"}
    )
    contrast: float = field(
        default=0.0,
        metadata={
            "help": "weight of the demand that one of a clip's `alternatives`, in its caption's place, makes the error larger"
        },
    )
    motion_weight: float = field(
        default=0.0,
        metadata={
            "help": "count the error so many times more where something moves: what is told moves little of a picture"
        },
    )
    p_mean: float | None = field(default=None, metadata={"help": "mean of ln(sigma); none: the base's"})
    p_std: float | None = field(default=None, metadata={"help": "spread of ln(sigma); none: the base's"})
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
        if {"action", "trajectory"} <= set(self.conditions):
            raise ValueError("action and trajectory enter the network by the same door: learn one of them")
        self._check_action_form()
        if self.motion_weight < 0:
            raise ValueError(f"motion_weight must be 0 (all counts the same) or more, got {self.motion_weight}")
        if self.contrast < 0 or (self.contrast and "instruction" not in self.conditions):
            raise ValueError("contrast must be 0 or more, and is of conditions: instruction")
        if self.text_refiner_layers < 0 or (self.text_refiner_layers and "instruction" not in self.conditions):
            raise ValueError("text_refiner_layers must be 0 or more, and is of conditions: instruction")
        settings = pipeline_settings(self.init_from)
        if settings:
            self.num_frames = self.num_frames or settings.get("num_frames", 121)
            self.max_sequence_length = self.max_sequence_length or settings.get("max_sequence_length", 512)
        self._check_views(settings.get("views"))
        if self.contrast and self.views:
            raise ValueError("contrast is for models of one view: a clip's alternatives are no texts of its views")

    def _check_action_form(self):
        if self.action_form not in ACTION_FORMS:
            raise ValueError(f"action_form must be one of {', '.join(ACTION_FORMS)}, got {self.action_form!r}")
        if self.action_hidden_dim and not {"action", "trajectory"} & set(self.conditions):
            raise ValueError(
                "action_hidden_dim is of the MLPs of conditions: action or trajectory, which this run has not"
            )
        if self.action_form == "intended":
            return
        if "action" not in self.conditions:
            raise ValueError("action_form: as_written is for conditions: action")
        if self.accumulate_actions or self.max_condition_frames > 1:
            raise ValueError(
                "action_form: as_written tells the network the action that leads on from the first frame alone: it needs "
                "max_condition_frames 0 or 1, and accumulate_actions: false"
            )

    def _check_views(self, base_views: list[str] | None):
        self.views = check_run_views(self, base_views)
        if self.views_per_step and not 2 <= self.views_per_step <= len(self.views):
            raise ValueError(f"views_per_step must be 0 (all) or 2 to {len(self.views)}, got {self.views_per_step}")
        if not 0 <= self.whole_views <= 1 or self.trajectory_points < 1:
            raise ValueError("whole_views must be in [0, 1], trajectory_points at least 1")

    @property
    def arrays(self) -> tuple[str, ...]:
        """What samples must have besides their videos and captions."""
        names = [ARRAYS[name] for name in self.conditions if name in ARRAYS]
        return tuple(dict.fromkeys(names + ["alternatives"] * bool(self.contrast)))

    @property
    def cameras(self) -> tuple[str, ...] | None:
        """The cameras of a clip to read together; None for one alone."""
        return tuple(self.views) or None


# ---- data ----------------------------------------------------------------------------------------------------------


class ConditionBatches:
    """Samples -> batches with the network's inputs: `actions` [B, T', f A], [B, 1, A] of the form "as_written" or [B, 1, 3 N] of
    trajectories, and `camera` [B, 6, T', H', W']. Of several views T' is that of all of them, and where a step draws some of them
    `first_cameras` [B, V, 4, 4] tells where each begins, in the coordinates of the rays.

    Text is as `Texts` gives it, and zero for samples (or views) without a caption.
    """

    def __init__(self, config: PosttrainConfig, texts: Texts, vae: CosmosVideoTokenizer, spec: ActionSpec | None):
        self.config, self.texts, self.spec = config, texts, spec
        self._read = spec and without_range(spec)  # `find_action_spec` has looked at the range
        self.spatial, self.temporal = vae.config.spatial_compression, vae.config.temporal_compression

    @property
    def action_dim(self) -> int | None:
        if self.spec is None:
            return None
        if self.config.action_form == "as_written":
            return self.spec.num_inputs
        return self.spec.num_inputs * (
            self.temporal if self.spec.kind != "trajectory" else self.config.trajectory_points
        )

    def collate(self, samples: list[dict]) -> dict:
        batch = self.texts.collate(samples)
        told = torch.tensor([[bool(caption) for caption in texts_of(sample)] for sample in samples])
        batch["text"] = batch["text"] * told.repeat_interleave(self.texts.length, dim=1)[..., None]
        if self.config.contrast:
            batch["other_text"] = self.texts.encode([_drawn_alternative(sample) for sample in samples])
        if self.spec is not None:
            batch["actions"] = torch.stack([self._actions(sample) for sample in samples])
        if "camera" in self.config.conditions:
            height, width = (size * self.spatial for size in batch["latents"].shape[-2:])
            size = height, width, self.spatial, self.temporal
            batch["camera"] = torch.stack([self._rays(sample, size) for sample in samples])
            if self.config.views_per_step:
                batch["first_cameras"] = torch.stack([self._first_cameras(sample["camera"]) for sample in samples])
        return batch

    def _actions(self, sample: dict) -> torch.Tensor:
        if self.spec.kind == "trajectory":
            count = self.config.trajectory_points
            with errors_of(sample):
                points = trajectory_points(reference_poses(sample["camera"]), sample["fps"], count, self.spec.rate)
                return trajectory_vector(self._read, points, count)
        with errors_of(sample):
            if self.config.action_form == "as_written":
                return self._read.inputs(sample["actions"][:1], sample["fps"])
            actions = group_actions(self._read.inputs(sample["actions"], sample["fps"]), self.temporal)
        return actions.repeat(len(texts_of(sample)), 1)  # every view is of the same car or robot

    def _rays(self, sample: dict, size: tuple[int, ...]) -> torch.Tensor:
        intrinsics, poses = sample["camera"]["intrinsics"], sample["camera"]["extrinsics"]
        with errors_of(sample):
            if not self.config.views:
                return plucker_rays(intrinsics, poses, *size)
            first = poses[reference_view(range(len(poses))), 0]
            return join_views(plucker_rays(intrinsics, poses, *size, reference=first), dim=0)

    def _first_cameras(self, camera: dict) -> torch.Tensor:
        poses = camera["extrinsics"].double()[:, 0]
        return relative_extrinsics(poses, poses[reference_view(range(len(poses)))]).float()


def _drawn_alternative(sample: dict) -> str:
    """One of the texts that are wrong for a sample; its own, of which nothing is learned, where there is none."""
    others = sample["alternatives"] or [sample["caption"]]
    return others[int(torch.randint(len(others), ()))]


# ---- model ---------------------------------------------------------------------------------------------------------


def build_scheduler(config: PosttrainConfig) -> CosmosEDMScheduler:
    """That of the base, with the run's own noise levels where it has such; they are of training alone and not exported."""
    levels = {name: getattr(config, name) for name in ("p_mean", "p_std") if getattr(config, name) is not None}
    return CosmosEDMScheduler.from_pretrained(config.init_from, subfolder="scheduler", **levels)


def build_model(config: PosttrainConfig, action_dim: int | None) -> WorldModel:
    """The base with the run's conditions, and with LoRA where that is asked for; what is trained requires a gradient.

    Raises TrainingError where it does not compute what the base does, ValueError for LoRA targets that match nothing and an
    `init_adapter` of another shape.
    """
    transformer = CosmosWorldTransformer3D.from_pretrained(Path(config.init_from) / "transformer")
    changes = config_changes(config, action_dim)
    if config.lora_rank:
        freeze(transformer, config)
    check_step_zero(transformer, lambda: _prepare(transformer, config, changes))
    go_on_from(transformer, config, changes)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    tell_trained(transformer)
    return WorldModel(transformer, None, build_uncertainty(config))


def config_changes(config: PosttrainConfig, action_dim: int | None) -> dict:
    """The conditions as fields of the transformer's config."""
    changes = {"camera_channels": CAMERA_CHANNELS} if "camera" in config.conditions else {}
    if action_dim is not None:
        changes |= {"action_dim": action_dim, "action_form": config.action_form}
        changes |= {"action_hidden_dim": config.action_hidden_dim} if config.action_hidden_dim else {}
    if config.text_refiner_layers:
        changes["text_refiner_layers"] = config.text_refiner_layers
    if "views" in config.conditions:
        changes |= {"num_views": len(config.views), "view_embed_dim": VIEW_EMBED_DIM}
    return changes


def _prepare(transformer: CosmosWorldTransformer3D, config: PosttrainConfig, changes: dict):
    for name in changes:
        if name not in HOW_ACTIONS_ENTER and has_condition(transformer, name):
            raise ValueError(f"the base has {name}={transformer.config[name]} already; post-train one without it")
    extend_conditions(transformer, **changes)
    if not config.lora_rank:
        return
    add_lora(transformer, config, "transformer_blocks")
    for name in added_parts(changes):
        learn_as_new(getattr(transformer, name).parameters(), config)
    if groups := added_columns(changes):
        columns = channel_columns(transformer.config, transformer.patch_embed.patch_size)
        transformer.patch_embed.proj = GrownLinear(transformer.patch_embed.proj, [columns[name] for name in groups])
        learn_as_new([transformer.patch_embed.proj.added], config)


def check_step_zero(transformer: CosmosWorldTransformer3D, change: Callable[[], None]):
    """`check_same_output` of one evaluation with conditions that are not zero, of a single view."""
    mixed = any(parameter.dtype == torch.bfloat16 for parameter in transformer.parameters())

    def output():
        config = transformer.config
        side, frames = 4 * config.patch_size[1], 3 * config.patch_size[0]
        others = wave_conditions(transformer, frames, side, "cpu")
        if config.num_views > 1:
            others["num_views"] = 1
        if transformer.takes_condition_mask:
            others["condition_mask"] = torch.zeros(1, 1, frames, side, side)
        x = torch.arange(config.out_channels * frames * side**2).float().sin().view(1, -1, frames, side, side)
        text = torch.arange(8.0 * config.text_embed_dim).cos().view(1, 8, -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return transformer(x, torch.zeros(1), text, **others).sample.float()

    check_same_output(output, change)


# ---- export --------------------------------------------------------------------------------------------------------


def trained_on(config: PosttrainConfig, batches: ConditionBatches, sample: dict) -> dict:
    """Settings of the run as a pipeline's, which differ from the base's where the clips do."""
    height, width = (size * batches.spatial for size in sample["latents"].shape[-2:])
    return dict(height=height, width=width, num_frames=config.num_frames, fps=sample["fps"])


def export_adapter(
    model: WorldModel, folder: Path, config: PosttrainConfig, batches: ConditionBatches, sample: dict | None = None
):
    """Write what was learned beside the base: LoRA, new columns and modules, what actions mean, the views' names; and for a
    `sample` of the data the size and rate of what was trained on."""
    told = dict(num_frames=config.num_frames, condition_dropout=config.condition_dropout)
    if "views" in config.conditions:
        told["views"] = config.views
    if sample is not None:
        told["settings"] = trained_on(config, batches, sample)
    changes = config_changes(config, batches.action_dim)
    save_adapter(model.transformer, Path(folder), changes, batches.spec, names=config.conditions, **told)
