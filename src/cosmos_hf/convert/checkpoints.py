"""Checkpoint files read and written tensor by tensor: memory stays near one output shard plus one tensor, whatever the size.

Reads `.pt` (as weights only, memory-mapped), `.safetensors`, a folder of either, and a folder with an index of shards; writes
the shards and the index that `from_pretrained` of diffusers reads.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS = "diffusion_pytorch_model"
# Checkpoints of a training run hold the weights beside other things, under one of these names.
_NESTED = ("model", "state_dict")


class Checkpoint:
    """The tensors of a checkpoint, by key, each read when it is asked for.

    Raises ValueError for a path without weights, a key that several files hold, and a file that is no state dict.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.item_sizes: dict[str, int] = {}  # bytes of an element
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        self._open = []  # safetensors files are kept open while they are read
        for file in checkpoint_files(self.path):
            for key, shape, item_size, reader in self._read(file):
                if key in self._readers:
                    raise ValueError(f"{self.path} holds the key {key} in several files: give one model's files only")
                self.shapes[key], self.item_sizes[key], self._readers[key] = shape, item_size, reader

    def keys(self) -> list[str]:
        return list(self._readers)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._readers[key]()

    def _read(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], int, Callable[[], torch.Tensor]]]:
        if file.suffix == ".safetensors":
            handle = safe_open(file, "pt")
            self._open.append(handle)
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(key)
                bits = re.search(r"\d+", part.get_dtype())  # "BF16", "F32", or "BOOL", which is a byte
                item_size = int(bits[0]) // 8 if bits else 1
                yield key, tuple(part.get_shape()), item_size, lambda key=key: handle.get_tensor(key)
            return
        for key, value in load_pt(file).items():
            if torch.is_tensor(value):
                yield key, tuple(value.shape), value.element_size(), lambda value=value: value
            else:
                yield key, (), 0, lambda: torch.empty(0)


def load_pt(file: Path) -> dict:
    """The state dict in a `.pt` file; Transformer Engine's bookkeeping may be bytes instead of tensors."""
    with torch.serialization.safe_globals([io.BytesIO]):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for name in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    strange = [
        key for key, value in content.items() if not torch.is_tensor(value) and not key.endswith("_extra_state")
    ]
    if strange:
        raise ValueError(f"{file} is no state dict: {strange[:5]} are no tensors")
    return content


def checkpoint_files(path: Path) -> list[Path]:
    """The files that make up a checkpoint: the path itself, or those of a folder."""
    if path.is_file():
        if path.suffix not in (".pt", ".pth", ".safetensors"):
            raise ValueError(f"{path} must be a .pt or .safetensors file, or a folder of them")
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint at {path}")
    indices = sorted(path.glob("*.index.json"))
    if len(indices) > 1:
        raise ValueError(
            f"{path} has several indices of shards {[file.name for file in indices]}: name one model's folder"
        )
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        absent = [name for name in names if not (path / name).exists()]
        if absent:
            raise ValueError(f"{indices[0]} names shards that are not there: {absent}")
        return [path / name for name in names]
    for suffix in (".safetensors", ".pt", ".pth"):
        if files := sorted(path.glob(f"*{suffix}")):
            return files
    raise ValueError(f"{path} has no .safetensors and no .pt files")


def write_shards(
    folder: str | Path,
    sizes: dict[str, int],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int = 5 * 10**9,
    name: str = WEIGHTS,
):
    """Write tensors as safetensors shards with an index, as diffusers' `save_pretrained` lays them out.

    Args:
        sizes: every key and its bytes, which decide on the shards before a tensor is read.
        read: key -> tensor; called once for each, shard after shard.
        max_shard_size: bytes; a larger tensor is a shard of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}*"):
        old.unlink()
    shards, size = [[]], 0
    for key, count in sizes.items():
        if shards[-1] and size + count > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += count
    weight_map, total = {}, 0
    for i, keys in enumerate(shards):
        file = f"{name}.safetensors" if len(shards) == 1 else f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: read(key).contiguous() for key in keys}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(keys, file)
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def parse_size(text: str) -> int:
    """ "5GB" -> bytes; KB, MB and GB are powers of ten."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), flags=re.I)
    if not match:
        raise ValueError(f"a size must be like 500MB or 5GB, got {text!r}")
    return int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2].upper()])
