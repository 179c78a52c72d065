"""The layout of diffusers' `AutoencoderKLCosmos`: its config and keys, there and back, for the continuous video tokenizer.

The two classes are the same network under other names; ours stores the latents' statistics as [C] or [C][T'], theirs as a flat
list in the same order.
"""

import re

import torch

DIFFUSERS_CLASS = "AutoencoderKLCosmos"
_SAME = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "num_layers": "num_res_blocks",
    "attention_resolutions": "attn_resolutions",
    "resolution": "resolution",
    "patch_size": "patch_size",
    "spatial_compression_ratio": "spatial_compression",
    "temporal_compression_ratio": "temporal_compression",
}
# Arguments that must have this value, since our class knows no other.
_FIXED = {"patch_type": "haar", "scaling_factor": 1.0}


def load_diffusers_tokenizer(cls, place, *, output_loading_info: bool = False, **kwargs):
    """`cls.from_pretrained` for a folder that diffusers' class wrote; diffusers finds and reads the files."""
    from diffusers import AutoencoderKLCosmos  # here, since importing it costs seconds

    if kwargs.get("device_map") is not None:
        raise ValueError(
            f"device_map cannot be used with a folder of {DIFFUSERS_CLASS}: load it, then use .to(device)"
        )
    theirs, info = AutoencoderKLCosmos.from_pretrained(place, output_loading_info=True, **kwargs)
    problems = {
        kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    }
    if problems:
        raise ValueError(
            f"the weights in {place} are not those of an {DIFFUSERS_CLASS} with the config beside them: {problems}"
        )
    with torch.device("meta"):
        ours = cls(**config_from_diffusers(theirs.config))
    ours.load_state_dict(keys_from_diffusers(theirs.state_dict()), strict=True, assign=True)
    ours.register_to_config(_name_or_path=str(place))
    ours.eval()
    return (ours, info) if output_loading_info else ours


def config_from_diffusers(config) -> dict:
    """Constructor arguments of `CosmosVideoTokenizer` for a config of `AutoencoderKLCosmos`.

    Raises ValueError for an argument that is not understood.
    """
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    ours = {new: config.pop(old) for old, new in _SAME.items()}
    encoder, decoder = config.pop("encoder_block_out_channels"), config.pop("decode_block_out_channels")
    mean, std = config.pop("latents_mean"), config.pop("latents_std")
    for key, value in config.items():
        if key not in _FIXED:
            raise ValueError(f"{DIFFUSERS_CLASS} config {key}={value!r} is not known")
        if value != _FIXED[key]:
            raise ValueError(f"{DIFFUSERS_CLASS} config {key}={value!r} is not supported, only {_FIXED[key]!r}")
    channels = encoder[0]
    if any(width % channels for width in (*encoder, *decoder)) or decoder[-1] != decoder[-2]:
        raise ValueError(
            f"{DIFFUSERS_CLASS} config encoder_block_out_channels={list(encoder)}, decode_block_out_channels={list(decoder)}: "
            "widths must be multiples of the first, and the decoder's last two equal"
        )
    mult, decoder_mult = (tuple(width // channels for width in widths) for widths in (encoder[1:], decoder[:-1]))
    ours |= dict(channels=channels, channels_mult=mult, z_channels=ours["latent_channels"])
    if decoder_mult != mult:
        ours["decoder_channels_mult"] = decoder_mult
    return ours | dict(
        latents_mean=_by_channel(mean, ours["latent_channels"]), latents_std=_by_channel(std, ours["latent_channels"])
    )


def _by_channel(values: list[float] | None, channels: int) -> list | None:
    """A flat list, channel by channel -> [C], or where a channel has several latent frames [C][T']."""
    if values is None:
        return None
    if len(values) % channels:
        raise ValueError(f"{DIFFUSERS_CLASS} config has {len(values)} statistics for {channels} latent channels")
    rows = [list(values[i : i + len(values) // channels]) for i in range(0, len(values), len(values) // channels)]
    return rows if len(rows[0]) > 1 else [row[0] for row in rows]


def config_to_diffusers(config) -> dict:
    """Arguments of `AutoencoderKLCosmos` for a `CosmosVideoTokenizer`'s config; ValueError where it has no such tokenizer."""
    if config.quantizer is not None or config.z_channels != config.latent_channels:
        raise ValueError(
            f"{DIFFUSERS_CLASS} is continuous with z_channels equal to latent_channels; this tokenizer has "
            f"quantizer={config.quantizer!r}, z_channels={config.z_channels}, latent_channels={config.latent_channels}"
        )
    decoder = [config.channels * factor for factor in config.decoder_channels_mult or config.channels_mult]
    theirs = {old: getattr(config, new) for old, new in _SAME.items()}
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        nested = values is not None and isinstance(values[0], (list, tuple))
        theirs[name] = [x for row in values for x in row] if nested else values
    return theirs | dict(
        encoder_block_out_channels=[config.channels, *(config.channels * factor for factor in config.channels_mult)],
        decode_block_out_channels=[*decoder, decoder[-1]],
        **_FIXED,
    )


# Diffusers' names and ours, applied one after the other.
_RENAMES = (
    (r"^encoder\.down_blocks\.", "encoder.levels."),
    (r"^decoder\.up_blocks\.", "decoder.levels."),
    (r"^(en|de)coder\.mid_block\.resnets\.0\.", r"\1coder.mid.block_1."),
    (r"^(en|de)coder\.mid_block\.resnets\.1\.", r"\1coder.mid.block_2."),
    (r"^(en|de)coder\.mid_block\.attentions\.0\.", r"\1coder.mid.attention.0."),
    (r"^(en|de)coder\.mid_block\.temp_attentions\.0\.", r"\1coder.mid.attention.1."),
    (r"\.resnets\.(\d+)\.", r".blocks.\1."),
    (r"\.temp_attentions\.(\d+)\.", r".attentions.\1.1."),
    (r"(levels\.\d+)\.attentions\.(\d+)\.(?!1\.)", r"\1.attentions.\2.0."),
    (r"\.(down|up)samplers\.0\.", ".resample."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.conv_s\.", ".0."),
    (r"\.conv_t\.", ".1."),
    (r"\.norm\.(weight|bias)$", r".\1"),
)


def keys_from_diffusers(state_dict: dict) -> dict:
    return {_our_key(key): value for key, value in state_dict.items()}


def _our_key(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def save_for_diffusers(tokenizer, folder):
    """Write a continuous video tokenizer so that diffusers' `AutoencoderKLCosmos.from_pretrained(folder)` reads it."""
    from diffusers import AutoencoderKLCosmos

    with torch.device("meta"):
        theirs = AutoencoderKLCosmos(**config_to_diffusers(tokenizer.config))
    weights = tokenizer.state_dict()
    theirs.load_state_dict({key: weights[_our_key(key)] for key in theirs.state_dict()}, strict=True, assign=True)
    theirs.save_pretrained(folder)
