"""Reference tensors: tests/golden/<family>/<name>.safetensors, or the full set where COSMOS_HF_GOLDEN names its folder.

The files in the tree are cut down to what the tests read. A test that needs more asks for `full=True` and is skipped without
the full set.
"""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open

HERE = Path(__file__).parent / "golden"
FULL = Path(os.environ["COSMOS_HF_GOLDEN"]) if os.environ.get("COSMOS_HF_GOLDEN") else None


@cache
def _open(path: Path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def golden(family: str, name: str, *, full: bool = False):
    """(tensors, metadata, config) of a fixture; tensors in a new dict, config None where the file has none."""
    path = FULL / family / f"{name}.safetensors" if FULL else HERE / family / f"{name}.safetensors"
    if full and not FULL:
        pytest.skip("needs the full fixtures: set COSMOS_HF_GOLDEN to their folder")
    if not full and not path.exists():
        path = HERE / family / f"{name}.safetensors"
    tensors, metadata = _open(path)
    return dict(tensors), metadata, json.loads(metadata["config"]) if "config" in metadata else None


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
