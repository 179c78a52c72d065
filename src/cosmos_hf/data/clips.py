"""Training clips from WebDataset shards or folders of videos, in one schema (`samples`), in an order that a seed fixes.

Randomness is carried by the index: the sampler hands out (index, draw) pairs, and a clip's window and crop depend on
`draw` alone. So workers, epochs and resumption cannot change what a run sees.

Shards are indexed, not unpacked: sets larger than memory are read from the disk as they are. `StreamedClips` reads shards
that are not on this disk at all.
"""

import glob
import logging
import os
import random
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from .annotated import BridgeClips, annotation_folder, tables_beside
from .samples import VIDEO_SUFFIXES, SampleReader

logger = logging.getLogger(__name__)

BROKEN = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


class TarClips:
    """Random access to the samples of WebDataset shards: an index of offsets, taken at construction.

    As in WebDataset, files belong together that share their folder and their name up to its first dot.
    """

    def __init__(self, paths: list[Path]):
        self._members: dict[str, dict[str, tuple[Path, int, int]]] = {}
        for path in sorted(paths):
            try:
                with tarfile.open(path, "r:") as archive:
                    members = [member for member in archive if member.isfile()]
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f"{path} is not a complete tar file: {error}") from error
            if self._bytes(path, max(0, path.stat().st_size - 512), 512).strip(b"\0"):
                # tarfile takes a cut file for a short one
                raise ValueError(f"{path} is not a complete tar file: it does not end as one; copy or render it again")
            for member in members:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = name.partition(".")
                files = self._members.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if extension in files:
                    raise ValueError(f"{member.name} is in {path} and in {files[extension][0]}: keys must be unique")
                files[extension] = (path, member.offset_data, member.size)
        self.keys = sorted(self._members)

    def read(self, key: str) -> dict[str, bytes]:
        return {extension: self._bytes(*place) for extension, place in self._members[key].items()}

    @staticmethod
    def _bytes(path: Path, offset: int, size: int) -> bytes:
        with open(path, "rb") as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise ValueError(f"{path} ends early: it was cut or replaced since it was indexed")
        return content


class FolderClips:
    """A folder of videos, each with its caption beside it: `clip.mp4` with `clip.txt` or with `clip.json` ("caption"), and
    with its arrays in `clip.npz`, `clip.csv` or `clip.json` (`annotated`)."""

    def __init__(self, folder: Path):
        self._videos: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                key = str(path.relative_to(folder).with_suffix(""))
                if key in self._videos:
                    raise ValueError(f"{path} and {self._videos[key]} would share a caption file: rename one")
                self._videos[key] = path
        self.keys = list(self._videos)

    def read(self, key: str) -> dict[str, Path]:
        video = self._videos[key]
        files = {video.suffix[1:].lower(): video}
        for extension in ("txt", "json", "npz", "csv"):
            if (beside := video.with_suffix(f".{extension}")).exists():
                files[extension] = beside
        return tables_beside(files, video)


def _local(path: str | Path) -> Path:
    """Where the data lie on this disk; a repository of the Hub is downloaded."""
    if not str(path).startswith("hf://"):
        return Path(path)
    from .lerobot import download

    return download(str(path))


def open_lerobot(path: str | Path):
    """The `LeRobotClips` of a folder or `hf://<user>/<name>`; None for data of another kind."""
    path = _local(path)
    if not (path / "meta" / "info.json").exists():
        return None
    from .lerobot import LeRobotClips

    return LeRobotClips(path)


def open_clips(path: str | Path):
    """A folder of shards, a shard, a pattern of shards (`data/train-*.tar`), a folder of videos, a LeRobot data set (a folder or
    `hf://<user>/<name>`), or a split of a Bridge-style one. The result has `keys` and `read(key)` -> files by extension.

    Raises FileNotFoundError naming what was looked for, and the splits where `path` holds a whole data set.
    """
    path = _local(path)
    if (lerobot := open_lerobot(path)) is not None:
        return lerobot
    if path.is_dir() and (annotations := annotation_folder(path)) is not None:
        return BridgeClips(annotations)
    if glob.has_magic(str(path)):
        shards = [Path(name) for name in sorted(glob.glob(str(path)))]
        if not shards or any(shard.suffix != ".tar" for shard in shards):
            raise FileNotFoundError(
                f"{path} must match .tar shards, it matches {[str(s) for s in shards[:3]] or 'nothing'}"
            )
    else:
        shards = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar"))
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path} (a repository of the Hub is hf://<user>/<name>)")
    if shards:
        return TarClips(shards)
    source = FolderClips(path) if path.is_dir() else None
    if source is None or not source.keys:
        splits = sorted(str(shard.parent) for shard in path.glob("*/*-00000.tar"))
        hint = f"; name one of its splits: {', '.join(splits)}" if splits else ""
        raise FileNotFoundError(
            f"{path} holds neither *.tar shards nor videos ({', '.join(VIDEO_SUFFIXES)}), and is no LeRobot "
            f"(meta/info.json) or Bridge-style (annotation/) data set{hint}"
        )
    return source


class BrokenSamples:
    """The policy for samples that cannot be read. "error": the first one ends the run. "skip": it is logged and left out,
    and more than the share `most` of all (and more than one) is an error. Every worker process keeps its own count."""

    def __init__(self, policy: str, most: float):
        if policy not in ("error", "skip"):
            raise ValueError(f"on_broken must be 'error' or 'skip', got {policy!r}")
        self.policy, self.most, self.keys = policy, most, set()

    def meet(self, key: str, error: Exception, total: int):
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        if self.policy == "error":
            raise ValueError(f"sample {key!r} is broken: {reason}") from error
        if key not in self.keys:
            logger.warning("skipped the broken sample %r: %s", key, reason)
        self.keys.add(key)
        if len(self.keys) > max(1, self.most * total):
            raise ValueError(
                f"{len(self.keys)} of {total} samples are broken, more than {self.most:.1%}; the last: {reason}"
            ) from error


class ClipDataset(Dataset):
    """Decoded samples of one or more sources, by random access. The sources are indexed at construction: shards that appear
    later belong to the next run.

    Args:
        paths: what `open_clips` takes, one or several.
        keep_decoded: keep decoded clips in memory (1.2 MB for 33 frames of 96x128): for sets that fit, and num_workers=0.
        on_broken: "error", or "skip": `collate_clips` leaves the sample out; more than the share `max_broken` is an error.
        reading: `num_frames`, `crop`, `size`, `fps`, `random`, `need_caption`, `views` of `SampleReader`.
    """

    def __init__(
        self, paths, *, keep_decoded: bool = False, on_broken: str = "error", max_broken: float = 0.01, **reading
    ):
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise ValueError("no data: name at least one folder of shards or videos")
        sources = [open_clips(path) for path in paths]
        self._paths = [path for path, source in zip(paths, sources, strict=True) for _ in source.keys]
        self._items = [(source, key) for source in sources for key in source.keys]
        self.reader = SampleReader(**reading)
        self.broken = BrokenSamples(on_broken, max_broken)
        self._decoded = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self._items)

    def key(self, index: int) -> str:
        return self._items[index][1]

    def path(self, index: int) -> str | Path:
        """The one of `paths` that a sample comes from."""
        return self._paths[index]

    def files(self, index: int) -> dict[str, bytes | Path]:
        """The stored files of a sample by extension, undecoded (to name what is computed from them by content)."""
        source, key = self._items[index]
        return source.read(key)

    def __getitem__(self, index: int | tuple[int, int]) -> dict | None:
        """Sample `index`, its window and crop by `draw` where (index, draw) is given. None for a skipped one."""
        index, draw = index if isinstance(index, tuple) else (index, 0)
        source, key = self._items[index]
        rng = np.random.default_rng(draw)
        try:
            if self._decoded is None:
                return self.reader.read(source.read(key), key, rng)
            if index not in self._decoded:
                self._decoded[index] = self.reader.read_whole(source.read(key), key)
            return self.reader.cut(self._decoded[index], rng)
        except BROKEN as error:
            self.broken.meet(key, error, len(self))

    def captions(self) -> list[str]:
        """All captions, without decoding a video (to train a text vocabulary)."""
        return [self.reader.text(source.read(key), key)[0] for source, key in self._items]


def data_names(paths: Sequence[str | Path]) -> list[str]:
    """Short names of data sets: the ends of their paths, as long as it takes to tell them apart.

    Raises ValueError where a path is given twice.
    """
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    if paths:
        raise ValueError(f"a data set is named twice: {', '.join(map(str, paths))}")
    return []


class StreamedClips(IterableDataset):
    """One pass over shards that lie elsewhere (any URL of the webdataset library, such as https://...), without random access.

    The order is a function of (seed, epoch): shards are permuted, and samples shuffled in a buffer. Processes and workers
    share the shards out, so there must be at least as many shards as processes times workers. To resume within an epoch,
    read and drop what was used (`accelerate.skip_first_batches`); where shards are on this disk, `ClipDataset` resumes
    without that.

    Args:
        urls: shards, one or a list; brace notation (`train-{00000..00042}.tar`) is understood.
        shuffle: samples in the shuffle buffer, undecoded; 0 keeps the order of the shards.
        others as in `ClipDataset`; `max_broken` is a share of the samples seen so far, beyond the first hundred.
    """

    def __init__(
        self,
        urls,
        *,
        seed: int = 0,
        shuffle: int = 1000,
        on_broken: str = "error",
        max_broken: float = 0.01,
        **reading,
    ):
        import braceexpand

        urls = [urls] if isinstance(urls, str) else urls
        self.urls = [str(url) for pattern in urls for url in braceexpand.braceexpand(str(pattern))]
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.reader = SampleReader(**reading)
        self.broken = BrokenSamples(on_broken, max_broken)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        import webdataset

        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.urls)) if self.shuffle else None
        urls = self.urls if order is None else [self.urls[i] for i in order]
        stream = webdataset.WebDataset(
            urls, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=True
        )
        if self.shuffle:
            rng = random.Random(f"{self.seed} {self.epoch}")
            stream = stream.shuffle(self.shuffle, initial=self.shuffle, rng=rng)
        for seen, files in enumerate(stream, 1):
            key = files["__key__"]
            files = {name: content for name, content in files.items() if not name.startswith("__")}
            draw = zlib.crc32(f"{self.seed} {self.epoch} {key}".encode())
            try:
                yield self.reader.read(files, key, np.random.default_rng(draw))
            except BROKEN as error:
                self.broken.meet(key, error, max(seen, 100))


def collate_clips(samples: list[dict | None]) -> dict:
    """Samples -> batch: `video` uint8 [B, 3, T, H, W], `fps` [B], tensors stacked where all samples have them, in one shape
    (else lists), `camera` likewise, all else lists. Skipped samples (None) are left out: the batch is that much smaller."""
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        raise ValueError("every sample of this batch was broken")
    batch = {"fps": torch.tensor([sample["fps"] for sample in samples])}
    shapes = {tuple(sample["video"].shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f"videos of one batch differ in shape: {sorted(shapes)}; set num_frames, size or crop")
    for name in samples[0]:
        if name == "fps" or not all(name in sample for sample in samples):
            continue
        values = [sample[name] for sample in samples]
        if name == "camera":
            batch[name] = {part: torch.stack([value[part] for value in values]) for part in values[0]}
        elif isinstance(values[0], torch.Tensor) and len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        else:
            batch[name] = values
    return batch
