"""What is installed, which devices there are, and whether a model's folder is complete, in words.

Reads file headers only: no model is loaded, and neither diffusers nor transformers is imported.
"""

import json
import os
import platform
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "numpy", "av")
SPEED = {
    "flash-attn": "faster attention on NVIDIA GPUs",
    "bitsandbytes": "8 and 4 bit weights",
    "torchao": "8 bit weights",
}
WEIGHT_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
}


@dataclass
class Finding:
    """One line of the report; a `problem` keeps something from working."""

    text: str
    problem: bool = False

    def __str__(self):
        return f"PROBLEM: {self.text}" if self.problem else self.text


def examine(model: str | Path | None = None) -> list[Finding]:
    """Findings on this installation and on a pipeline's folder, by default the bundled nano model's."""
    if model is None:
        from .nano import nano_path

        model = nano_path()
    devices, gpu_memory = _devices()
    return [*_versions(), *devices, *_extras(), *examine_model(model, gpu_memory)]


# ---- the installation ----------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    found = {name: _version(name) for name in ("cosmos-hf", *NEEDED)}
    present = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    findings = [Finding(f"Python {platform.python_version()} on {platform.platform()}"), Finding(present)]
    missing = [name for name, number in found.items() if not number]
    if missing:
        findings.append(Finding(f"not installed: {', '.join(missing)}. pip install {' '.join(missing)}", problem=True))
    vision, torch_version = _version("torchvision"), found["torch"]
    if vision and torch_version:
        wanted = [r for r in requires("torchvision") or [] if re.match(r"torch\s*[=(]", r)]
        pinned = re.search(r"==\s*([\d.]+)", wanted[0]) if wanted else None
        if pinned and pinned[1] != torch_version.split("+")[0]:
            text = (
                f"torchvision {vision} is made for torch {pinned[1]}, not {torch_version}: imports of diffusers and "
            )
            findings.append(Finding(f"{text}transformers will fail. pip uninstall torchvision", problem=True))
    return findings


def _devices() -> tuple[list[Finding], int | None]:
    """What there is to compute on, and the memory of the largest CUDA device."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    findings = [Finding(f"{os.cpu_count()} processor cores, {_size(memory)} of memory")]
    if find_spec("torch") is None:
        return findings, None
    import torch

    sizes = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        sizes.append(properties.total_memory)
        findings.append(Finding(f"cuda:{i} {properties.name}, {_size(sizes[-1])}"))
    if torch.backends.mps.is_available():
        findings.append(Finding("Apple GPU (mps)"))
    if len(findings) == 1:
        findings.append(Finding("no GPU: the nano models run on the processor, the published ones would take days"))
    return findings, max(sizes, default=None)


def _extras() -> list[Finding]:
    """The optional parts of setup.cfg: what is there and what to install for the rest."""
    members: dict[str, list[str]] = {}
    for requirement in requires("cosmos-hf") or []:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", requirement)
        if extra:
            members.setdefault(extra[1], []).append(re.match(r"[\w.-]+", requirement)[0])
    findings = []
    for extra, names in members.items():
        missing = [name for name in names if not _version(name)]
        state = f"missing {', '.join(missing)}: pip install 'cosmos-hf[{extra}]'" if missing else "complete"
        findings.append(Finding(f"optional part `{extra}`: {state}"))
    for name, use in SPEED.items():
        findings.append(Finding(f"{name} ({use}): {_version(name) or 'not installed'}"))
    return findings


# ---- a model -------------------------------------------------------------------------------------------------------


def examine_model(folder: str | Path, gpu_memory: int | None = None) -> list[Finding]:
    """Whether a pipeline's folder has all that its index names, whether the weights are whole, and how large they are.

    `gpu_memory`, in bytes: that of the device which it is to run on.
    """
    folder = Path(folder)
    if not folder.is_dir():
        text = f"{folder} is no folder here. If it is the name of a model on the Hub: hf download {folder}"
        return [Finding(text, problem=True)]
    index = folder / "model_index.json"
    if not index.exists():
        return [Finding(f"{folder} has no model_index.json: it is not the folder of a pipeline", problem=True)]
    content = json.loads(index.read_text())
    findings, sizes = [Finding(f"model {folder}: {content.get('_class_name')}")], {}
    for name, value in content.items():
        if not isinstance(value, list) or name.startswith("_"):
            continue
        library, kind = value
        if library is None:
            findings.append(Finding(f"{name}: none, the pipeline goes without"))
            continue
        part, sizes[name] = _component(folder / name, name, library, kind)
        findings += part
    total = sum(sizes.values())
    free = shutil.disk_usage(folder).free
    findings.append(Finding(f"weights: {_size(total)} in memory as stored; {_size(free)} free on its disk"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if gpu_memory is not None and total > gpu_memory:
        largest = max(sizes, key=sizes.get)
        text = f"the weights are larger than the GPU's memory of {_size(gpu_memory)}: pipe.enable_model_cpu_offload() keeps "
        text += f"one part at a time there, of which {largest} is the largest with {_size(sizes[largest])}"
        findings.append(Finding(text, problem=sizes[largest] > gpu_memory))
    if memory and total > memory:
        findings.append(Finding(f"the weights are larger than this machine's memory of {_size(memory)}", problem=True))
    return findings


def _component(folder: Path, name: str, library: str, kind: str) -> tuple[list[Finding], int]:
    if find_spec(library.split(".")[0]) is None:
        return [Finding(f"{name}: {kind} is of {library}, which is not installed", problem=True)], 0
    if not folder.is_dir():
        return [Finding(f"{name}: the folder {folder} is missing", problem=True)], 0
    if library == "transformers" and "Tokenizer" in kind:
        return [_tokenizer(folder, name, kind)], 0
    if "Scheduler" in kind:
        known = (folder / "scheduler_config.json").exists()
        return [Finding(f"{name}: {kind}" + ("" if known else ", but scheduler_config.json is missing"), not known)], 0
    if not (folder / "config.json").exists():
        return [Finding(f"{name}: {folder / 'config.json'} is missing", problem=True)], 0
    return _weights(folder, name, kind)


def _tokenizer(folder: Path, name: str, kind: str) -> Finding:
    if (folder / "tokenizer.json").exists():
        return Finding(f"{name}: {kind}")
    if not (folder / "spiece.model").exists():
        return Finding(f"{name}: neither tokenizer.json nor spiece.model is in {folder}", problem=True)
    missing = _version("sentencepiece") is None
    text = f"{name}: {kind}, from a SentencePiece model"
    return Finding(f"{text}, which needs pip install sentencepiece" if missing else text, missing)


def _weights(folder: Path, name: str, kind: str) -> tuple[list[Finding], int]:
    files, findings = sorted(folder.glob("*.safetensors")), []
    for index in folder.glob("*.safetensors.index.json"):
        named = {folder / shard for shard in json.loads(index.read_text())["weight_map"].values()}
        if lost := sorted(path.name for path in named - set(files)):
            findings.append(
                Finding(f"{name}: {len(lost)} of {len(named)} shards are missing: {', '.join(lost)}", True)
            )
    if not files and not findings:
        findings.append(Finding(f"{name}: no .safetensors file in {folder}", problem=True))
    counts, total = Counter(), 0
    for path in files:
        try:
            for dtype, count in _header(path).items():
                counts[dtype] += count
                total += count * WEIGHT_BYTES.get(dtype, 4)
        except ValueError as error:
            findings.append(Finding(f"{name}: {error}", problem=True))
    if counts:
        kinds = ", ".join(f"{count / 1e6:,.1f} M numbers in {dtype}" for dtype, count in counts.most_common())
        findings.insert(0, Finding(f"{name}: {kind}, {kinds}"))
    return findings, total


def _header(path: Path) -> Counter:
    """Numbers by dtype, from the header of a safetensors file. ValueError where the file is not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: git lfs pull, or hf download")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size:
            raise ValueError(f"{path} is no safetensors file or was cut off")
        header = json.loads(file.read(length))
    tensors = [entry for key, entry in header.items() if key != "__metadata__"]
    expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    if size != expected:
        raise ValueError(f"{path} has {size} bytes instead of {expected}: download it again")
    counts = Counter()
    for entry in tensors:
        count = 1
        for side in entry["shape"]:
            count *= side
        counts[entry["dtype"]] += count
    return counts


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
