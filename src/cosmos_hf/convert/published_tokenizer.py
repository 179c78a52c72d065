"""Published tokenizer files to our classes: `encoder.jit` and `decoder.jit`, or `autoencoder.jit`, and `mean_std.pt`.

Also state dicts under the reference's keys, as `.pt` or `.safetensors`. Tensors are read without running code of the files;
only `compare_with_torchscript`, which is called on wish, runs the TorchScript program.
"""

import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..models.autoencoder_cosmos import PRESETS as VIDEO
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.autoencoder_cosmos_image import PRESETS as IMAGE
from ..models.autoencoder_cosmos_image import CosmosImageTokenizer
from .tokenizer import convert_tokenizer_keys, is_unused
from .torchscript import is_torchscript, read_torchscript

Tokenizer = CosmosVideoTokenizer | CosmosImageTokenizer


@dataclass
class Conversion:
    """A converted tokenizer, and what became of the files' entries.

    Attributes:
        files: role ("encoder", "decoder" or "autoencoder") -> file.
        converted: number of entries that went into the model; every parameter has exactly one.
        dropped: names of entries that the model computes itself (their values were checked) or that the network never used.
        geometry_is_certain: whether the entries fit no other geometry. Files of the first release carry resampling layers that
            they do not use; these would fit several, so only a comparison with the TorchScript tells.
    """

    model: Tokenizer
    files: dict[str, Path]
    converted: int
    dropped: list[str] = field(default_factory=list)
    geometry_is_certain: bool = True


def preset_of(name: str) -> str:
    """Our preset for a published name: "Cosmos-1.0-Tokenizer-CV8x8x8" -> "cv8x8x8"; a preset's own name is taken as it is."""
    names = [preset for preset in (*VIDEO, *IMAGE) if preset != "tiny"]
    match = re.search(r"([CD][IV])(\d+x\d+(?:x\d+)?)(-360p)?", name, flags=re.IGNORECASE)
    preset = "".join(part or "" for part in match.groups()).lower() if match else name
    if preset not in names:
        raise ValueError(f"{name!r} names no published tokenizer; there is {', '.join(names)}")
    return preset


def build_preset(preset: str, **changes) -> Tokenizer:
    """The tokenizer of a published name or a preset, with changes to its config, on the meta device: shapes, no memory."""
    preset = preset if preset in VIDEO else preset_of(preset)
    cls, config = (CosmosVideoTokenizer, VIDEO) if preset in VIDEO else (CosmosImageTokenizer, IMAGE)
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    if unknown := changes.keys() - set(known):
        raise ValueError(f"{cls.__name__} has no config {sorted(unknown)}; there is {', '.join(known)}")
    with torch.device("meta"):
        return cls(**{**config[preset], **changes})


def find_files(folder: str | Path) -> tuple[list[Path], Path | None]:
    """(weight files, `mean_std.pt` or None) of a folder as published."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    for names in (("encoder.jit", "decoder.jit"), ("autoencoder.jit",)):
        if all((folder / name).exists() for name in names):
            mean_std = folder / "mean_std.pt"
            return [folder / name for name in names], mean_std if mean_std.exists() else None
    raise ValueError(
        f"{folder} has neither encoder.jit and decoder.jit nor autoencoder.jit: "
        f"{', '.join(sorted(path.name for path in folder.iterdir())[:10]) or 'it is empty'}"
    )


def convert_tokenizer_files(
    files: list[str | Path], model: Tokenizer, mean_std: str | Path | None = None, dtype: torch.dtype | None = None
) -> Conversion:
    """Fill `model` (on the meta device, from `build_preset`) from files that hold an encoder, a decoder or both.

    Args:
        mean_std: statistics of the latents, a pair of tensors of C or C * T' numbers, channel by channel.
        dtype: of the result; None keeps that of the files.

    Raises ValueError for an entry that is unknown or missing, of another shape, or stored twice with different values.
    """
    state_dict, roles = {}, {}
    for path in map(Path, files):
        tensors = read_checkpoint(path)
        roles[_role(tensors, path)] = path
        for key, tensor in tensors.items():
            if key in state_dict and not torch.equal(state_dict[key], tensor):
                raise ValueError(f"{key} in {path} differs from the one in the file before")
            state_dict[key] = tensor
    for part in ("encoder", "decoder"):
        if part not in roles and "autoencoder" not in roles:
            raise ValueError(f"no {part} among {', '.join(map(str, files))}: give {part}.jit, too, or autoencoder.jit")
    converted = convert_tokenizer_keys(state_dict, model)
    dtype = dtype or next(iter(converted.values())).dtype
    kept = {id(tensor) for tensor in converted.values()}
    model.load_state_dict({key: value.to(dtype) for key, value in converted.items()}, strict=True, assign=True)
    if mean_std is not None:
        mean, std = read_mean_std(mean_std, model.config.latent_channels)
        model.register_to_config(latents_mean=mean, latents_std=std)
    dropped = [key for key, tensor in state_dict.items() if id(tensor) not in kept]
    certain = not any(map(is_unused, dropped))
    return Conversion(model.eval(), roles, len(converted), dropped, certain)


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a TorchScript file, a state dict saved by torch (also under the key "model"), or a safetensors file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is neither TorchScript nor a state dict saved by torch: {error}") from error
    saved = saved.get("model", saved) if isinstance(saved, dict) else saved
    if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise ValueError(f"{path} holds a {type(saved).__name__} that is no state dict of tensors")
    return dict(saved)


def _role(tensors: dict, path: Path) -> str:
    parts = {key.split(".")[0] for key in tensors}
    if {"encoder", "decoder"} <= parts:
        return "autoencoder"
    for role in ("encoder", "decoder"):
        if role in parts:
            return role
    raise ValueError(f"{path} has neither encoder.* nor decoder.* entries, but {sorted(parts)[:8]}")


def read_mean_std(path: str | Path, channels: int) -> tuple[list, list]:
    """`mean_std.pt` -> (mean, std) as configs hold them: [C], or [C][T'] where there are statistics per latent frame."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, (tuple, list)) or len(saved) != 2 or not all(isinstance(t, torch.Tensor) for t in saved):
        raise ValueError(f"{path} must hold a pair of tensors, mean and std")
    mean, std = (tensor.float().flatten() for tensor in saved)
    if len(mean) != len(std) or len(mean) % channels or not len(mean):
        raise ValueError(f"{path} has {len(mean)} means and {len(std)} deviations for {channels} latent channels")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and std.min() > 0):
        raise ValueError(f"{path}: means must be finite, deviations finite and above zero")
    return tuple((t if len(t) == channels else t.view(channels, -1)).tolist() for t in (mean, std))
