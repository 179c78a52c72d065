"""Diffusion transformers from file to file: the reference's checkpoints to our folders and back, without a model in memory."""

import json
from pathlib import Path

import torch

from ..models.transformer_cosmos import CosmosWorldTransformer3D
from ..models.uncertainty_cosmos import UncertaintyHead
from .checkpoints import Checkpoint, write_shards
from .diffusion import (
    POSITIONS,
    UNCERTAINTY,
    check_positions,
    check_weight,
    classify_keys,
    load_original_uncertainty,
    original_key,
)

SHARD_SIZE = 5 * 10**9


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    config: dict,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = SHARD_SIZE,
) -> UncertaintyHead | None:
    """A checkpoint of the reference -> a folder that `CosmosWorldTransformer3D.from_pretrained` reads.

    Args:
        source: `.pt` or `.safetensors`, or a folder of them (`Checkpoint`).
        config: constructor arguments of `CosmosWorldTransformer3D`, for example `PRESETS["7b-video2world"]`.
        dtype: of the weights written; None keeps each as it is stored.
        max_shard_size: bytes of an output file; memory stays near it plus one tensor.

    Returns the uncertainty head of training where the checkpoint has one (`logvar.*`).
    Raises ValueError for a key that the config does not have, a missing one, a wrong shape, and values that are not finite.
    """
    with torch.device("meta"):
        model = CosmosWorldTransformer3D(**config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    checkpoint = Checkpoint(source)
    keys = {}
    for key, name in classify_keys(checkpoint.keys(), expected).items():
        if name is not None:
            check_weight(key, checkpoint.shapes[key], expected[name])
            keys[name] = key
        elif key.endswith(POSITIONS):
            check_positions(key, checkpoint[key])

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint[keys[name]]
        if not tensor.isfinite().all():
            raise ValueError(f"{keys[name]} in {source} has values that are not finite: the checkpoint is damaged")
        return tensor.to(dtype)

    sizes = {name: _bytes(expected[name], checkpoint.item_sizes[keys[name]], dtype) for name in expected}
    write_shards(folder, sizes, read, max_shard_size)
    model.save_config(folder)
    logvar = {key: checkpoint[key] for key in checkpoint.keys() if key.startswith("logvar.")}  # noqa: SIM118
    return load_original_uncertainty(logvar) if logvar else None


def export_checkpoint(
    folder: str | Path,
    target: str | Path,
    *,
    uncertainty: UncertaintyHead | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = SHARD_SIZE,
):
    """A folder of `CosmosWorldTransformer3D` -> a checkpoint of the reference: `net.` keys, its position buffer, `logvar.*`.

    `target` is a `.pt` file as the reference reads it, or a folder for safetensors shards.
    Raises ValueError where the folder's weights are not those of its config, or hold what the reference has no class for.
    """
    folder, target = Path(folder), Path(target)
    with torch.device("meta"):
        model = CosmosWorldTransformer3D.from_config(CosmosWorldTransformer3D.load_config(folder))
    real_channels = model.config.condition_channels and model.condition_embed is None
    if model.config.camera_channels or real_channels or model.text_refiner is not None:
        raise ValueError(
            "the reference has no class with camera rays, real condition channels or a text refiner: keep this model as it is"
        )
    weights = Checkpoint(folder)
    names = list(model.state_dict())
    if strange := sorted(set(names) ^ set(weights.keys())):
        raise ValueError(f"the weights in {folder} are not those of its config: {strange[:5]} are missing or unknown")
    patches = [size // patch for size, patch in zip(model.config.max_size, model.config.patch_size, strict=True)]
    first = weights[names[0]]
    extra = {f"net.{POSITIONS}": torch.arange(max(patches)).to(dtype or first.dtype)}
    if uncertainty is not None:
        state = uncertainty.state_dict()
        extra |= {f"logvar.{key}": state[name].to(dtype) for key, name in UNCERTAINTY.items()}
    keys = {f"net.{original_key(name)}": name for name in names}

    def read(key: str) -> torch.Tensor:
        return extra[key] if key in extra else weights[keys[key]].to(dtype)

    if target.suffix == ".pt":
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: read(key) for key in (*keys, *extra)}, target)
        return
    sizes = {key: _bytes(weights.shapes[name], weights.item_sizes[name], dtype) for key, name in keys.items()}
    write_shards(
        target, sizes | {key: value.nbytes for key, value in extra.items()}, read, max_shard_size, name="model"
    )


def transformer_config_of(folder_or_file: str | Path) -> dict:
    """Constructor arguments in a `config.json` of our class."""
    path = Path(folder_or_file)
    path = path / "config.json" if path.is_dir() else path
    config = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("_")}
    return config


def _bytes(shape: tuple[int, ...], item_size: int, dtype: torch.dtype | None) -> int:
    return torch.Size(shape).numel() * (item_size if dtype is None else dtype.itemsize)
