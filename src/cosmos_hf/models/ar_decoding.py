"""Decoding on processors: the network of `ar_cosmos` with its weights in the order in which they are read.

One code at a time, a network takes as long as its weights take to come from memory, if nothing is in their way. In the way are
plain matrix products, which read a matrix for few rows at half of the memory's speed or less, and dozens of small calls per layer.
So for the length of one generation the weights are copied as oneDNN reads them best, those with the same input as one matrix with
the norm before it folded in, and each layer is its few operations. Axes: B batch, S tokens, N heads, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .ar_layers import CosmosARDecoderLayer, rotate, self_attention_cache, view_of

WORTH_PACKING = 16  # codes from which on the copy pays: it takes as long as a few passes
ROWS = 16  # for so many rows oneDNN chooses the order; it is good for one row, too
_OWN = {f"{__package__}.{name}" for name in ("ar_cosmos", "ar_layers", "linear", "medusa_cosmos")}


def can_pack(model) -> bool:
    """Whether the model is one that `PackedDecoder` can stand in for: float32 on an x86 processor, nothing in it altered."""
    if not model.packs_weights or model.training or model.config._attn_implementation != "sdpa":
        return False
    if model.config.action_dim is not None:  # its layers attend to actions, too
        return False
    if not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    plain = all(
        type(p) is nn.Parameter and p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters()
    )
    return plain and not any(_altered(module) for module in model.modules())


def _altered(module: nn.Module) -> bool:
    """Whether its class is not ours or torch's (LoRA, quantised, ...), or its call is watched or replaced."""
    cls = type(module).__module__
    foreign = cls not in _OWN and not cls.startswith("torch.nn.modules.")
    watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(foreign or watched or module._compiled_call_impl)


def pack(weights: list[torch.Tensor], scale: torch.Tensor | None = None) -> torch.Tensor:
    """Matrices [O, I] with the same input as one, times `scale` [I], in oneDNN's order."""
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    return torch.ops.mkldnn._reorder_linear_weight(weight if scale is None else weight * scale, ROWS)


def product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., I] times a packed matrix: [..., O]."""
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def unit(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x [..., D] / sqrt(sum of squares + D eps), `floor` being sqrt(D eps): an RMSNorm but for its weight times sqrt(D)."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


class _PackedLayer:
    """One `CosmosARDecoderLayer`: matrices with the norms before them folded in, scales of queries and keys [N, head_dim]."""

    def __init__(self, layer: CosmosARDecoderLayer, config):
        def norm(of):
            return of.weight * config.hidden_size**0.5

        def head_scale(of, heads):
            return of.weight.expand(heads, -1) * config.head_dim**0.5

        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = pack([p.weight for p in projections], norm(layer.input_layernorm))
        self.out = pack([attention.o_proj.weight])
        scales = ((attention.q_norm, config.num_attention_heads), (attention.k_norm, config.num_key_value_heads))
        self.scale = torch.cat([head_scale(*pair) for pair in scales])
        self.cross = None
        if layer.cross_attn is not None:
            cross = layer.cross_attn
            query = pack([cross.q_proj.weight], norm(layer.cross_attn_layernorm))
            self.cross = (query, head_scale(cross.q_norm, config.num_attention_heads), pack([cross.o_proj.weight]))
        self.gate_up = pack([mlp.gate_proj.weight, mlp.up_proj.weight], norm(layer.post_attention_layernorm))
        self.down = pack([mlp.down_proj.weight])


class PackedDecoder:
    """Stands in for a `CosmosARForCausalLM` after its prompt, as long as its weights do not change."""

    @torch.no_grad()
    def __init__(self, model):
        self.config, self.model = model.config, model
        self.layers = [
            _PackedLayer(layer, self.config) for layer in model.model.layers[: self.config.num_hidden_layers]
        ]
        self.last_norm = model.model.norm.weight * self.config.hidden_size**0.5
        self.head = pack([model.lm_head.weight])
        self.guessers = None
        if heads := model.medusa_heads:
            self.guessers = (pack([h.weight for h in heads]), torch.cat([h.bias for h in heads]))
        eps = self.config.rms_norm_eps
        self.floor, self.head_floor = (
            torch.tensor((size * eps) ** 0.5) for size in (self.config.hidden_size, self.config.head_dim)
        )

    def states(
        self,
        tokens,
        past: int,
        past_key_values,
        latent_shape=None,
        positions=None,
        mask=None,
        encoder_attention_mask=None,
    ) -> torch.Tensor:
        """Tokens [B, S] behind `past` others -> normalised hidden states [B, S, D].

        past_key_values: filled by the model up to `past`, the context's part included. positions: [1, S], default: from `past` on.
        mask: bool [S, past + S], which of the past every token sees; needed for more than one. encoder_attention_mask: [B, L].
        """
        config, model = self.config, self.model.model
        batch, count = tokens.shape
        if positions is None:
            positions = torch.arange(past, past + count)[None]
        shape = tuple(config.latent_shape if latent_shape is None else latent_shape)
        rotation, absolute = model.positions(positions, shape, torch.float32)
        rotation = tuple(t[0, :, None] for t in rotation)  # [S, 1, head_dim]
        groups = config.num_attention_heads // config.num_key_value_heads
        if mask is not None:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).repeat(groups, 1)
        context_mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None]
        x = F.embedding(tokens, model.embed_tokens.weight)
        if model.view_embed is not None:
            x = x + model.view_embed(view_of(config, positions, shape))
        for i, layer in enumerate(self.layers):
            if absolute is not None and (i == 0 or config.absolute_positions == "every_layer"):
                x = x + absolute
            x = x + self._attention(layer, i, x, rotation, mask, past_key_values, past + count)
            if layer.cross is not None:
                x = x + self._cross_attention(layer, i, x, context_mask, past_key_values)
            gate, up = product(unit(x, self.floor), layer.gate_up).chunk(2, dim=-1)
            x = x + product(F.silu(gate) * up, layer.down)
        return unit(x, self.floor) * self.last_norm

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, D] -> logits [B, S, V]."""
        return product(states, self.head)

    def guesses(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """Hidden state [1, 1, D] -> logits of the first `count` Medusa heads [1, count, V]."""
        weight, bias = self.guessers
        heads = F.silu(product(states, weight, bias)).view(1, -1, states.shape[-1])
        return self.scores(states + heads[:, :count])

    def _attention(self, layer, index: int, x, rotation, mask, cache, length: int) -> torch.Tensor:
        heads, kept = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = product(unit(x, self.floor), layer.qkv).unflatten(-1, (-1, self.config.head_dim))  # [B, S, N, head_dim]
        qk = rotate(unit(qkv[:, :, : heads + kept], self.head_floor) * layer.scale, *rotation)
        key, value = qk[:, :, heads:].transpose(1, 2), qkv[:, :, heads + kept :].transpose(1, 2)
        key, value = self_attention_cache(cache).update(key, value, index)
        return product(self._attend(qk[:, :, :heads], key[:, :, :length], value[:, :, :length], mask), layer.out)

    def _cross_attention(self, layer, index: int, x, mask, cache) -> torch.Tensor:
        query, scale, out = layer.cross
        query = product(unit(x, self.floor), query).unflatten(-1, (-1, self.config.head_dim))
        context = cache.cross_attention_cache.layers[index]
        return product(self._attend(unit(query, self.head_floor) * scale, context.keys, context.values, mask), out)

    def _attend(self, query, key, value, mask) -> torch.Tensor:
        """Queries [B, S, N, head_dim] over keys and values [B, N / groups, T, head_dim] -> [B, S, N * head_dim].

        The queries of a group are rows of one attention, so that nothing is repeated for them.
        """
        batch, count, heads, size = query.shape
        kept = key.shape[1]
        query = query.unflatten(2, (kept, -1)).permute(0, 2, 3, 1, 4).reshape(batch, kept, -1, size)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).reshape(batch, count, heads * size)
