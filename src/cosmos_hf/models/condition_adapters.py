"""Conditions that a base model learned later, kept apart from it: the new columns of its first layer and the new modules.

A folder of an adapter holds them beside the LoRA weights of the blocks, so that it can be put onto the base again, alone or with
others:

    pytorch_lora_weights.safetensors   the LoRA, as diffusers writes it (absent where there is none)
    conditions.json                    which conditions were added, and to what kind of base
    conditions.safetensors             the new columns, `patch_embed.<what they read>`, and the new modules' weights

Both families of models have such: how an autoregressive one is extended says `ar_conditions`, a diffusion one `dit_conditions`.
"""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from . import ar_conditions
from .dit_conditions import HOW_ACTIONS_ENTER, PARTS, channel_columns, extend_conditions, withdraw_conditions

RECORD, WEIGHTS = "conditions.json", "conditions.safetensors"
COLUMNS = "patch_embed."
COMPANIONS = (*HOW_ACTIONS_ENTER, "actions_per_frame")  # fields that say how another one's condition is meant
# What the blocks' weights and the meaning of the input depend on; a base that differs in these is another one.
BASE_FIELDS = (
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "mlp_ratio",
    "text_embed_dim",
    "adaln_lora_dim",
    "patch_size",
    "rope_scale",
    "concat_padding_mask",
    "extra_pos_embed_type",
)
_ADDED_COLUMNS = {"camera_channels": "camera", "condition_channels": "condition", "view_embed_dim": "views"}
_NEW_PARTS = {
    "action_dim": "action_embed",
    "view_embed_dim": "view_embed",
    "condition_vocab_size": "condition_embed",
    "text_refiner_layers": "text_refiner",
}


class GrownLinear(nn.Module):
    """A linear layer without bias whose base columns stay as they are, to the bit, while the added ones are trained.

    Columns of one parameter cannot be frozen by themselves: an optimizer's weight decay would shrink them.
    """

    def __init__(self, linear: nn.Linear, added: list[slice]):
        super().__init__()
        columns = torch.arange(linear.in_features)
        new = torch.cat([columns[part] for part in added])
        old = columns[~torch.isin(columns, new)]
        self.register_buffer("new_columns", new, persistent=False)
        self.register_buffer("base_columns", old, persistent=False)
        self.weight = nn.Parameter(linear.weight.detach()[:, old].clone(), requires_grad=False)
        self.added = nn.Parameter(linear.weight.detach()[:, new].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = F.linear(x[..., self.base_columns], self.weight)
        return base + F.linear(x[..., self.new_columns], self.added)


@dataclass
class ConditionAdapter:
    """Conditions and their weights.

    Attributes:
        changes: fields of the transformer's config and their values, as `add_conditions` takes them.
        weights: of the new parts, on the CPU.
        base: `BASE_FIELDS` of the transformer that they were trained on.
        record: what else is worth keeping, JSON-able.
    """

    changes: dict
    weights: dict[str, torch.Tensor]
    base: dict
    record: dict = field(default_factory=dict)

    @classmethod
    def of(cls, model, changes: dict, **record) -> "ConditionAdapter":
        """What `model` has learned for the conditions that `changes` added to it."""
        weights = added_weights(model, changes)
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
        return cls(dict(changes), weights, base_fields(model), record)

    def save(self, folder: str | Path):
        Path(folder).mkdir(parents=True, exist_ok=True)
        record = {"conditions": self.changes, "base": self.base, **self.record}
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=2))
        save_file(self.weights, Path(folder) / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> "ConditionAdapter":
        """Read what `save` wrote. FileNotFoundError or ValueError where a file is missing or says something else."""
        folder = Path(folder)
        for name in (RECORD, WEIGHTS):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder / name} is missing: the folder holds no adapter with conditions")
        record = json.loads((folder / RECORD).read_text())
        missing = {"conditions", "base"} - record.keys()
        if missing:
            raise ValueError(f"{folder / RECORD} lacks {', '.join(sorted(missing))}")
        return cls(record.pop("conditions"), load_file(folder / WEIGHTS), record.pop("base"), record)

    @torch.no_grad()
    def add_to(self, model, scale: float = 1.0):
        """Extend the model in place. `scale` weakens or strengthens what the conditions do, as a LoRA's weight does.

        Raises ValueError for a base of another kind, a condition that the model has already, and weights that do not fit.
        """
        self.check_base(model)
        if present := [name for name in self.changes if name not in COMPANIONS and has_condition(model, name)]:
            raise ValueError(f"the model has this condition already: {', '.join(present)}")
        extend = ar_conditions.extend_conditions if is_autoregressive(model) else extend_conditions
        extend(model, **self.changes)
        try:
            self.fill(model, scale)
        except ValueError:
            self.remove_from(model)
            raise

    @torch.no_grad()
    def fill(self, model, scale: float = 1.0):
        """Put the weights into a model that has the conditions already. ValueError for weights that do not fit."""
        left, is_output = dict(self.weights), ar_conditions.is_output if is_autoregressive(model) else _is_output
        for name, tensor in added_weights(model, self.changes).items():
            value = self._take(left, name, tensor.shape).to(tensor)
            tensor.copy_(scale * value if is_output(name) else value)
        if left:
            raise ValueError(f"the adapter's weights {', '.join(sorted(left))} belong to no condition that it adds")

    @staticmethod
    def _take(weights: dict, name: str, shape: torch.Size) -> torch.Tensor:
        if name not in weights:
            raise ValueError(f"the adapter lacks the weight {name}")
        value = weights.pop(name)
        if value.shape != shape:
            raise ValueError(f"the adapter's {name} is {tuple(value.shape)}, the model needs {tuple(shape)}")
        return value

    def remove_from(self, model):
        """Undo `add_to`."""
        withdraw = ar_conditions.withdraw_conditions if is_autoregressive(model) else withdraw_conditions
        withdraw(model, **self.changes)

    def check_base(self, model):
        mine = base_fields(model)
        different = [
            f"{name} {mine.get(name)}, needed {value}" for name, value in self.base.items() if mine.get(name) != value
        ]
        if different:
            raise ValueError(f"the adapter was trained on another kind of base: {'; '.join(different)}")


def is_autoregressive(model) -> bool:
    return isinstance(model, PreTrainedModel)


def base_fields(model) -> dict:
    if is_autoregressive(model):
        return ar_conditions.base_fields(model)
    values = {name: model.config[name] for name in BASE_FIELDS}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return values | {"takes_condition_mask": model.takes_condition_mask}


def has_condition(model, name: str) -> bool:
    """Whether a field of the config has another value than in a model without conditions."""
    if is_autoregressive(model):
        return ar_conditions.has_condition(model, name)
    return model.config[name] != inspect.signature(type(model).__init__).parameters[name].default


def added_columns(changes: dict) -> list[str]:
    """Names of the first layer's channels that `changes` adds."""
    return [group for name, group in _ADDED_COLUMNS.items() if changes.get(name)]


def added_parts(changes: dict) -> list[str]:
    """Names of the modules that `changes` adds."""
    return [part for part in PARTS if any(changes.get(name) and p == part for name, p in _NEW_PARTS.items())]


def added_weights(model, changes: dict) -> dict[str, torch.Tensor]:
    """The weights of what `changes` added, as they stand in the model, by their names in an adapter."""
    if is_autoregressive(model):
        return ar_conditions.added_weights(model, changes)
    proj = model.patch_embed.proj
    columns = channel_columns(model.config, model.patch_embed.patch_size)
    columns = {name: columns[name] for name in added_columns(changes)}
    if isinstance(proj, GrownLinear):
        parts = proj.added.detach().split([part.stop - part.start for part in columns.values()], dim=1)
    else:
        parts = [proj.weight.detach()[:, part] for part in columns.values()]
    weights = {COLUMNS + name: part for name, part in zip(columns, parts, strict=True)}
    for name in added_parts(changes):
        weights |= {f"{name}.{key}": value for key, value in getattr(model, name).state_dict().items()}
    return weights


def _is_output(name: str) -> bool:
    """Whether a condition of a diffusion model acts in proportion to this weight."""
    return name.startswith((COLUMNS, "text_refiner.proj_out.")) or ".linear_2." in f".{name}"
