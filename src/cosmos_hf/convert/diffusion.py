"""Diffusion transformers of the reference (`GeneralDIT` and the classes made from it) to `CosmosWorldTransformer3D`."""

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
    "traj_condition_dim": 0,
    "concat_traj_embedding": False,
    "is_diffusion_decoder": True,
    "diffusion_decoder_condition_on_sigma": False,
    "diffusion_decoder_condition_on_token": True,
}
# Arguments that do not change what is computed: memory layout, sampling of fps in training, and pos_emb_learnable, which rope3d
# does not read. (Factors of the sin-cos table matter only where there is one.)
_WITHOUT_EFFECT = {
    *("block_x_format", "use_memory_save", "use_checkpoint", "min_fps", "max_fps", "pos_emb_learnable", "_target_"),
}
# Names of our parameters -> the reference's, applied one after the other.
_TO_ORIGINAL = (
    (r"^transformer_blocks\.(\d+)\.attn1\.", r"blocks.block\1.blocks.0.block.attn."),
    (r"^transformer_blocks\.(\d+)\.attn2\.", r"blocks.block\1.blocks.1.block.attn."),
    (r"\.attn\.to_(q|k|v)\.", r".attn.to_\1.0."),
    (r"\.attn\.norm_(q|k)\.", r".attn.to_\1.1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.block\1.blocks.2.block.layer1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.block\1.blocks.2.block.layer2."),
    (
        r"^transformer_blocks\.(\d+)\.norm(\d)\.linear_",
        lambda match: f"blocks.block{match[1]}.blocks.{int(match[2]) - 1}.adaLN_modulation.",
    ),
    (r"^time_embed\.t_embedder\.", "t_embedder.1."),
    (r"^time_embed\.norm\.", "affline_norm."),
    (r"^patch_embed\.proj\.", "x_embedder.proj.1."),
    (r"^learnable_pos_embed\.", "extra_pos_embedder."),
    (r"^norm_out\.linear_", "final_layer.adaLN_modulation."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^view_embed\.views\.", "view_embeddings."),
    (r"^view_embed\.frame_repeat\.", "repeat_frame_embedding."),
    (r"^action_embed\.sinusoid\.linear_", "action_embedder_B_D.fc"),
    (r"^action_embed\.offsets\.linear_", "action_embedder_B_3D.fc"),
    (r"^condition_embed\.", "token_embedder."),
)
POSITIONS = "pos_embedder.seq"  # 0, 1, 2, ...: not stored by us
UNCERTAINTY = {"0.freqs": "freqs", "0.phases": "phases", "1.weight": "linear.weight"}


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
    if found.keys() != UNCERTAINTY.keys():
        raise ValueError(f"logvar needs the entries {sorted(UNCERTAINTY)}, the checkpoint has {sorted(found)}")
    head = UncertaintyHead(num_features=found["0.freqs"].numel())
    head.load_state_dict({UNCERTAINTY[key]: value for key, value in found.items()}, strict=True)
    return head.float().eval()


def transformer_config(class_name: str, config: dict) -> dict:
    """Constructor arguments of `CosmosWorldTransformer3D` for those of the reference."""
    config = {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}
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
    channels = ours.get("in_channels"), ours.get("out_channels", 16)
    masked = class_name in ("VideoExtendGeneralDIT", "ActionConditionalVideoExtendGeneralDIT")
    if channels[0] != channels[1] + masked:
        raise ValueError(
            f"{class_name} has in_channels={channels[0]} and out_channels={channels[1]}: "
            f"{'one more channel in than out, the condition mask, is' if masked else 'equal numbers are'} expected"
        )
    ours |= _condition_config(class_name, config, ours["in_channels"])
    ours["extra_pos_embed_type"] = _position_config(class_name, config)
    for key, value in config.items():
        if key not in _FIXED:
            raise ValueError(f"{class_name} argument {key}={value!r} is not known to the converter")
        if value != _FIXED[key]:
            raise ValueError(
                f"{class_name} argument {key}={value!r} is not supported, only {_FIXED[key]!r} was released"
            )
    return ours


def _condition_config(class_name: str, config: dict, in_channels: int) -> dict:
    """What a class has beyond text and frames; takes the arguments for it out of `config`."""
    if "Multiview" in class_name:
        with_view = config.pop("concat_view_embedding", True)
        return dict(
            num_views=config.pop("n_views", 3),
            view_embed_dim=config.pop("view_condition_dim", 3) * bool(with_view),
            frame_repeat_embed=config.pop("add_repeat_frame_embedding", False),
            in_channels=in_channels + ("VideoExtend" in class_name),  # the class adds the mask's channel itself
        )
    if class_name == "ActionConditionalVideoExtendGeneralDIT":
        return dict(action_dim=config.pop("action_dim", 7), action_form=config.pop("action_form", "as_written"))
    if class_name == "DiffusionDecoderGeneralDIT":
        width = config.pop("diffusion_decoder_token_condition_dim", 32)
        return dict(
            condition_channels=width,
            condition_vocab_size=config.pop("diffusion_decoder_token_condition_voc_size", 64000),
            in_channels=in_channels + width,
        )
    return {}


def _position_config(class_name: str, config: dict) -> str | None:
    extra = config.pop("extra_per_block_abs_pos_emb", False)
    kind = config.pop("extra_per_block_abs_pos_emb_type", None)
    ratios = [config.pop(f"extra_{axis}_extrapolation_ratio", 1.0) for axis in "thw"]
    if not extra:
        return None
    if "Multiview" in class_name:  # the class builds sines and cosines whatever the type says
        if any(ratio != 1 for ratio in ratios):
            raise ValueError(f"{class_name} arguments extra_*_extrapolation_ratio={ratios}: only 1 was released")
        return "sincos"
    if kind != "learnable":
        raise ValueError(
            f"{class_name} argument extra_per_block_abs_pos_emb_type={kind!r}: only 'learnable' is supported"
        )
    return "learnable"


def original_key(name: str) -> str:
    """The name in our state dict -> the reference's, without `net.`."""
    for pattern, replacement in _TO_ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def classify_keys(keys, names) -> dict[str, str | None]:
    """Keys of a checkpoint of the reference -> names in our state dict `names`, or None for what is no weight of the network.

    `net.` may stand in front. No weights are `logvar.*` (`load_original_uncertainty`), `pos_embedder.seq` (whose value is
    checked elsewhere) and `_extra_state` (Transformer Engine's FP8 bookkeeping).
    Raises ValueError naming every key that the model does not have, and every name that no key fills.
    """
    ours = {original_key(name): name for name in names}
    found, unknown = {}, []
    for key in keys:
        name = key.removeprefix("net.")
        if name.endswith("_extra_state") or name == POSITIONS or name.removeprefix("logvar.") in UNCERTAINTY:
            found[key] = None
        elif name in ours:
            found[key] = ours[name]
        else:
            unknown.append(key)
    missing = sorted(set(names) - set(found.values()))
    if unknown or missing:
        raise ValueError(f"not a transformer of this config: unknown keys {unknown}, missing (our names) {missing}")
    return found


def convert_transformer_keys(state_dict: dict, model: CosmosWorldTransformer3D) -> dict:
    """The reference's state dict -> ours; see `classify_keys`. Raises ValueError for strange keys, shapes and buffers."""
    expected = {key: value.shape for key, value in model.state_dict().items()}
    converted = {}
    for key, name in classify_keys(state_dict, expected).items():
        if name is not None:
            check_weight(key, state_dict[key].shape, expected[name])
            converted[name] = state_dict[key]
        elif key.endswith(POSITIONS):
            check_positions(key, state_dict[key])
    return converted


def check_weight(key: str, shape, expected):
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{key} has shape {tuple(shape)}, the config wants {tuple(expected)}")


def check_positions(key: str, tensor: torch.Tensor):
    if not tensor.is_meta and not torch.equal(
        tensor.float().cpu(), torch.arange(len(tensor)).to(tensor.dtype).float()
    ):
        raise ValueError(f"{key} is {tensor[:8].tolist()}..., expected 0, 1, 2, ...: not this architecture")
