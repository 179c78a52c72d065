"""Layers of the autoregressive world models (arXiv 2501.03575, section 5.2): positions on the latent grid, attention, blocks.

Tokens are the codes of a latent grid [T, H, W], flattened with the width fastest; a model that is told about text has `<bov>`
in front, which stands at no grid point. Several views stand one below the other in a frame, each with the positions of a single
one; H is the height of all. Axes: B batch, S positions, N heads, D width.
"""

import math

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# ---- positions ------------------------------------------------------------------------------------------------------


def axis_frequencies(config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary frequencies of the time, height and width axis, float32; together half of `head_dim`."""
    spatial = 2 * (config.head_dim // 6)
    temporal = config.head_dim - 2 * spatial

    def frequencies(size):
        return config.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)

    axes = (frequencies(temporal), frequencies(spatial), frequencies(spatial))
    if config.yarn_scale is None:
        return axes
    time, height, width = config.yarn_original_shape
    # The published models count the height's size for the width, too.
    lengths = (time, height, height if config.yarn_width_from_height else width)
    return tuple(_yarn(axis, length, config) for axis, length in zip(axes, lengths, strict=True))


def _yarn(frequencies: torch.Tensor, length: int, config) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): frequencies that turn less than once over the trained length are divided by the scale."""
    high, low = (2 * math.pi * beta / length for beta in (config.yarn_beta_fast, config.yarn_beta_slow))
    kept = ((frequencies - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.yarn_scale)


def _grid(config, latent_shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Coordinates (time, height within the view, width) of every token of the grid, each [T * H * W]."""
    time, height, width = latent_shape
    if height % config.num_views:
        raise ValueError(
            f"latent_shape {list(latent_shape)}: {height} rows are not those of {config.num_views} views, one below the other"
        )
    rows = torch.arange(height) % (height // config.num_views)
    axes = torch.meshgrid(torch.arange(time), rows, torch.arange(width), indexing="ij")
    return [axis.flatten() for axis in axes]


def view_of(config, position_ids: torch.Tensor, latent_shape) -> torch.Tensor:
    """The view in which every position stands; of `<bov>` the first."""
    _, height, width = latent_shape
    place = (position_ids - int(config.bov_token_id is not None)).clamp_min(0)
    return place // width % height // (height // config.num_views)


class GridPositions(nn.Module):
    """Rotations, and where the config has it the absolute embedding, of every position of a latent grid.

    Tables are made on the first call for a grid and kept; they are no weights and in no checkpoint.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self._tables = config, {}

    def forward(self, position_ids, latent_shape, dtype) -> tuple[tuple, torch.Tensor | None]:
        """Position ids [B or 1, S] -> ((cos, signed sin) [B or 1, S, head_dim], absolute embedding [B or 1, S, D] or None)."""
        key = (latent_shape, self.config.num_views, position_ids.device, dtype)
        if key not in self._tables:
            if len(self._tables) >= 8:  # a served model may see many grids
                self._tables.clear()
            cos, sin = rotation_table(self.config, latent_shape)
            half = sin.shape[1] // 2
            signed = torch.cat([-sin[:, :half], sin[:, half:]], dim=1)  # the sign that `rotate` needs
            made = (cos, signed, absolute_table(self.config, latent_shape))
            self._tables[key] = [None if t is None else t.to(position_ids.device, dtype) for t in made]
        cos, sin, absolute = self._tables[key]
        return (cos[position_ids], sin[position_ids]), None if absolute is None else absolute[position_ids]


def rotation_table(config, latent_shape) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions + 1, head_dim] in float32; `<bov>` is not rotated, nor is the place behind the video.

    transformers' assisted generation looks at that place when it checks guesses at the very end.
    """
    angles = [c[:, None] * f for c, f in zip(_grid(config, latent_shape), axis_frequencies(config), strict=True)]
    angles = _framed(config, torch.cat(angles, dim=1).repeat(1, 2))
    # The reference computes YaRN's attention temperature and does not apply it.
    scale = 0.1 * math.log(config.yarn_scale) + 1 if config.yarn_scale and config.yarn_attention_temperature else 1.0
    return angles.cos() * scale, angles.sin() * scale


def absolute_table(config, latent_shape) -> torch.Tensor | None:
    """Sine embedding [positions + 1, D], rounded to bfloat16 as the models were trained with; zero for `<bov>`."""
    if config.absolute_positions is None:
        return None
    spatial = 2 * (config.hidden_size // 6)
    sizes = (config.hidden_size - 2 * spatial, spatial, spatial)
    parts = []
    for coordinate, size in zip(_grid(config, latent_shape), sizes, strict=True):
        omega = 10000 ** -(torch.arange(size // 2, dtype=torch.float64) / (size / 2))
        angle = coordinate[:, None] * omega
        parts += [angle.sin(), angle.cos()]
    return _framed(config, torch.cat(parts, dim=1)).bfloat16()


def _framed(config, table: torch.Tensor) -> torch.Tensor:
    """A row of zeros in front, where the model has `<bov>`, and one behind."""
    return nn.functional.pad(table, (0, 0, int(config.bov_token_id is not None), 1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [B, N, S, head_dim]; the first half of the channels pairs with the second, where sin is negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


# ---- layers ---------------------------------------------------------------------------------------------------------


class CosmosARRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # Statistics in float32, rounded before the weight, as the reference does.
        return nn.functional.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def projection(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A linear layer without bias that says how it is to be initialised."""
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.init_std = std
    return linear


def residual_std(layer_idx: int) -> float:
    """Layers that write to the residual start the smaller the deeper they are."""
    return 0.02 / (2 * (layer_idx + 1)) ** 0.5


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling: float, dropout: float = 0.0, is_causal=None, **kwargs
):
    """Attention written out; the one backend that returns its weights. Same signature as transformers' backends."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def with_context_cache(cache: Cache | None, config) -> Cache | None:
    """A cache that also keeps the context's keys and values, where the model has such."""
    if cache is None or not config.has_context or isinstance(cache, EncoderDecoderCache):
        return cache
    return EncoderDecoderCache(cache, DynamicCache())  # grows by layers: text has the first ones, actions the next


def self_attention_cache(cache: Cache | None) -> Cache | None:
    """The part of a cache that holds the past, where another holds the context."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class CosmosARAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys: over the past, or with `context_dim` over a context.

    The context's keys and values are computed once and kept in the cache, at the place `layer_idx`.
    """

    def __init__(self, config, layer_idx: int, context_dim: int | None = None):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, context_dim is None
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        queries, keys = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = projection(config.hidden_size, queries, 0.02)
        self.k_proj = projection(context_dim or config.hidden_size, keys, 0.02)
        self.v_proj = projection(context_dim or config.hidden_size, keys, 0.02)
        self.o_proj = projection(queries, config.hidden_size, residual_std(layer_idx))
        self.q_norm = CosmosARRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = CosmosARRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        context: torch.Tensor | None = None,
        key_length: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, D] -> ([B, S, D], weights or None).

        rotation: cos and signed sin [B or 1, S, head_dim], for attention over the past. context: [B, L, context_dim], else.
        key_length: how many of a static cache's positions are filled, where only those shall be read.
        """
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        if rotation is not None:
            cos, sin = (t.unsqueeze(1) for t in rotation)
            query = rotate(query, cos, sin)
            key, value = self._keys_and_values(hidden_states)
            key = rotate(key, cos, sin)
            if past_key_values is not None:
                key, value = self_attention_cache(past_key_values).update(key, value, self.layer_idx)
            if key_length is not None:
                key, value = key[:, :, :key_length], value[:, :, :key_length]
        else:
            key, value = self._cached_context(context, past_key_values)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, is_causal=self.is_causal,
            **kwargs,
        )  # fmt: skip
        return self.o_proj(out.reshape(*hidden_states.shape[:2], -1)), weights

    def _keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*states.shape[:2], -1, self.head_dim)
        key = self.k_norm(self.k_proj(states).view(shape)).transpose(1, 2)
        return key, self.v_proj(states).view(shape).transpose(1, 2)

    def _cached_context(self, context, past_key_values) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(past_key_values, EncoderDecoderCache):
            return self._keys_and_values(context)
        cache = past_key_values.cross_attention_cache
        if not past_key_values.is_updated.get(self.layer_idx):
            past_key_values.is_updated[self.layer_idx] = True
            return cache.update(*self._keys_and_values(context), self.layer_idx)
        layer = cache.layers[self.layer_idx]
        return layer.keys, layer.values


class CosmosARMLP(nn.Module):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.gate_proj = projection(config.hidden_size, config.intermediate_size, 0.02)
        self.up_proj = projection(config.hidden_size, config.intermediate_size, residual_std(layer_idx))
        self.down_proj = projection(config.intermediate_size, config.hidden_size, residual_std(layer_idx))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class CosmosARActionEmbedding(nn.Module):
    """Actions [B, T, action_dim] of latent frames -> [B, T * actions_per_frame, D], one vector for each action."""

    def __init__(self, config):
        super().__init__()
        self.count, width = config.actions_per_frame, config.action_dim // config.actions_per_frame
        # As large as the embedding of an action's place among those of its latent frame.
        self.linear_1 = projection(width, config.hidden_size, width**-0.5)
        self.linear_2 = projection(config.hidden_size, config.hidden_size, config.hidden_size**-0.5)
        self.place = nn.Embedding(self.count, config.hidden_size)

    def forward(self, actions: torch.Tensor) -> torch.Tensor:
        steps = actions.to(self.place.weight.dtype).unflatten(-1, (self.count, -1))
        return (self.linear_2(nn.functional.silu(self.linear_1(steps))) + self.place.weight).flatten(1, 2)


def action_mask(config, position_ids: torch.Tensor, latent_shape, dtype: torch.dtype) -> torch.Tensor:
    """Position ids [B or 1, S] -> what is added to scores [B or 1, 1, S, T * actions_per_frame].

    A position sees the actions that lead to the latent frame of the code that it predicts, so that a later action changes
    nothing before its time.
    """
    time, height, width = latent_shape
    predicted = position_ids + int(config.bov_token_id is None)  # place of the predicted code in the video
    frame = predicted.div(height * width, rounding_mode="floor").clamp_max(time - 1)
    owner = torch.arange(time, device=position_ids.device).repeat_interleave(config.actions_per_frame)
    hidden = frame[..., None] != owner
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def context_parts(config, layer_idx: int) -> dict[str, nn.Module]:
    """What a layer has to attend to contexts, by the names in `CosmosARDecoderLayer`: text, and actions."""
    parts = {}
    if config.has_cross_attention(layer_idx):
        parts["cross_attn_layernorm"] = CosmosARRMSNorm(config.hidden_size, config.rms_norm_eps)
        parts["cross_attn"] = CosmosARAttention(config, layer_idx, context_dim=config.cross_attention_dim)
    if config.action_dim is not None:
        parts["action_attn_layernorm"] = CosmosARRMSNorm(config.hidden_size, config.rms_norm_eps)
        place = config.num_hidden_layers + layer_idx
        parts["action_attn"] = CosmosARAttention(config, place, context_dim=config.hidden_size)
        parts["action_attn"].o_proj.init_std = 0.0  # a model that is given actions is the model it was
    return parts


class CosmosARDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.input_layernorm = CosmosARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = CosmosARAttention(config, layer_idx)
        self.cross_attn = self.action_attn = None
        for name, part in context_parts(config, layer_idx).items():
            setattr(self, name, part)
        self.post_attention_layernorm = CosmosARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = CosmosARMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        absolute: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        key_length: int | None = None,
        actions: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; masks as the attention backend takes them, actions embedded."""
        if absolute is not None:
            hidden_states = hidden_states + absolute
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(
            normed, rotation, attention_mask, past_key_values, key_length=key_length, **kwargs
        )[0]  # fmt: skip
        if self.cross_attn is not None:
            normed = self.cross_attn_layernorm(hidden_states)
            hidden_states = hidden_states + self.cross_attn(
                normed, None, context_mask, past_key_values, context=context, **kwargs
            )[0]  # fmt: skip
        if self.action_attn is not None:
            normed = self.action_attn_layernorm(hidden_states)
            hidden_states = hidden_states + self.action_attn(
                normed, None, action_mask, past_key_values, context=actions, **kwargs
            )[0]  # fmt: skip
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
