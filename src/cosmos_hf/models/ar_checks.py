"""What a call of the autoregressive model must fulfil; refused by name before anything is computed."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache


def check_latent_shape(shape, name: str = "latent_shape") -> tuple[int, int, int]:
    """Three positive sizes as a tuple. Raises ValueError otherwise."""
    if shape is None or len(shape) != 3 or any(int(size) != size or size < 1 for size in shape):
        raise ValueError(f"{name} must be three positive sizes [T, H, W] of a latent grid, got {shape}")
    return tuple(int(size) for size in shape)


def check_tokens(config, input_ids: torch.Tensor, name: str = "input_ids"):
    """Every token must be a code, or `<bov>` or padding where the config has such."""
    if input_ids.is_floating_point() or input_ids.ndim != 2:
        raise ValueError(f"{name} must be integers [B, S], got {input_ids.dtype} {tuple(input_ids.shape)}")
    if input_ids.is_meta or isinstance(input_ids, FakeTensor) or not input_ids.numel():
        return
    special = {"<bov>": config.bov_token_id, "padding": config.pad_token_id}
    special = {kind: token for kind, token in special.items() if token is not None}
    foreign = (input_ids < 0) | (input_ids >= config.codebook_size)
    for token in special.values():
        foreign &= input_ids != token
    if foreign.any():
        also = "".join(f" or {kind} ({token})" for kind, token in special.items())
        raise ValueError(
            f"{name} must lie in the codebook, 0..{config.codebook_size - 1}{also}, got "
            f"{input_ids[foreign].unique()[:5].tolist()}: was the video coded by another tokenizer?"
        )


def check_length(config, latent_shape, length: int, past: int, name: str = "input_ids"):
    """No more tokens than the grid has positions."""
    capacity = config.num_positions(latent_shape)
    if past + length > capacity:
        bov = " and <bov>" if config.bov_token_id is not None else ""
        already = f" after {past} in the cache" if past else ""
        raise ValueError(
            f"{name} has {length} tokens{already}, the latent grid {list(latent_shape)} holds {capacity}{bov and ' with'}{bov}: "
            f"give a shorter prompt or the latent_shape of your video"
        )


def check_cache(cache: Cache | None, needed: int):
    """A cache of fixed size must hold all tokens."""
    size = cache.get_max_length() if cache is not None and len(cache) else -1
    if size is not None and 0 <= size < needed:
        raise ValueError(
            f"past_key_values holds {size} tokens, {needed} are needed: make it with max_cache_len={needed} or more"
        )


def check_generators(generator, count: int, what: str):
    """None, one torch generator, or a list or tuple of `count`, one for each of `what`."""
    several = isinstance(generator, (list, tuple))
    for one in generator if several else [generator] if generator is not None else []:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of such, got {type(one).__name__}")
    if several and len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} {what}: give one each, or a single one")


def check_context(config, batch: int, cache: Cache | None, states, mask):
    """Text embeddings where, and only where, the model attends to them."""
    if config.cross_attention_dim is None:
        for name, value in (("encoder_hidden_states", states), ("encoder_attention_mask", mask)):
            if value is not None:
                raise ValueError(f"{name} would be ignored: this model has no cross-attention (cross_attention_dim)")
        return
    kept = bool(getattr(cache, "is_updated", None) and cache.is_updated.get(0))
    if states is None and not kept:
        raise ValueError(
            "encoder_hidden_states is missing: this model attends to text. Zeros [B, L, "
            f"{config.cross_attention_dim}] stand for no text"
        )
    if states is not None and (states.ndim != 3 or states.shape[2] != config.cross_attention_dim):
        raise ValueError(
            f"encoder_hidden_states must be [B, L, {config.cross_attention_dim}], got {tuple(states.shape)}"
        )
    if states is not None and states.shape[0] != batch:
        raise ValueError(f"encoder_hidden_states has {states.shape[0]} items, input_ids {batch}")
    if mask is not None:
        length = cache.cross_attention_cache.layers[0].keys.shape[2] if states is None else states.shape[1]
        if tuple(mask.shape) != (batch, length):
            raise ValueError(
                f"encoder_attention_mask must be [{batch}, {length}], one entry per text token, got {tuple(mask.shape)}"
            )


def check_actions(config, latent_shape, batch: int, cache: Cache | None, actions):
    """Actions where, and only where, the model takes them, one vector for every latent frame."""
    if config.action_dim is None:
        if actions is not None:
            raise ValueError("actions would be ignored: this model takes none (action_dim)")
        return
    if config._attn_implementation not in ("eager", "sdpa", None):
        raise ValueError(
            f"a model that takes actions needs attn_implementation eager or sdpa, not {config._attn_implementation}"
        )
    needed = (batch, latent_shape[0], config.action_dim)
    kept = getattr(cache, "is_updated", None) and cache.is_updated.get(config.num_hidden_layers)
    if actions is None and not kept:
        raise ValueError(f"actions are missing: this model takes {list(needed)}, those that lead to each latent frame")
    if actions is not None and (tuple(actions.shape) != needed or not actions.is_floating_point()):
        raise ValueError(
            f"actions must be floats {list(needed)}, one vector for each of {latent_shape[0]} latent frames, got "
            f"{actions.dtype} {tuple(actions.shape)}"
        )


def check_mask(attention_mask, batch: int, needed: int):
    """[B, past + S]; a 4-D mask is the caller's own."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 4:
        return
    if tuple(attention_mask.shape) != (batch, needed):
        raise ValueError(
            f"attention_mask must be [{batch}, {needed}], one entry per token so far, got {tuple(attention_mask.shape)}"
        )


def check_call(
    config, latent_shape, input_ids, batch, length, past, cache, attention_mask, position_ids, states, context_mask,
    actions,
):  # fmt: skip
    """All checks of one forward pass. `past` is a tensor where reading it would cost a synchronisation."""
    if torch.compiler.is_compiling():
        return
    check_context(config, batch, cache, states, context_mask)
    check_actions(config, latent_shape, batch, cache, actions)
    # One code behind a cache comes from the model itself and is not looked at: that would cost a synchronisation each time.
    if input_ids is not None and (length > 1 or (isinstance(past, int) and past == 0)):
        check_tokens(config, input_ids)
    if not isinstance(past, int):
        return
    check_cache(cache, past + length)
    check_mask(attention_mask, batch, past + length)
    if position_ids is None:
        check_length(config, latent_shape, length, past)
    elif length > 1 and not position_ids.is_meta and position_ids.max() > config.num_positions(latent_shape):
        raise ValueError(
            f"position_ids go up to {int(position_ids.max())}, the latent grid {list(latent_shape)} has "
            f"{config.num_positions(latent_shape)} positions"
        )
