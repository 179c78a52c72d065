"""Video tokenizers of the reference (`Causal{Continuous,Discrete}VideoTokenizer`) to `CosmosVideoTokenizer`."""

import logging
import re

import torch

from ..models.autoencoder_cosmos import CosmosVideoTokenizer

logger = logging.getLogger(__name__)

# Reference constructor arguments that we take under the same name.
_SAME = (
    *("in_channels", "out_channels", "channels", "channels_mult", "num_res_blocks", "patch_size", "z_channels"),
    *("spatial_compression", "temporal_compression", "attn_resolutions", "resolution"),
)
# Arguments that must have this value, since the class knows no other; None stands for "ignored".
_FIXED = {
    "dropout": None,
    "name": None,
    "formulation": "AE",
    "encoder": "FACTORIZED",
    "decoder": "FACTORIZED",
    "patch_method": "haar",
    "z_factor": 1,
    "num_groups": 1,
    "legacy_mode": False,
    "persistent_quantizer": None,
}
# A 0.1 file carries resampling convolutions of levels that do not resample; they were never used.
_UNUSED = re.compile(r"(encoder\.down\.\d+\.downsample|decoder\.up\.\d+\.upsample)\.conv[123]\.conv3d\.(weight|bias)")


def load_original_tokenizer(class_name: str, config: dict, state_dict: dict) -> CosmosVideoTokenizer:
    """The reference's constructor arguments and state dict -> our model, float32, in eval mode.

    Raises ValueError for an argument or a key that is not understood, a missing key, or a buffer of unexpected value.
    """
    model = CosmosVideoTokenizer(**tokenizer_config(class_name, config, state_dict))
    model.load_state_dict(convert_tokenizer_keys(state_dict, model), strict=True)
    return model.float().eval()


def tokenizer_config(class_name: str, config: dict, state_dict: dict) -> dict:
    """Constructor arguments of `CosmosVideoTokenizer` for those of the reference."""
    config = dict(config)
    ours = {key: config.pop(key) for key in _SAME if key in config}
    discrete = "Discrete" in class_name
    if discrete:
        quantizer = config.pop("quantizer", "FSQ")
        if quantizer != "FSQ":
            raise ValueError(f"quantizer {quantizer!r} of {class_name} is not supported: only FSQ was released")
        ours |= dict(quantizer="fsq", fsq_levels=tuple(config.pop("levels")))
        ours["latent_channels"] = config.pop("embedding_dim")
    else:
        ours["latent_channels"] = config.pop("latent_channels")
    for key, value in config.items():
        if key not in _FIXED:
            raise ValueError(f"{class_name} argument {key}={value!r} is not known to the converter")
        if _FIXED[key] is not None and value != _FIXED[key]:
            raise ValueError(
                f"{class_name} argument {key}={value!r} is not supported, only {_FIXED[key]!r} was released"
            )
    # The 0.1 release builds a decoder with other factors than its encoder where the temporal compression is 4.
    widths = {
        int(match[1]): tensor.shape[0] // ours["channels"]
        for key, tensor in state_dict.items()
        if (match := re.fullmatch(r"decoder\.up\.(\d+)\.block\.0\.conv1\.0\.conv3d\.weight", key))
    }
    mult = tuple(widths[i] for i in sorted(widths))
    if mult and mult != tuple(ours["channels_mult"]):
        ours["decoder_channels_mult"] = mult
    return ours


def convert_tokenizer_keys(state_dict: dict, model: CosmosVideoTokenizer) -> dict:
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
        elif _UNUSED.fullmatch(key):
            logger.info("dropped %s: its level does not resample", key)
        else:
            unknown.append(key)
    missing = sorted(expected.keys() - converted.keys())
    if unknown or missing:
        raise ValueError(f"not a tokenizer of this config: unknown keys {unknown}, missing (our names) {missing}")
    return converted


def _is_buffer(key: str, tensor: torch.Tensor, model: CosmosVideoTokenizer) -> bool:
    """Whether the key is a constant that we do not store; another value would mean another architecture."""
    name = key.rsplit(".", 1)[-1]
    if re.search(r"(un)?patcher3d\.", key) and name in ("wavelets", "_arange", "patch_size_buffer"):
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
