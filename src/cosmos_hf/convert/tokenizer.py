"""Tokenizers of the reference to `CosmosVideoTokenizer` and `CosmosImageTokenizer`: constructor arguments and keys."""

import logging
import re

import torch

from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.autoencoder_cosmos_image import CosmosImageTokenizer

logger = logging.getLogger(__name__)

# Reference constructor arguments that we take under the same name.
_SAME = (
    *("in_channels", "out_channels", "channels", "channels_mult", "num_res_blocks", "patch_size", "z_channels"),
    *("spatial_compression", "temporal_compression", "attn_resolutions", "resolution"),
)
# Arguments that must have this value, since the classes know no other; None stands for "ignored".
_FIXED = {
    "dropout": None,
    "name": None,
    "formulation": "AE",
    "patch_method": "haar",
    "z_factor": 1,
    "persistent_quantizer": None,
}
_FIXED_VIDEO = _FIXED | {"encoder": "FACTORIZED", "decoder": "FACTORIZED", "num_groups": 1, "legacy_mode": False}
# num_quantizers belongs to residual quantisers, which no released model has; the reference hands it to FSQ, too.
_FIXED_IMAGE = _FIXED | {"encoder": "Default", "decoder": "Default", "num_quantizers": None}
# A 0.1 file carries resampling convolutions of levels that do not resample; they were never used.
_UNUSED = re.compile(r"(encoder\.down\.\d+\.downsample|decoder\.up\.\d+\.upsample)\.conv[123]\.conv3d\.(weight|bias)")


def load_original_tokenizer(
    class_name: str, config: dict, state_dict: dict
) -> CosmosVideoTokenizer | CosmosImageTokenizer:
    """The reference's constructor arguments and state dict -> our model, float32, in eval mode.

    Raises ValueError for an argument or a key that is not understood, a missing key, or a buffer of unexpected value.
    """
    model = tokenizer_class(class_name)(**tokenizer_config(class_name, config, state_dict))
    model.load_state_dict(convert_tokenizer_keys(state_dict, model), strict=True)
    return model.float().eval()


def tokenizer_class(class_name: str) -> type[CosmosVideoTokenizer] | type[CosmosImageTokenizer]:
    """Our class for the reference's."""
    return CosmosImageTokenizer if "Image" in class_name else CosmosVideoTokenizer


def tokenizer_config(class_name: str, config: dict, state_dict: dict) -> dict:
    """Constructor arguments of our class for those of the reference."""
    config, image = dict(config), "Image" in class_name
    ours = {key: config.pop(key) for key in _SAME if key in config and not (image and key == "temporal_compression")}
    try:
        channels, encoder_mult = ours["channels"], tuple(ours["channels_mult"])
        if "Discrete" in class_name:
            quantizer = config.pop("quantizer", "FSQ")
            if quantizer != "FSQ":
                raise ValueError(f"quantizer {quantizer!r} of {class_name} is not supported: only FSQ was released")
            ours |= dict(quantizer="fsq", fsq_levels=tuple(config.pop("levels")))
            ours["latent_channels"] = config.pop("embedding_dim")
        else:
            ours["latent_channels"] = config.pop("latent_channels")
    except KeyError as error:
        raise ValueError(f"{class_name} argument {error.args[0]} is missing") from None
    fixed = _FIXED_IMAGE if image else _FIXED_VIDEO
    for key, value in config.items():
        if key not in fixed:
            raise ValueError(f"{class_name} argument {key}={value!r} is not known to the converter")
        if fixed[key] is not None and value != fixed[key]:
            raise ValueError(
                f"{class_name} argument {key}={value!r} is not supported, only {fixed[key]!r} was released"
            )
    mult = decoder_factors(state_dict, channels)
    if mult and mult != encoder_mult:
        if image:
            raise ValueError(f"the decoder's widths are {mult} times {channels}, the config wants {encoder_mult}")
        ours["decoder_channels_mult"] = mult
    return ours


def decoder_factors(state_dict: dict, channels: int) -> tuple[int, ...]:
    """Widths of the decoder's levels as factors of `channels`; the 0.1 release has fewer levels there than in its encoder
    where the temporal compression is 4."""
    widths = {
        int(match[1]): tensor.shape[0] // channels
        for key, tensor in state_dict.items()
        if (match := re.fullmatch(r"decoder\.up\.(\d+)\.block\.0\.conv1\.(?:0\.conv3d\.)?weight", key))
    }
    return tuple(widths[i] for i in sorted(widths))


def convert_tokenizer_keys(state_dict: dict, model: CosmosVideoTokenizer | CosmosImageTokenizer) -> dict:
    """The reference's keys -> ours; checked buffers and the unused convolutions of 0.1 files are dropped.

    Raises ValueError naming every key that neither the model nor the list of known buffers has, and every one missing.
    """
    expected = {key: value.shape for key, value in model.state_dict().items()}
    decoder_levels = len(model.decoder.levels)
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        if _is_buffer(key, tensor, model):
            continue
        new = _rename(key, decoder_levels)
        if new in expected and expected[new] == tensor.shape:
            converted[new] = tensor
        elif new in expected:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, the config wants {tuple(expected[new])}")
        elif isinstance(model, CosmosVideoTokenizer) and is_unused(key):
            logger.info("dropped %s: its level does not resample", key)
        else:
            unknown.append(key)
    missing = sorted(expected.keys() - converted.keys())
    if unknown or missing:
        raise ValueError(f"not a tokenizer of this config: unknown keys {unknown}, missing (our names) {missing}")
    return converted


def is_unused(key: str) -> bool:
    """Whether an entry that a model lacks belongs to a resampling layer that a file of the first release never runs."""
    return _UNUSED.fullmatch(key) is not None


def _is_buffer(key: str, tensor: torch.Tensor, model: CosmosVideoTokenizer | CosmosImageTokenizer) -> bool:
    """Whether the key is a constant that we do not store; another value would mean another architecture."""
    name = key.rsplit(".", 1)[-1]
    if re.search(r"(^|\.)(un)?patcher(3d)?\.", key) and name in ("wavelets", "_arange", "patch_size_buffer"):
        constants = {
            "wavelets": [0.5**0.5] * 2,
            "_arange": [0, 1],
            "patch_size_buffer": [model.config.patch_size],
        }
    elif re.search(r"(^|\.)quantizer\.", key) and name in ("_levels", "_basis", "implicit_codebook"):
        if model.fsq is None:
            raise ValueError(f"{key} belongs to a discrete tokenizer, the config is of a continuous one")
        levels, _, basis = model.fsq._constants("cpu")
        constants = {"_levels": levels.tolist(), "_basis": basis.tolist()}
        if name == "implicit_codebook":
            codes = model.fsq.decode(torch.arange(model.fsq.codebook_size))
            constants[name] = codes.flatten().tolist()
    else:
        return False
    if not tensor.is_meta:
        value = torch.tensor(constants[name], dtype=torch.float32)
        if tensor.numel() != value.numel() or not torch.allclose(
            tensor.detach().float().flatten().cpu(), value, atol=5e-3
        ):
            raise ValueError(
                f"{key} is {tensor.flatten()[:8].tolist()}, expected {value[:8].tolist()}: not this architecture"
            )
    return True


def _rename(key: str, decoder_levels: int) -> str:
    key = key.replace(".conv3d.", ".").replace(".norm.weight", ".weight").replace(".norm.bias", ".bias")
    key = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.levels.{decoder_levels - 1 - int(m[1])}.", key)
    key = re.sub(r"^encoder\.down\.", "encoder.levels.", key)
    key = key.replace(".nin_shortcut.", ".shortcut.")
    key = re.sub(r"\.(down|up)sample\.", ".resample.", key)
    key = re.sub(r"(levels\.\d+)\.block\.", r"\1.blocks.", key)
    key = re.sub(r"(levels\.\d+)\.attn\.", r"\1.attentions.", key).replace(".mid.attn_1.", ".mid.attention.")
    if ".attention" in key:
        key = re.sub(r"\.(q|k|v)\.(weight|bias)$", r".to_\1.\2", key).replace(".proj_out.", ".to_out.")
        key = re.sub(r"(attentions?(?:\.\d+)*)\.(weight|bias)$", r"\1.norm.\2", key)
    return key
