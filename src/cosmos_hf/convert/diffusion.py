"""Diffusion transformers of the reference (`GeneralDIT`, `VideoExtendGeneralDIT`) to `CosmosWorldTransformer3D`."""

import re

import torch

from ..models.transformer_cosmos import CosmosWorldTransformer3D
from ..models.uncertainty_cosmos import UncertaintyHead

# Reference constructor arguments and ours, where one value is passed on as it is.
_SAME = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_heads": "num_attention_heads",
    "num_blocks": "num_layers",
    "mlp_ratio": "mlp_ratio",
    "crossattn_emb_channels": "text_embed_dim",
    "adaln_lora_dim": "adaln_lora_dim",
    "concat_padding_mask": "concat_padding_mask",
}
# Arguments that must have this value, since the released models have no other and the class knows no other.
_FIXED = {
    "block_config": "FA-CA-MLP",
    "use_cross_attn_mask": False,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "legacy_patch_emb": False,
    "additional_timestamp_channels": None,
    "layer_mask": None,
    "add_augment_sigma_embedding": False,
    "window_block_indexes": "[]",
    "window_sizes": "[]",
    "spatial_attn_win_size": 1,
    "temporal_attn_win_size": 1,
}
# Arguments that do not change what is computed: memory layout, sampling of fps in training, factors of the sin-cos table only,
# and pos_emb_learnable, which rope3d does not read.
_WITHOUT_EFFECT = {
    *("block_x_format", "use_memory_save", "use_checkpoint", "min_fps", "max_fps", "pos_emb_learnable", "_target_"),
    *("extra_h_extrapolation_ratio", "extra_w_extrapolation_ratio", "extra_t_extrapolation_ratio"),
}
_RENAMES = (
    (r"^blocks\.block(\d+)\.blocks\.", r"transformer_blocks.\1."),
    (r"(?<=transformer_blocks\.)(\d+)\.0\.block\.attn\.", r"\1.attn1."),
    (r"(?<=transformer_blocks\.)(\d+)\.1\.block\.attn\.", r"\1.attn2."),
    (r"\.to_(q|k|v)\.0\.", r".to_\1."),
    (r"\.to_(q|k)\.1\.", r".norm_\1."),
    (r"(?<=transformer_blocks\.)(\d+)\.2\.block\.layer1\.", r"\1.ff.net.0.proj."),
    (r"(?<=transformer_blocks\.)(\d+)\.2\.block\.layer2\.", r"\1.ff.net.2."),
    (
        r"(?<=transformer_blocks\.)(\d+)\.(\d)\.adaLN_modulation\.",
        lambda match: f"{match[1]}.norm{int(match[2]) + 1}.linear_",
    ),
    (r"^t_embedder\.1\.", "time_embed.t_embedder."),
    (r"^affline_norm\.", "time_embed.norm."),
    (r"^x_embedder\.proj\.1\.", "patch_embed.proj."),
    (r"^extra_pos_embedder\.", "learnable_pos_embed."),
    (r"^final_layer\.adaLN_modulation\.", "norm_out.linear_"),
    (r"^final_layer\.linear\.", "proj_out."),
)
_UNCERTAINTY = {"0.freqs": "freqs", "0.phases": "phases", "1.weight": "linear.weight"}


def load_original_transformer(class_name: str, config: dict, state_dict: dict) -> CosmosWorldTransformer3D:
    """The reference's constructor arguments and state dict -> our model, float32, in eval mode.

    A checkpoint's `logvar.*` is the uncertainty head of training, not part of the network: `load_original_uncertainty`.
    Raises ValueError for an argument or a key that is not understood, a missing key, or a buffer of unexpected value.
    """
    model = CosmosWorldTransformer3D(**transformer_config(class_name, config))
    model.load_state_dict(convert_transformer_keys(state_dict, model), strict=True)
    return model.float().eval()


def load_original_uncertainty(state_dict: dict) -> UncertaintyHead:
    """The `logvar.*` entries of a checkpoint -> our uncertainty head, float32, in eval mode."""
    found = {key.removeprefix("logvar."): value for key, value in state_dict.items() if key.startswith("logvar.")}
    if found.keys() != _UNCERTAINTY.keys():
        raise ValueError(f"logvar needs the entries {sorted(_UNCERTAINTY)}, the checkpoint has {sorted(found)}")
    head = UncertaintyHead(num_features=found["0.freqs"].numel())
    head.load_state_dict({_UNCERTAINTY[key]: value for key, value in found.items()}, strict=True)
    return head.float().eval()


def transformer_config(class_name: str, config: dict) -> dict:
    """Constructor arguments of `CosmosWorldTransformer3D` for those of the reference."""
    config = {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}
    video = class_name == "VideoExtendGeneralDIT"
    ours = {new: config.pop(old) for old, new in _SAME.items() if old in config}
    try:
        ours["attention_head_dim"] = config.pop("model_channels") // ours["num_attention_heads"]
        patch, patch_time = config.pop("patch_spatial"), config.pop("patch_temporal")
        sizes = [config.pop(name) for name in ("max_frames", "max_img_h", "max_img_w")]
    except KeyError as error:
        raise ValueError(f"{class_name} argument {error.args[0]} is missing") from None
    ours["patch_size"] = (patch_time, patch, patch)
    ours["max_size"] = tuple(sizes)
    ours["rope_scale"] = tuple(float(config.pop(f"rope_{axis}_extrapolation_ratio", 1.0)) for axis in "thw")
    extra, kind = (
        config.pop("extra_per_block_abs_pos_emb", False),
        config.pop("extra_per_block_abs_pos_emb_type", None),
    )
    if extra and kind != "learnable":
        raise ValueError(
            f"{class_name} argument extra_per_block_abs_pos_emb_type={kind!r}: only 'learnable' is supported"
        )
    ours["extra_pos_embed_type"] = "learnable" if extra else None
    if ours.get("in_channels") != ours.get("out_channels", 16) + video:
        raise ValueError(
            f"{class_name} has in_channels={ours.get('in_channels')} and out_channels={ours.get('out_channels', 16)}: "
            f"{'one more channel in than out, the condition mask, is' if video else 'equal numbers are'} expected"
        )
    for key, value in config.items():
        if key not in _FIXED:
            raise ValueError(f"{class_name} argument {key}={value!r} is not known to the converter")
        if value != _FIXED[key]:
            raise ValueError(
                f"{class_name} argument {key}={value!r} is not supported, only {_FIXED[key]!r} was released"
            )
    return ours


def convert_transformer_keys(state_dict: dict, model: CosmosWorldTransformer3D) -> dict:
    """The reference's keys, with or without `net.` in front, -> ours; `logvar.*`, `_extra_state` and `pos_embedder.seq` go.

    Raises ValueError naming every key that the model does not have, and every one missing.
    """
    expected = {key: value.shape for key, value in model.state_dict().items()}
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        name = key.removeprefix("net.")
        if name.endswith("_extra_state"):  # Transformer Engine's FP8 bookkeeping, not a weight
            continue
        if name.startswith("logvar."):
            if name.removeprefix("logvar.") not in _UNCERTAINTY:
                unknown.append(key)
            continue
        if name == "pos_embedder.seq":
            _check_positions(key, tensor)
            continue
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
        raise ValueError(f"not a transformer of this config: unknown keys {unknown}, missing (our names) {missing}")
    return converted


def _check_positions(key: str, tensor: torch.Tensor):
    if not tensor.is_meta and not torch.equal(
        tensor.float().cpu(), torch.arange(len(tensor)).to(tensor.dtype).float()
    ):
        raise ValueError(f"{key} is {tensor[:8].tolist()}..., expected 0, 1, 2, ...: not this architecture")
