"""Conditions that an autoregressive base learns later: text and actions, each by cross-attention in its layers, and views.

The counterpart of `dit_conditions` for `condition_adapters`. The output projections of new attention and the vectors of views start
at zero, so that a model with new conditions at first computes what its base does, whatever the conditions are; of several
views for the first one, which at first is alone.
"""

import torch
from torch import nn

from .ar_layers import CosmosARActionEmbedding, context_parts
from .linear import speed_up

ADDABLE = ("cross_attention_dim", "action_dim", "actions_per_frame", "num_views")
# What the layers' weights and the meaning of the tokens depend on; a base that differs in these is another one.
BASE_FIELDS = (
    "vocab_size",
    "codebook_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "bov_token_id",
    "absolute_positions",
)
_EMBEDDINGS = {"action_dim": "action_embed", "num_views": "view_embed"}
_ATTENTION = {"cross_attention_dim": "cross_attn", "action_dim": "action_attn"}


def base_fields(model) -> dict:
    return {name: getattr(model.config, name) for name in BASE_FIELDS}


def has_condition(model, name: str) -> bool:
    """Whether a field of the config has another value than in a model without conditions."""
    return getattr(model.config, name) != getattr(type(model.config), name)


def extend_conditions(model, **changes):
    """Give a `CosmosARForCausalLM` conditions, in place: the weights that it has stay the tensors that they are.

    Raises ValueError for a change that is no condition, or one that the model has.
    """
    if unknown := sorted(changes.keys() - set(ADDABLE)):
        raise ValueError(f"{', '.join(unknown)} cannot be added to a model; conditions are {', '.join(ADDABLE)}")
    if present := [name for name in changes if has_condition(model, name)]:
        raise ValueError(f"the model has {', '.join(present)} already")
    config = model.config
    for name, value in changes.items():
        setattr(config, name, value)
    for i, layer in enumerate(model.model.layers):
        for name, part in context_parts(config, i).items():
            if getattr(layer, name, None) is None:
                setattr(layer, name, _started(model, part))
    if "action_dim" in changes:
        model.model.action_embed = _started(model, CosmosARActionEmbedding(config))
    if "num_views" in changes:
        time, height, width = config.latent_shape
        config.latent_shape = [time, config.num_views * height, width]
        model.model.view_embed = _started(model, nn.Embedding(config.num_views, config.hidden_size))
    model.train(model.training)


def withdraw_conditions(model, **changes):
    """Undo `extend_conditions` with these changes, in place."""
    if "num_views" in changes:
        time, height, width = model.config.latent_shape
        model.config.latent_shape = [time, height // model.config.num_views, width]
        model.model.view_embed = None
    for name in changes:
        setattr(model.config, name, getattr(type(model.config), name))
    for layer in model.model.layers:
        for name in (_ATTENTION[field] for field in changes if field in _ATTENTION):
            if getattr(layer, name) is not None:
                delattr(layer, name)
                delattr(layer, f"{name}_layernorm")
                setattr(layer, name, None)
    if "action_dim" in changes:
        model.model.action_embed = None


def added_parts(fields) -> tuple[str, ...]:
    """The attention in each layer that these fields of the config add, by its name there."""
    return tuple(_ATTENTION[field] for field in fields if field in _ATTENTION)


def added_weights(model, changes: dict) -> dict[str, torch.Tensor]:
    """The weights of what `changes` added, as they stand in the model, by their names in it."""
    parts = added_parts(changes)
    new = {*parts, *(f"{part}_layernorm" for part in parts)}
    new |= {part for field, part in _EMBEDDINGS.items() if field in changes}
    return {name: tensor for name, tensor in model.state_dict().items() if new & set(name.split("."))}


def is_output(name: str) -> bool:
    """Whether a condition acts in proportion to this weight."""
    return name.endswith((".o_proj.weight", "view_embed.weight"))


@torch.no_grad()
def _started(model, part: nn.Module) -> nn.Module:
    """First weights as a new model has them, but zero where the part writes to the residual."""
    for module in part.modules():
        model._init_weights(module)
    if hasattr(part, "o_proj"):
        part.o_proj.weight.zero_()
    if isinstance(part, nn.Embedding):
        part.weight.zero_()
    speed_up(part)
    return part.to(model.device, model.dtype)
