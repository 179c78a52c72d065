"""Latents and text embeddings on disk, computed once, named by the content that they depend on.

    <folder>/latents-<hash of the tokenizer>/<hash of the video>-<start>-<num_frames>.safetensors
    <folder>/text-<hash of the text encoder>/<hash of the caption>.safetensors

So a changed video, tokenizer, size or caption is coded again, and nothing else is. The video tokenizer is causal: the
latents of a window that starts at frame 8 are not those of the whole clip from frame 8 on, since its first frame is
coded alone. Windows are therefore coded one by one, for a short list of starts, and training draws among those: for
as few as cover a clip (`covering_starts`), or for those that a run names.

Of clips of several cameras every view has its own file, so that other choices of views share them.
"""

import hashlib
import json
import logging
import math
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ..conditioning.views import join_views
from ..data.clips import BROKEN, ClipDataset
from ..data.samples import content_hash, window_arrays
from ..data.video import to_float
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from .devices import at_work
from .text import embed_tokens, tokenize

logger = logging.getLogger(__name__)


def model_hash(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that change with any weight or config value."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    known = {k: v for k, v in config.items() if not k.startswith("_") and "version" not in k}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class LatentDataset(Dataset):
    """Windows of clips as latents. A sample: `latents` float32 [C, T', H', W'] (normalised), or the `indices` int64
    [T', H', W'] of a discrete tokenizer; `fps`, `caption`, `key`; and the window of the clip's `arrays`.
    Of a clip of several views, T' is those of all views, one view after the other, or of indices H' the rows of all, one view below
    the other; and there are `views` and `view_captions`.

    Args:
        windows: per clip the files of its windows, one for each view, and the pixel frames that each holds.
        captions, keys: per clip.
        random: draw among a clip's windows (by the sampler's draw), else its first.
        arrays: per clip what a sample has besides (`actions`, `camera`), of the whole clip.
        view_captions: per clip the captions of its views; None for clips of one camera.
        views: their names.
    """

    def __init__(
        self,
        windows: list[dict[tuple[Path, ...], slice]],
        captions: list[str],
        keys: list[str],
        random: bool = True,
        arrays: list[dict] | None = None,
        view_captions: list[list[str]] | None = None,
        views: tuple[str, ...] | None = None,
    ):
        self.windows, self.captions, self.keys, self.random = windows, captions, keys, random
        self.arrays = arrays or [{}] * len(windows)
        self.view_captions, self.views = view_captions, views

    def __len__(self) -> int:
        return len(self.windows)

    def first(self, count: int) -> "LatentDataset":
        """The first clips, each with its first window."""
        parts = (self.windows, self.captions, self.keys)
        texts = self.view_captions and self.view_captions[:count]
        more = dict(random=False, arrays=self.arrays[:count], view_captions=texts, views=self.views)
        return LatentDataset(*(part[:count] for part in parts), **more)

    @cached_property
    def kinds(self) -> list[tuple[tuple[int, ...], float]]:
        """Shape of every clip's latents, or indices, and its frames per second: a batch is of one kind (`ResumableSampler`)."""
        return [_kind(next(iter(windows))) for windows in self.windows]

    @property
    def texts(self) -> list[str]:
        """Every text that a sample may come with."""
        others = [text for arrays in self.arrays for text in arrays.get("alternatives", ())]
        if self.view_captions is None:
            return self.captions + others
        return [caption for captions in self.view_captions for caption in captions] + others

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        index, draw = index if isinstance(index, tuple) else (index, 0)
        windows = self.windows[index]
        chosen = int(np.random.default_rng(draw).integers(len(windows))) if self.random else 0
        paths, window = list(windows.items())[chosen]
        parts = [_read_window(path) for path in paths]
        (coded, fps), sample = parts[0], dict(self.arrays[index])
        if self.views is not None:
            coded = {name: _join(name, [part[name] for part, _ in parts]) for name in coded}
            sample |= {"views": list(self.views), "view_captions": self.view_captions[index]}
        window_arrays(sample, window)
        return coded | {"fps": fps, "caption": self.captions[index], "key": self.keys[index]} | sample


def _join(name: str, views: list[torch.Tensor]) -> torch.Tensor:
    """What a tokenizer made of several views as the world model of its kind takes it."""
    return torch.cat(views, dim=1) if name == "indices" else join_views(torch.stack(views), dim=0)


def _kind(paths: tuple[Path, ...]) -> tuple[tuple[int, ...], float]:
    with safe_open(paths[0], "pt") as file:
        return tuple(file.get_slice(next(iter(file.keys()))).get_shape()), float(file.metadata()["fps"])


def _read_window(path: Path) -> tuple[dict[str, torch.Tensor], float]:
    with safe_open(path, "pt") as file:
        tensors, fps = {name: file.get_tensor(name) for name in file.keys()}, float(file.metadata()["fps"])  # noqa: SIM118
    return {n: t.float() if t.is_floating_point() else t.long() for n, t in tensors.items()}, fps


@torch.no_grad()
def cache_latents(
    clips: ClipDataset,
    tokenizer: CosmosVideoTokenizer,
    folder: str | Path,
    num_frames: int,
    starts: list[int],
    random: bool = True,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
    arrays: tuple[str, ...] = (),
) -> LatentDataset:
    """Code what is not yet on disk and return all of it, and log of every data set how many of its frames lie in a window.

    `starts` are the first frames of the windows; empty: those of every clip that cover it (`covering_starts`). Windows that a clip
    is too short for are left out.
    `arrays` are the names of what samples have besides; a clip without them is broken.
    `clips` must give whole clips (`num_frames=None`, `random=False`). Process `rank` of `world_size` codes its share;
    the caller lets all processes finish before training, for the result names the files of all.
    A clip that cannot be read or holds none of the windows is treated by the policy of `clips` for broken samples.
    """
    if clips.reader.num_frames is not None or clips.reader.random:
        raise ValueError("caching needs whole clips: ClipDataset(..., num_frames=None, random=False)")
    folder = Path(folder) / f"latents-{model_hash(tokenizer)}"
    folder.mkdir(parents=True, exist_ok=True)
    several = clips.reader.views is not None and not isinstance(clips.reader.views, str)
    windows, captions, keys, beside, texts, seen = [], [], [], [], [], {}
    for i in tqdm(range(len(clips)), desc="latents", unit="clip", disable=not progress or rank > 0):
        files, key = clips.files(i), clips.key(i)
        try:
            names, length = _video_hashes(clips, files), clips.reader.length(files)[0]
            fitting = [s for s in starts or covering_starts(length, num_frames) if s + num_frames <= length]
            paths = {s: tuple(folder / f"{name}-{s}-{num_frames}.safetensors" for name in names) for s in fitting}
            if not paths:
                where = f" from any of the starts {starts}" * bool(starts)
                raise ValueError(f"it has {length} frames: too few for {num_frames}{where}")
            missing = [(s, v) for s, group in paths.items() for v, path in enumerate(group) if not path.exists()]
            if missing and i % world_size == rank:
                sample = clips.reader.read_whole(files, key)
                for start, v in missing:
                    view = sample | {"video": sample["video"][v]} if several else sample
                    _write_window(view, start, num_frames, tokenizer, paths[start][v])
            caption, record = clips.reader.text(files, key)
            found = clips.reader.read_arrays(files, key, arrays) if arrays else {}
        except BROKEN as error:
            clips.broken.meet(key, error, len(clips))
            continue
        windows.append({group: slice(start, start + num_frames) for start, group in paths.items()})
        if several:
            texts.append(clips.reader.view_captions(caption, record))
        captions.append(caption)
        keys.append(key)
        beside.append(found)
        inside = {frame for start in fitting for frame in range(start, start + num_frames)}
        seen[clips.path(i)] = np.add(seen.get(clips.path(i), (0, 0)), (len(inside), length))
    for path, counts in seen.items() if rank == 0 else ():
        logger.info("%s: %d of %d frames lie in a window of %d frames", path, *counts, num_frames)
    views = (texts, tuple(clips.reader.views)) if several else (None, None)
    return LatentDataset(windows, captions, keys, random, beside, *views)


def covering_starts(length: int, num_frames: int) -> list[int]:
    """First frames of as few windows as cover a clip of `length` frames, evenly spaced; the last one ends with the clip.

    Empty where the clip is shorter than a window.
    """
    last = length - num_frames
    gaps = max(1, math.ceil(last / num_frames))
    return sorted({i * last // gaps for i in range(gaps + 1)}) if last >= 0 else []


def _video_hashes(clips: ClipDataset, files: dict) -> list[str]:
    """Of the bytes of every view's video, and of how they are made into frames."""
    names = []
    for file in clips.reader.videos(files).values():
        digest = content_hash(file)
        digest.update(repr((clips.reader.size, clips.reader.crop, clips.reader.fps)).encode())
        names.append(digest.hexdigest()[:32])
    return names


def _write_window(sample: dict, start: int, num_frames: int, tokenizer: CosmosVideoTokenizer, path: Path):
    video = to_float(sample["video"][:, start : start + num_frames])[None]
    coded = tokenizer.encode(video.to(tokenizer.device, tokenizer.dtype))
    if coded.indices is not None:
        tensors = {"indices": coded.indices[0].int().cpu().contiguous()}
    else:
        latents = tokenizer.normalize(coded.latents.float())[0].half().cpu().contiguous()
        if not torch.isfinite(latents).all():
            raise ValueError(f"the latents of {sample['key']!r} are not finite: look at the tokenizer's latents_std")
        tensors = {"latents": latents}
    save_window(path, tensors, sample["fps"])


def save_window(path: Path, tensors: dict[str, torch.Tensor], fps: float):
    """A file of `LatentDataset`: `latents`, or int32 `indices`, of one window."""
    _write(path, lambda temporary: save_file(tensors, temporary, {"fps": repr(fps)}))


def _write(path: Path, write):
    """All or nothing: a run that is cut must not leave half a file behind that counts as cached."""
    temporary = path.with_suffix(f".partial-{os.getpid()}")
    write(temporary)
    temporary.replace(path)


@torch.no_grad()
def cache_text(
    captions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    encoder: T5EncoderModel,
    folder: str | Path,
    length: int,
    progress: bool = True,
) -> dict[str, Path]:
    """Caption -> file of its embeddings [N, D] up to the text's end, in the encoder's dtype; `load_text` pads them.

    The encoder works on the GPU where it has room, and is moved there only for captions that are new.
    """
    folder = Path(folder) / f"text-{model_hash(encoder)}"
    folder.mkdir(parents=True, exist_ok=True)
    paths, new = {}, {}
    for caption in sorted(set(captions)):
        ids, mask = tokenize(tokenizer, [caption], length)
        digest = hashlib.sha256(json.dumps(ids[mask.bool()].tolist()).encode()).hexdigest()[:32]
        paths[caption] = folder / f"{digest}.safetensors"
        if not paths[caption].exists():
            new[paths[caption]] = ids, mask
    if not new:
        return paths
    with at_work(encoder):
        for path, (ids, mask) in tqdm(new.items(), desc="texts", unit="text", disable=not progress):
            embeds = embed_tokens(encoder, ids.to(encoder.device), mask.to(encoder.device))[0, : int(mask.sum())]
            embeds = embeds.cpu().contiguous()
            _write(path, lambda temporary, embeds=embeds: save_file({"embeds": embeds}, temporary))
    return paths


def load_text(path: Path, length: int) -> torch.Tensor:
    """Embeddings [length, D], zero past the text's end, float32."""
    with safe_open(path, "pt") as file:
        embeds = file.get_tensor("embeds").float()
    return torch.cat([embeds, embeds.new_zeros(length - len(embeds), embeds.shape[1])])
