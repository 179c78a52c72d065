"""Autoregressive models of the reference (`Transformer`: 4B, 5B, 12B, 13B) to `CosmosARForCausalLM`."""

import re
from pathlib import Path

import torch

from ..models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM

# Reference constructor arguments and ours, where one value is passed on as it is.
_SAME = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "video_latent_shape": "latent_shape",
}
# Arguments that must have this value, since the released models have no other and the class knows no other.
_FIXED = {
    "norm_type": "rmsnorm",
    "use_qk_normalization": True,
    "rope_dim": "3D",
    "pytorch_rope_version": "v2",
    "causal_mask": True,
    "vision_encoder": None,
    "mm_projector": None,
    "insert_medusa_head": False,
}
# Arguments that do not change what is computed: sizes of buffers, precision, paths, layout of the checkpoint.
_WITHOUT_EFFECT = {
    *("max_batch_size", "max_seq_len", "precision", "pad_to_multiple_of", "original_seq_len", "num_video_frames"),
    *("video_height", "video_width", "ckpt_dir", "ckpt_path", "tokenizer", "tensor_model_parallel_size", "fuse_qkv"),
    *("vision_encoder_in_channels", "backend", "_target_"),
}
TRAINING_TYPES = ("video_to_video", "text_to_video")
_RENAMES = (
    (r"^layers\.", "model.layers."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.cross_attention_norm\.", ".cross_attn_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.w([qkvo])\.", r".\1_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
)
# Which dimension tensor parallelism splits; everything else is the same in all shards.
_SPLIT = ((r"\.(wq|wk|wv|w1|w3)\.weight$|^(tok_embeddings|output)\.weight$", 0), (r"\.(wo|w2)\.weight$", 1))


def load_original_autoregressive(
    class_name: str, config: dict, state_dict: dict, training_type: str | None = None
) -> CosmosARForCausalLM:
    """The reference's constructor arguments and state dict -> our model, float32, in eval mode.

    `training_type` is that of the checkpoint's tokenizer config: "text_to_video" models begin with `<bov>`; None takes the kind
    that the cross-attention says. Raises ValueError for an argument or key that is not understood, or one that is missing.
    """
    state_dict = strip(state_dict)
    ours = autoregressive_config(config, state_dict, training_type)
    meta = any(tensor.is_meta for tensor in state_dict.values())
    with torch.device("meta"):  # the checkpoint's tensors are taken as they are: the model is never in memory twice
        model = CosmosARForCausalLM(ours)
    model.load_state_dict(convert_autoregressive_keys(state_dict, model), strict=True, assign=True)
    return (model if meta else model.float()).eval()


def load_files(files: list[str | Path], preset: str) -> CosmosARForCausalLM:
    """Published `model.pt` files (several: the shards of tensor parallelism, by rank) -> our model in the files' dtype.

    Files are mapped, not read at once, and only tensors are unpickled.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there is {', '.join(PRESETS)}")
    shards = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    state_dict = join_shards(shards) if len(shards) > 1 else strip(shards[0])
    with torch.device("meta"):
        model = CosmosARForCausalLM(CosmosARConfig(**PRESETS[preset]))
    model.load_state_dict(convert_autoregressive_keys(state_dict, model), strict=True, assign=True)
    return model.eval()


def strip(state_dict: dict) -> dict:
    """Without what a file may have around the weights: {"model": ...}, a prefix `model.`, Transformer Engine's `_extra_state`."""
    if set(state_dict) == {"model"}:
        state_dict = state_dict["model"]
    plain = {key.removeprefix("model."): value for key, value in state_dict.items()}
    return split_fused({key: value for key, value in plain.items() if not key.endswith("_extra_state")})


def split_fused(state_dict: dict) -> dict:
    """Transformer Engine's fused names -> the plain ones: `layernorm_mlp.fc1_weight` is [w1; w3]."""
    plain = {}
    for key, value in state_dict.items():
        name = re.sub(r"\.self_attention\.layernorm_qkv\.layer_norm_weight$", ".attention_norm.weight", key)
        name = re.sub(
            r"\.self_attention\.layernorm_qkv\.(query|key|value)_weight$",
            lambda m: f".attention.w{m[1][0]}.weight",
            name,
        )
        name = re.sub(r"\.self_attention\.proj\.weight$", ".attention.wo.weight", name)
        name = re.sub(r"\.layernorm_mlp\.layer_norm_weight$", ".ffn_norm.weight", name)
        name = re.sub(r"\.layernorm_mlp\.fc2_weight$", ".feed_forward.w2.weight", name)
        if name.endswith(".layernorm_mlp.fc1_weight"):
            base = name.removesuffix("layernorm_mlp.fc1_weight") + "feed_forward."
            plain[base + "w1.weight"], plain[base + "w3.weight"] = value.chunk(2)
        else:
            plain[name] = value
    return plain


def autoregressive_config(config: dict, state_dict: dict, training_type: str | None = None) -> CosmosARConfig:
    """Our configuration for the reference's constructor arguments; the rows of embedding and output are the checkpoint's."""
    if training_type not in (None, *TRAINING_TYPES):
        raise ValueError(f"training_type must be one of {', '.join(TRAINING_TYPES)}, got {training_type!r}")
    config = {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}
    ours = {}
    for old, new in _SAME.items():
        if old not in config:
            raise ValueError(f"Transformer argument {old} is missing")
        ours[new] = config.pop(old)
    ours["head_dim"] = config.pop("head_dim", None) or ours["hidden_size"] // ours["num_attention_heads"]
    text = config.pop("insert_cross_attn", False)
    every, width = config.pop("insert_cross_attn_every_k_layers", 1), config.pop("context_dim", 1024)
    if text:
        ours |= dict(cross_attention_dim=width, cross_attention_every=every)
    if config.pop("apply_abs_pos_emb", False):
        ours["absolute_positions"] = "every_layer"
    yarn = {key: config.pop(key, None) for key in ("yarn_scale", "yarn_beta_fast", "yarn_beta_slow")}
    original = config.pop("original_latent_shape", None)
    if config.pop("apply_yarn", False):
        ours |= yarn | dict(yarn_original_shape=original)
    codes = config.pop("vocab_size")
    for key, value in config.items():
        if key not in _FIXED:
            raise ValueError(f"Transformer argument {key}={value!r} is not known to the converter")
        if value != _FIXED[key]:
            raise ValueError(
                f"Transformer argument {key}={value!r} is not supported, only {_FIXED[key]!r} was released"
            )
    kind = training_type or ("text_to_video" if text else "video_to_video")
    for name in ("output.weight", "tok_embeddings.weight"):
        if name not in state_dict:
            raise ValueError(f"the checkpoint has no {name}: is it a whole model? Shards are joined by join_shards")
    rows = state_dict["output.weight"].shape[0]
    if rows != codes:
        raise ValueError(f"output.weight has {rows} rows, the config's vocab_size is {codes}")
    ours |= dict(vocab_size=codes, embedding_size=state_dict["tok_embeddings.weight"].shape[0])
    if kind == "text_to_video":
        ours["bov_token_id"] = codes  # the first row behind the codes
    return CosmosARConfig(**ours)


def convert_autoregressive_keys(state_dict: dict, model: CosmosARForCausalLM) -> dict:
    """The reference's keys -> ours. Raises ValueError naming every key that the model does not have, and every one missing."""
    expected = {key: value.shape for key, value in model.state_dict().items()}
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name not in expected:
            unknown.append(key)
        elif expected[name] != tensor.shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, the config wants {tuple(expected[name])}")
        else:
            converted[name] = tensor
    missing = sorted(expected.keys() - converted.keys())
    if unknown or missing:
        raise ValueError(
            f"not an autoregressive model of this config: unknown keys {unknown}, missing (our names) {missing}"
        )
    return converted


def join_shards(shards: list[dict]) -> dict:
    """State dicts of a tensor-parallel checkpoint, in the order of their ranks -> that of the whole model.

    Raises ValueError where their keys differ, or where a tensor that is not split does.
    """
    shards = [strip(shard) for shard in shards]
    whole = {}
    for key in shards[0]:
        for rank, shard in enumerate(shards):
            if shard.keys() != shards[0].keys():
                raise ValueError(
                    f"shard {rank} has other keys than shard 0: {sorted(shard.keys() ^ shards[0].keys())[:5]}"
                )
        parts = [shard[key] for shard in shards]
        dimension = next((d for pattern, d in _SPLIT if re.search(pattern, key)), None)
        if dimension is not None:
            whole[key] = torch.cat(parts, dim=dimension)
            continue
        if any(not part.is_meta and not torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"{key} is not split by tensor parallelism, but differs between the shards")
        whole[key] = parts[0]
    return whole
