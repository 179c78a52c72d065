"""Reference tensors: tests/golden/<family>/<name>.safetensors, or the full set where COSMOS_HF_GOLDEN names its folder.

The files in the tree are cut down to what the tests read. A test that needs more asks for `full=True` and is skipped without
the full set. Of most models the tree holds a skeleton, without the megabytes of random weights: names, shapes, config and small
tensors. Weights of those shapes take the place of the reference's, and a test that compares outputs (`outputs=True`) is skipped;
`recorded_outputs` guards the numbers of those models.
"""

import json
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent / "golden"
FULL = Path(os.environ["COSMOS_HF_GOLDEN"]) if os.environ.get("COSMOS_HF_GOLDEN") else None


def normal(name: str, shape) -> torch.Tensor:
    """Standard normal numbers that depend on the name and the shape alone: numpy's legacy generator never changes."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))).float()


@cache
def _open(path: Path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    for name, shape in json.loads(metadata.get("skeleton", "{}")).items():
        fan_in = max(1, int(np.prod(shape[1:])))
        tensors[name] = normal(name, shape) / fan_in**0.5
    return tensors, metadata


def golden(family: str, name: str, *, full: bool = False, outputs: bool = False):
    """(tensors, metadata, config) of a fixture; tensors in a new dict, config None where the file has none."""
    path = FULL / family / f"{name}.safetensors" if FULL else HERE / family / f"{name}.safetensors"
    if not full and not path.exists():
        path = HERE / family / f"{name}.safetensors"
    if full and not FULL:
        pytest.skip("needs the full fixtures: set COSMOS_HF_GOLDEN to their folder")
    tensors, metadata = _open(path)
    if outputs and "skeleton" in metadata:
        pytest.skip("needs the reference's weights: set COSMOS_HF_GOLDEN to the folder of the full fixtures")
    return dict(tensors), metadata, json.loads(metadata["config"]) if "config" in metadata else None


def make_skeleton(path: Path, largest: int = 4096, keep: tuple[str, ...] = ()):
    """Replace the file of a fixture by its skeleton: weights of more than `largest` bytes become shapes, outputs go.

    `keep`: beginnings of the names of what does not depend on the weights.
    """
    tensors, metadata = _open(path)
    state = {key: value for key, value in tensors.items() if key.startswith("weights.")}
    big = {key: list(value.shape) for key, value in state.items() if value.nbytes > largest}
    others = {k: v for k, v in tensors.items() if v.dtype == torch.long or k.startswith(("weights.", *keep))}
    kept = {key: value for key, value in others.items() if key not in big}
    save_file(kept, path, metadata | {"skeleton": json.dumps(big)})


def golden_json(*parts: str):
    """A JSON file of the full set, for example ("manifests", "diffusion", "7B_Text2World"); skips without the set."""
    if not FULL:
        pytest.skip("needs the full fixtures: set COSMOS_HF_GOLDEN to their folder")
    return json.loads(FULL.joinpath(*parts[:-1], f"{parts[-1]}.json").read_text())


def weights(tensors: dict) -> dict:
    """The reference's state dict in a fixture."""
    return {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}


def part(tensors: dict, prefix: str) -> dict:
    """The entries under `prefix.`, without it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
