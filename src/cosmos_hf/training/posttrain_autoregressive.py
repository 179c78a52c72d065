"""Post-training of an autoregressive world model with actions, instructions and views (arXiv 2501.03575, sections 6.2 and 6.3).

As `posttrain` for the other family: from a pipeline's folder, by LoRA or in full, with new parts that start at zero and are kept
with the adapter. Actions enter every layer by cross-attention; a base that knows no text gets cross-attention to that, too. The
views of several cameras stand one below the other in a frame of codes.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import T5EncoderModel

from ..conditioning.action import ActionSpec, group_actions
from ..models.ar_conditions import ADDABLE, added_parts, added_weights, extend_conditions, has_condition
from ..models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from ..models.ar_loss import IGNORED
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from .action_specs import without_range
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
    sensitivities,
    tell_trained,
)
from .autoregressive import (
    ARWorldModel,
    AutoregressiveConfig,
    AutoregressiveLoss,
    TokenBatches,
    validate,
)
from .cache import LatentDataset
from .diffusion import Texts

INPUTS = {"action": "actions", "instruction": "text"}  # condition -> what a batch calls it
CONDITIONS = (*INPUTS, "views")
# Settings of a training from scratch that a post-training takes from its base.
OF_THE_BASE = ("preset", "train_text_encoder", "text_preset", "vocab_size", "add_cross_attention", "freeze_base")
OF_THE_BASE += ("yarn_scale", "temperature", "top_p")


@dataclass
class ARPosttrainConfig(AdapterSettings, AutoregressiveConfig):
    conditions: list[str] = field(
        default_factory=list, metadata={"help": "what to learn: one or several of action, instruction, views"}
    )
    views: list[str] = field(
        default_factory=list,
        metadata={"help": "names of the clips' cameras, in the order in which they are generated"},
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "ends of the names of the layers in every block"},
    )
    num_frames: int = field(default=0, metadata={"help": "length of a window in pixel frames; 0: the base's"})
    max_sequence_length: int = field(default=0, metadata={"help": "text tokens; 0: the base's"})

    def __post_init__(self):
        check_init_from(self, OF_THE_BASE, {f.name: f.default for f in dataclasses.fields(self)})
        self.vae = self.vae or str(Path(self.init_from) / "vae")
        settings, base = pipeline_settings(self.init_from), self._base_config()
        if not self.text_encoder and (Path(self.init_from) / "text_encoder").is_dir():
            self.text_encoder = self.init_from
        self.num_frames = self.num_frames or settings.get("num_frames", 33)
        self.max_sequence_length = self.max_sequence_length or settings.get("max_sequence_length", 512)
        super().__post_init__()
        unknown = [name for name in self.conditions if name not in CONDITIONS]
        if unknown or not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(
                f"conditions of an autoregressive base must be one or several of {', '.join(CONDITIONS)}, got {self.conditions}"
            )
        self.views = check_run_views(self, settings.get("views"))
        reads_text = base.get("cross_attention_dim") is not None or "instruction" in self.conditions
        if base and reads_text and not self.text_encoder:
            raise ValueError(
                "the base has no text_encoder: give text_encoder, a folder with text_encoder/ and tokenizer/"
            )
        if base and not reads_text and self.text_encoder:
            raise ValueError("text_encoder would be ignored: neither the base nor the conditions read text")

    def _base_config(self) -> dict:
        folder = Path(self.init_from) / "transformer"
        return CosmosARConfig.get_config_dict(folder)[0] if folder.is_dir() else {}

    @property
    def arrays(self) -> tuple[str, ...]:
        """What samples must have besides their videos and captions."""
        return ("actions",) if "action" in self.conditions else ()

    @property
    def cameras(self) -> tuple[str, ...] | None:
        """The cameras of a clip to read together; None for one alone."""
        return tuple(self.views) or None


class ConditionTokens(TokenBatches):
    """`TokenBatches` with `actions` [B, T', f A], and text that is zero for samples without a caption."""

    def __init__(
        self,
        config: ARPosttrainConfig,
        model_config: CosmosARConfig,
        texts: Texts | None,
        spec: ActionSpec | None,
        vae: CosmosVideoTokenizer,
    ):
        super().__init__(config, model_config, texts)
        self.spec = spec
        self._read = spec and without_range(spec)  # `find_action_spec` has looked at the range
        self.spatial, self.temporal = vae.config.spatial_compression, vae.config.temporal_compression

    def collate(self, samples: list[dict]) -> dict:
        batch = super().collate(samples)
        if self.texts is not None:
            told = torch.tensor([bool(sample["caption"]) for sample in samples])
            batch["text"] = batch["text"] * told[:, None, None]
        if self.spec is not None:
            batch["actions"] = torch.stack([self._actions(sample) for sample in samples])
        return batch

    def _actions(self, sample: dict) -> torch.Tensor:
        with errors_of(sample):
            return group_actions(self._read.inputs(sample["actions"], sample["fps"]), self.temporal)


# ---- model ---------------------------------------------------------------------------------------------------------


def build_model(config: ARPosttrainConfig, spec: ActionSpec | None, temporal: int) -> tuple[ARWorldModel, dict]:
    """The base with the run's conditions, and with LoRA where that is asked for; and what was added to its config.

    temporal: the tokenizer's factor, actions per latent frame. Raises TrainingError where the model does not compute what the
    base does, ValueError for LoRA targets that match nothing, a condition that the base has and an `init_adapter` of another shape.
    """
    transformer = CosmosARForCausalLM.from_pretrained(Path(config.init_from) / "transformer").eval()
    changes = config_changes(config, transformer.config, spec, temporal)
    transformer.config.z_loss_weight = config.z_loss_weight
    if config.lora_rank:
        freeze(transformer, config)

    absent = [name for name in ADDABLE if not has_condition(transformer, name)]

    def prepare():
        extend_conditions(transformer, **changes)
        if config.lora_rank:
            # No LoRA in what the base lacks, though another adapter may bring it one day.
            add_lora(transformer, config, "model.layers", added_parts(absent))
            learn_as_new((transformer.get_parameter(name) for name in added_weights(transformer, changes)), config)

    check_step_zero(transformer, prepare, "views" in config.conditions)
    go_on_from(transformer, config, changes)
    if config.gradient_checkpointing:
        transformer.gradient_checkpointing_enable()
    tell_trained(transformer)
    return ARWorldModel(transformer), changes


def config_changes(config: ARPosttrainConfig, base: CosmosARConfig, spec: ActionSpec | None, temporal: int) -> dict:
    """The conditions as fields of the transformer's config."""
    changes, width = {}, None
    if config.has_text:
        width = T5EncoderModel.config_class.from_pretrained(Path(config.text_encoder) / "text_encoder").d_model
    if config.has_text and base.cross_attention_dim is None:
        changes["cross_attention_dim"] = width
    elif config.has_text and base.cross_attention_dim != width:
        raise ValueError(f"the text encoder is {width} wide, the transformer takes {base.cross_attention_dim}")
    if "views" in config.conditions:
        changes["num_views"] = len(config.views)
    if spec is not None:
        changes |= {"action_dim": temporal * spec.num_inputs, "actions_per_frame": temporal}
        if base.action_dim is not None:
            raise ValueError(f"the base has action_dim={base.action_dim} already; post-train one without it")
    return changes


def check_step_zero(transformer: CosmosARForCausalLM, change, new_views: bool = False):
    """`check_same_output` of the logits of some codes, with conditions that are not zero; of new views for the first one."""
    height, width = transformer.config.latent_shape[1:]
    mixed = any(parameter.dtype == torch.bfloat16 for parameter in transformer.parameters())

    def output():
        config, given = transformer.config, {}
        shape = (2, *config.latent_shape[1:])
        count = min(config.num_positions(shape), 3 * height * width // 2)
        tokens = torch.arange(count)[None] * 7919 % config.codebook_size
        if config.cross_attention_dim is not None:
            text = torch.arange(3.0 * config.cross_attention_dim).cos().view(1, 3, -1)
            given["encoder_hidden_states"] = text
        if config.action_dim is not None:
            given["actions"] = torch.arange(2.0 * config.action_dim).sin().view(1, 2, -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = transformer(tokens, latent_shape=shape, use_cache=False, **given).logits.float()
        return logits[:, : height * width] if new_views else logits

    check_same_output(output, change)


# ---- loss ----------------------------------------------------------------------------------------------------------


class ARConditionedLoss(AutoregressiveLoss):
    """`compute_loss` of `fit`: actions are zeroed for a share of samples, and once per log line every condition's effect is
    measured."""

    calls = 0

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        logs = {}
        if self.calls % (self.config.log_every * self.config.gradient_accumulation) == 0:
            logs = {name: value for name, value in self.sensitivity(model, batch).items() if name.startswith("sens")}
        self.calls += 1
        if "actions" in batch:
            actions = batch["actions"]
            keep = torch.rand(len(actions), device=actions.device) >= self.config.condition_dropout
            batch = batch | {"actions": actions * keep[:, None, None]}
        loss, more = super().__call__(model, batch)
        return loss, more | logs

    @torch.no_grad()
    def sensitivity(self, model: nn.Module, batch: dict) -> dict[str, float]:
        """For every condition of the run what changes when each sample gets the next one's.

        `sensitivity_<name>`: rms of the change of the states before the output layer over their rms, where codes are predicted.
        `error_ratio_<name>`: cross-entropy with the wrong condition over that with the right one; above 1 where it is of use.
        NaN for a single sample.
        """
        predicted = batch["labels"][:, 1:] != IGNORED

        def evaluate(inputs):
            given = (inputs["tokens"], inputs["labels"], inputs["latent_shape"], inputs.get("text"))
            loss, states = model(*given, actions=inputs.get("actions"), with_states=True)
            return loss.cross_entropy, states[:, :-1][predicted].float()

        figures, several = {}, len(batch["tokens"]) > 1
        error, states = evaluate(batch)
        for name in (name for name in self.config.conditions if name in INPUTS):
            key = INPUTS[name]
            wrong, others = evaluate(batch | {key: batch[key].roll(1, 0)})
            change = (others - states).square().mean().sqrt() / states.square().mean().sqrt()
            figures[f"sensitivity_{name}"] = float(change) if several else float("nan")
            figures[f"error_ratio_{name}"] = float(wrong / error) if several else float("nan")
        return figures


def validate_conditions(
    model: ARWorldModel,
    loss: ARConditionedLoss,
    batches: ConditionTokens,
    datasets: dict[str, LatentDataset],
    batch_size: int,
) -> dict:
    """`autoregressive.validate`, and the sensitivity to every condition on every validation set."""
    figures = validate(model, batches, datasets, batch_size)
    return figures | sensitivities(model, loss, batches, datasets, batch_size)


# ---- export --------------------------------------------------------------------------------------------------------


def trained_on(config: ARPosttrainConfig, batches: ConditionTokens, sample: dict) -> dict:
    """Settings of the run as a pipeline's, which differ from the base's where the clips do."""
    rows, columns = sample["indices"].shape[1:]
    height, width = rows // max(1, len(config.views)) * batches.spatial, columns * batches.spatial
    return dict(height=height, width=width, num_frames=config.num_frames, fps=sample["fps"])


def export_adapter(
    model: ARWorldModel, folder: Path, config: ARPosttrainConfig, changes: dict, batches: ConditionTokens, sample: dict
):
    """Write what was learned beside the base: LoRA, new modules, what actions mean, the views, and what it was trained on."""
    told = {name: getattr(config, name) for name in ("num_frames", "max_sequence_length", "condition_dropout")}
    told |= dict(settings=trained_on(config, batches, sample), **(dict(views=config.views) if config.views else {}))
    save_adapter(model.transformer, Path(folder), changes, batches.spec, names=config.conditions, **told)
