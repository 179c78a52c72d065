"""Tensors of a TorchScript file, read without running anything from it.

A TorchScript file is a zip archive: `data.pkl`, a pickle of the tree of modules with their attributes, raw bytes of the tensors
under `data/`, and the program under `code/`. `torch.jit.load` hands the program to TorchScript's interpreter. Here the program
is not opened at all. The pickle is read by an unpickler that knows only: making a tensor from raw bytes, an empty record for
each module (whose attributes are then stored as plain values), ordered dictionaries, and TorchScript's typed lists.
Any other name in the pickle is refused before it is looked up.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path

import torch

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TYPED_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


def is_torchscript(path: str | Path) -> bool:
    """Whether the file is an archive with a program, which a plain `torch.save` file has not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_torchscript(path: str | Path) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, also those that the program never uses; no code of the file is run.

    Raises ValueError for a file that is no TorchScript, holds anything but tensors and plain values, or has no named tensors
    (a frozen module keeps them as numbered constants of its program).
    """
    if not is_torchscript(path):
        raise ValueError(f"{path} is not a TorchScript file (an archive with data.pkl and code/)")
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if "/code/" in name).split("/")[0]
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
            raise ValueError(f"{path} was written on a big-endian machine, which is not supported")
        try:
            module = _ModuleUnpickler(archive, root).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {error}") from error
        except (KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    tensors = dict(_named_tensors(module, ""))
    if not tensors:
        raise ValueError(
            f"{path} has no named tensors: it is a frozen module, whose weights are numbered constants of its program. "
            "Use the file from before torch.jit.freeze"
        )
    return tensors


class _Module:
    """Stands for a module of the file; `BUILD` of the pickle fills its attributes."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"a module's state is a {type(state).__name__}, expected its attributes")
        self.attributes = state


class _ModuleUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root, self._storages = archive, root, {}

    def find_class(self, module: str, name: str):
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if module == "torch.jit._pickle" and name in _TYPED_LISTS:
            return list
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not needed to rebuild tensors")

    def persistent_load(self, saved):
        kind, dtype, key, _, length = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"the pickle refers to {saved}, expected the storage of a tensor")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            if len(data) < length * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes, needs {length * dtype.itemsize}")
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _rebuild_tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)


def _named_tensors(module, prefix: str):
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named_tensors(value, f"{prefix}{name}.")
