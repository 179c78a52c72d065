"""One training sample from the files that belong to it: decoding, checks, the window in time and the crop in space.

A sample is a dict: `video` uint8 [3, T, H, W], `fps`, `caption`, `key`, `record` (the JSON that lay beside the video),
`start` (its first frame in the stored clip), and where the data have them `actions` and `commands` [T-1, A], `states`
[T, S], `object_positions` [T, N, 3], `car_states` [T, N, 3], `camera` {"intrinsics" [3, 3] or [T, 3, 3] in pixels,
"extrinsics" [T, 4, 4] world to camera}, `masks` uint8 [T, H, W] and `depth` [T, H, W]. All of them follow the window, the size
and the crop.

A clip of several cameras has a video for each, `<view>.mp4`. Read with `views=("front", "left")` its sample has `views` and an
axis V of them before all others in `video`, `camera`, `masks` and `depth`, and `view_captions`, one text for each; read with
`views="front"` it is a sample of one camera like any other; a clip that has one alone is read as it is then.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..conditioning.camera import check_extrinsics, check_intrinsics, crop_intrinsics, fit_intrinsics
from .video import Clip, count_frames, read_video, source_size, stream_video

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
PER_FRAME = ("states", "object_positions", "car_states", "extrinsics", "masks", "depth")
PER_VIEW = ("intrinsics", "extrinsics", "masks", "depth")  # with a leading axis where the clip has several cameras
PICTURES = ("masks", "depth")
PER_STEP = ("actions", "commands")  # one shorter than the frames: entry t leads from frame t to t + 1


@dataclass(frozen=True)
class VideoSegment:
    """Some frames of a longer video file, as a sample's video: `num_frames` at `fps` from the time `start` (seconds) on."""

    path: Path
    start: float
    num_frames: int
    fps: float

    def count(self, fps: float | None) -> tuple[int, float]:
        """As `video.count_frames`."""
        rate = fps or self.fps
        return int((self.num_frames - 1) / self.fps * rate + 1e-6) + 1, rate

    def read(self, num_frames: int | None, fps: float | None, height, width, start: float) -> Clip:
        """As `video.read_video`; the first frame is the one nearest to `start`, which data sets give rounded."""
        num_frames = num_frames or self.count(fps)[0]
        return read_video(self.path, num_frames, fps, height, width, self.start + start, nearest=True)

    def stream(self) -> Iterator[tuple[float, Image.Image]]:
        """As `video.stream_video`."""
        count = 0
        for frame in islice(stream_video(self.path, start=self.start, nearest=True), self.num_frames):
            yield frame
            count += 1
        if count < self.num_frames:
            raise ValueError(f"{self.path} has {count} frames after {self.start:g} s, {self.num_frames} are needed")


@dataclass
class SampleReader:
    """Reads samples.

    num_frames: window to cut; None keeps whole clips. Only the window is decoded. A random one if `random`, else the first.
    crop: (height, width) to cut, at a random place if `random`, else in the centre; None keeps the frame.
    size: (height, width) to resize to (covering, centre) before any crop; None keeps the stored size.
    fps: rate to resample to; None keeps the stored one. Not for samples with per-frame arrays, which it would tear off.
    random: draw windows and crops (training) or not (evaluation).
    need_caption: a missing caption is an error.
    views: for clips of several cameras, the name of one or the names of those to read together.
    """

    num_frames: int | None = None
    crop: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    fps: float | None = None
    random: bool = True
    need_caption: bool = False
    views: str | tuple[str, ...] | None = None

    def read(self, files: dict[str, bytes | Path], key: str, rng: np.random.Generator) -> dict:
        """Files by extension (without the dot) -> the window and crop that `rng` draws. ValueError says what is wrong."""
        if self.num_frames is None:
            return self.crop_sample(self.read_whole(files, key), rng)
        length, rate = self.length(files)
        start = self.draw_start(length, rng)
        return self.crop_sample(self._assemble(files, key, length, start, rate), rng)

    def read_whole(self, files: dict[str, bytes | Path], key: str) -> dict:
        """The whole clip, resized but not cut."""
        return self._assemble(files, key, None, 0, None)

    def read_arrays(self, files: dict[str, bytes | Path], key: str, names: tuple[str, ...]) -> dict:
        """These arrays of a whole clip, as in a sample (`window_arrays` cuts them), without decoding its video; also the record's
        `alternatives`, texts that would have told something else of the same scene.

        Raises ValueError for one that the clip lacks, and for a camera that is none.
        """
        video = self.video(files)
        record = self.text(files, key)[1]
        sample = self._arrays(files, record, self.length(files)[0], _count(video, None)[1])
        if "alternatives" in names and "alternatives" in record:
            sample["alternatives"] = _checked_texts(record["alternatives"], key)
        if missing := [name for name in names if name not in sample]:
            there = ", ".join(sorted(sample)) or "none"
            where = "; alternatives are a list of texts in its json" if "alternatives" in missing else ""
            raise ValueError(
                f"the clip has no {', '.join(missing)}; its arrays (npz, csv, json or data set): {there}{where}"
            )
        sample = {name: sample[name] for name in names}
        if "camera" in sample:
            check_intrinsics(sample["camera"]["intrinsics"])
            check_extrinsics(sample["camera"]["extrinsics"])
        if self.size is not None and "camera" in sample:
            self._resize_geometry(sample, *source_size(video.path if isinstance(video, VideoSegment) else video))
        return sample

    def length(self, files: dict[str, bytes | Path]) -> tuple[int, float]:
        """(frames of the clip at the wanted rate, that rate), without decoding. Views must agree."""
        found = {view: _count(file, self.fps) for view, file in self.videos(files).items()}
        if len({length for length, _ in found.values()}) > 1:
            raise ValueError(f"views differ in length: { {view: length for view, (length, _) in found.items()} }")
        return next(iter(found.values()))

    def cut(self, sample: dict, rng: np.random.Generator) -> dict:
        """What `read` gives with the same `rng`, from what `read_whole` gave. Leaves `sample` as it is."""
        sample = dict(sample)
        if self.num_frames is not None:
            sample["start"] = self.draw_start(sample["video"].shape[-3], rng)
            window = slice(sample["start"], sample["start"] + self.num_frames)
            sample["video"] = sample["video"][..., window, :, :]
            window_arrays(sample, window)
        return self.crop_sample(sample, rng)

    def draw_start(self, length: int, rng: np.random.Generator) -> int:
        if length < self.num_frames:
            raise ValueError(f"the clip has {length} frames, {self.num_frames} are needed")
        return int(rng.integers(length - self.num_frames + 1)) if self.random else 0

    def crop_sample(self, sample: dict, rng: np.random.Generator) -> dict:
        if self.crop is None:
            return sample
        height, width = sample["video"].shape[-2:]
        free = height - self.crop[0], width - self.crop[1]
        if min(free) < 0:
            raise ValueError(f"frames of {height}x{width} are smaller than the crop {self.crop[0]}x{self.crop[1]}")
        top, left = (int(rng.integers(f + 1)) if self.random else f // 2 for f in free)
        rows, columns = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
        for name in ("video", *PICTURES):
            if name in sample:
                sample[name] = sample[name][..., rows, columns]
        if "camera" in sample:
            camera = sample["camera"]
            sample["camera"] = camera | {"intrinsics": crop_intrinsics(camera["intrinsics"], top, left)}
        return sample

    def text(self, files: dict[str, bytes | Path], key: str) -> tuple[str, dict]:
        """(caption, record): the caption from `.txt`, else from the record's "caption"."""
        try:
            record = json.loads(_bytes(files["json"])) if "json" in files else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{key}.json is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{key}.json must hold an object, got {type(record).__name__}")
        caption = _bytes(files["txt"]).decode("utf-8-sig").strip() if "txt" in files else record.get("caption") or ""
        if not isinstance(caption, str):
            raise ValueError(f"'caption' in {key}.json must be a string, got {type(caption).__name__}")
        if self.need_caption and not caption:
            raise ValueError(f"no caption: {key}.txt, or 'caption' in {key}.json, is missing or empty")
        return caption, record

    def view_captions(self, caption: str, record: dict) -> list[str]:
        """Of the views that are read together, from what `text` gave; the clip's caption for those without their own."""
        texts = record.get("view_captions") or {}
        return [texts.get(view, caption) for view in self.views]

    def video(self, files: dict[str, bytes | Path]) -> bytes | Path:
        """The one among a sample's files that is its video, or the first of several views."""
        return next(iter(self.videos(files).values()))

    def videos(self, files: dict[str, bytes | Path]) -> dict[str, bytes | Path]:
        """The wanted videos among a sample's files by view; the only one of a clip of one camera is ""."""
        found = {}
        for name, file in files.items():
            view, dot, suffix = f".{name}".rpartition(".")
            if dot + suffix.lower() in VIDEO_SUFFIXES:
                found[view.lstrip(".")] = file
        if not found:
            raise ValueError(f"no video ({', '.join(VIDEO_SUFFIXES)}) among its files {sorted(files)}")
        if self.views is None:
            if "" not in found:
                raise ValueError(
                    f"the clip has the views {', '.join(sorted(found))}: name one as `camera` (a setting of training runs, "
                    "--camera of evaluations), or one or several as `views` of a ClipDataset"
                )
            return {"": found[""]}
        if isinstance(self.views, str) and found.keys() == {""}:
            return found
        wanted = (self.views,) if isinstance(self.views, str) else tuple(self.views)
        missing = [view for view in wanted if view not in found]
        if missing or not wanted:
            there = ", ".join(sorted(found)) if "" not in found else "a single one without a name"
            raise ValueError(f"no view {', '.join(missing) or '(none asked for)'}: the clip has {there}")
        return {view: found[view] for view in wanted}

    def _assemble(self, files, key: str, length: int | None, start: int, rate: float | None) -> dict:
        """The sample of frames `start`, ... (all of them for `length` None) of a clip of `length` frames at `rate`."""
        wanted = self.num_frames if length is not None else None
        begin = start / rate if length is not None else 0.0
        clips = {view: _read(file, wanted, self.fps, self.size, begin) for view, file in self.videos(files).items()}
        clip = _agreeing(clips)
        length = length or clip.frames.shape[1]
        stored = tuple(clip.source["source_size"])
        caption, record, arrays = self.beside(files, key, length, clip.source.get("source_fps"), stored)
        several = self.views is not None and not isinstance(self.views, str)
        video = torch.stack([c.frames for c in clips.values()]) if several else clip.frames
        sample = {"video": video, "fps": float(clip.fps), "caption": caption, "key": key, "record": record}
        sample["start"] = start
        if several:
            sample |= {"views": list(clips), "view_captions": self.view_captions(caption, record)}
        sample |= arrays
        window_arrays(sample, slice(start, start + clip.frames.shape[1]))
        if self.size is not None:
            self._resize_geometry(sample, *stored)
        return sample

    def beside(
        self, files: dict[str, bytes | Path], key: str, length: int, own: float, stored: tuple[int, int]
    ) -> tuple[str, dict, dict]:
        """(caption, record, arrays) of a whole clip, without decoding its video.

        Raises ValueError for what contradicts its `length` in frames, `own` frames per second and `stored` (height, width).
        """
        caption, record = self.text(files, key)
        told = record.get("fps")
        if told is not None and abs(own - told) > 0.01 * own:
            raise ValueError(f"the video runs at {own:g} fps, its record says {told}")
        arrays = self._arrays(files, record, length, own)
        for name in PICTURES:
            if name in arrays and arrays[name].shape[-2:] != stored:
                raise ValueError(f"{name} of {tuple(arrays[name].shape[-2:])} for frames of {stored}")
        return caption, record, arrays

    def _arrays(self, files, record: dict, length: int, own: float) -> dict:
        """The arrays of a whole clip of `length` frames, stored at `own` frames per second."""
        if "npz" in files and self.fps is not None and abs(self.fps - own) > 0.01 * own:
            raise ValueError(f"its arrays are given at {own:g} fps: fps={self.fps} would tear them from the frames")
        arrays = _read_arrays(files["npz"], length, self._view_index(record)) if "npz" in files else {}
        if ("intrinsics" in arrays) != ("extrinsics" in arrays):
            raise ValueError("intrinsics and extrinsics of a camera go together, one is missing")
        if "intrinsics" in arrays:
            arrays["camera"] = {"intrinsics": arrays.pop("intrinsics"), "extrinsics": arrays.pop("extrinsics")}
        return arrays

    def _view_index(self, record: dict) -> int | list[int] | None:
        """Where the wanted views stand in arrays that have an axis of views; None where there is none."""
        names = record.get("views")
        if self.views is None or not names:
            return None
        wanted = (self.views,) if isinstance(self.views, str) else self.views
        if missing := [view for view in wanted if view not in names]:
            raise ValueError(
                f"its record says that the arrays are of the views {', '.join(names)}: no {', '.join(missing)}"
            )
        return names.index(self.views) if isinstance(self.views, str) else [names.index(view) for view in wanted]

    def _resize_geometry(self, sample: dict, height: int, width: int):
        """Camera, masks and depth follow what `fit_image` did to frames of height x width."""
        if "camera" in sample:
            camera = sample["camera"]
            intrinsics = fit_intrinsics(camera["intrinsics"], (height, width), self.size)
            sample["camera"] = camera | {"intrinsics": intrinsics}
        for name in PICTURES:
            if name in sample:
                target, shape = (self.size[1], self.size[0]), sample[name].shape
                pictures = [Image.fromarray(picture) for picture in sample[name].flatten(0, -3).numpy()]
                fitted = [np.asarray(ImageOps.fit(p, target, Image.Resampling.NEAREST)) for p in pictures]
                sample[name] = torch.from_numpy(np.stack(fitted)).view(*shape[:-2], *self.size)


def _checked_texts(texts, key: str) -> list[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"'alternatives' in {key}.json must be a list of texts, got {texts!r}")
    return texts


def _agreeing(clips: dict[str, Clip]) -> Clip:
    """The first of several views, after a check that all have one length, size and rate."""
    first = next(iter(clips.values()))
    for view, clip in clips.items():
        if clip.frames.shape != first.frames.shape or abs(clip.fps - first.fps) > 1e-6:
            raise ValueError(
                f"the view {view!r} has frames {tuple(clip.frames.shape[1:])} at {clip.fps:g} fps, "
                f"{next(iter(clips))!r} {tuple(first.frames.shape[1:])} at {first.fps:g}; a size (height, width) makes views of "
                "different sizes alike"
            )
    return first


def content_hash(file: bytes | Path | VideoSegment) -> "hashlib._Hash":
    """A SHA-256 of a video's bytes, open for more; a segment's file is read once for all its segments."""
    if isinstance(file, VideoSegment):
        status = file.path.stat()
        whole = _file_digest(file.path, status.st_mtime_ns, status.st_size)
        return hashlib.sha256(whole + repr((file.start, file.num_frames)).encode())
    return hashlib.sha256(_bytes(file))


@lru_cache(maxsize=1024)
def _file_digest(path: Path, changed: int, size: int) -> bytes:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**24):
            digest.update(part)
    return digest.digest()


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as the bytes of an npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _count(file: bytes | Path | VideoSegment, fps: float | None) -> tuple[int, float]:
    return file.count(fps) if isinstance(file, VideoSegment) else count_frames(file, fps)


def _read(file: bytes | Path | VideoSegment, num_frames, fps, size, start: float) -> Clip:
    height, width = size or (None, None)
    read = file.read if isinstance(file, VideoSegment) else partial(read_video, file)
    return read(num_frames, fps, height, width, start)


def stream_frames(file: bytes | Path | VideoSegment) -> Iterator[tuple[float, Image.Image]]:
    """The frames of a sample's video one by one, as (fps, picture)."""
    return file.stream() if isinstance(file, VideoSegment) else stream_video(file)


def _bytes(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _read_arrays(file: bytes | Path, length: int, views: int | list[int] | None) -> dict[str, torch.Tensor]:
    """The arrays of a clip of `length` frames, numbers as float32, of the chosen `views` where there are several."""
    arrays = {}
    with np.load(io.BytesIO(_bytes(file))) as archive:
        for name in archive.files:
            array = archive[name]
            if views is not None and name in PER_VIEW:
                array = array[views]
            axis = int(isinstance(views, list) and name in PER_VIEW)
            per_frame = name in PER_FRAME
            if name == "intrinsics" and array.ndim == axis + 3:  # of a lens that zooms; or one for all frames
                per_frame, array = array.shape[axis] != 1, array.squeeze(axis) if array.shape[axis] == 1 else array
            expected = length if per_frame else length - 1 if name in PER_STEP else None
            if expected is not None and (array.ndim <= axis or array.shape[axis] != expected):
                entries = array.shape[axis] if array.ndim > axis else "no"
                raise ValueError(f"{name} has {entries} entries for {length} frames, {expected} are needed")
            if np.issubdtype(array.dtype, np.floating):
                if not np.isfinite(array).all():
                    raise ValueError(f"{name} holds NaN or infinity")
                array = array.astype(np.float32)
            arrays[name] = torch.from_numpy(array)
    return arrays


def window_arrays(sample: dict, window: slice):
    """Cut every per-frame array to the frames of `window`."""
    lead = (slice(None),) if "views" in sample else ()
    for name in PER_FRAME:
        if name in sample:
            sample[name] = sample[name][(*lead, window) if name in PER_VIEW else window]
    for name in PER_STEP:
        if name in sample:
            sample[name] = sample[name][window.start : window.stop - 1]
    if "camera" in sample:
        camera = sample["camera"]
        per_frame = [name for name, array in camera.items() if array.ndim == camera["extrinsics"].ndim]
        sample["camera"] = camera | {name: camera[name][(*lead, window)] for name in per_frame}
