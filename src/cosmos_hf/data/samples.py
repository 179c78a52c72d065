"""One training sample from the files that belong to it: decoding, checks, the window in time and the crop in space.

A sample is a dict: `video` uint8 [3, T, H, W], `fps`, `caption`, `key`, `record` (the JSON that lay beside the video),
`start` (its first frame in the stored clip), and where the data have them `actions` and `commands` [T-1, A], `states`
[T, S], `object_positions` [T, N, 3], `camera` {"intrinsics" [3, 3] in pixels, "extrinsics" [T, 4, 4] world to camera} and
`masks` uint8 [T, H, W]. All of them follow the window, the size and the crop.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..conditioning.camera import crop_intrinsics, fit_intrinsics
from .video import Clip, count_frames, read_video

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
PER_FRAME = ("states", "object_positions", "extrinsics", "masks")
PER_STEP = ("actions", "commands")  # one shorter than the frames: entry t leads from frame t to t + 1


@dataclass
class SampleReader:
    """Reads samples.

    num_frames: window to cut; None keeps whole clips. Only the window is decoded. A random one if `random`, else the first.
    crop: (height, width) to cut, at a random place if `random`, else in the centre; None keeps the frame.
    size: (height, width) to resize to (covering, centre) before any crop; None keeps the stored size.
    fps: rate to resample to; None keeps the stored one. Not for samples with per-frame arrays, which it would tear off.
    random: draw windows and crops (training) or not (evaluation).
    need_caption: a missing caption is an error.
    """

    num_frames: int | None = None
    crop: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    fps: float | None = None
    random: bool = True
    need_caption: bool = False

    def read(self, files: dict[str, bytes | Path], key: str, rng: np.random.Generator) -> dict:
        """Files by extension (without the dot) -> the window and crop that `rng` draws. ValueError says what is wrong."""
        video = self.video(files)
        if self.num_frames is None:
            return self.crop_sample(self.read_whole(files, key), rng)
        length, rate = count_frames(video, self.fps)
        start = self.draw_start(length, rng)
        height, width = self.size or (None, None)
        clip = read_video(video, self.num_frames, self.fps, height, width, start / rate)
        return self.crop_sample(self._assemble(files, key, clip, length, start), rng)

    def read_whole(self, files: dict[str, bytes | Path], key: str) -> dict:
        """The whole clip, resized but not cut."""
        height, width = self.size or (None, None)
        clip = read_video(self.video(files), fps=self.fps, height=height, width=width)
        return self._assemble(files, key, clip, clip.frames.shape[1], 0)

    def cut(self, sample: dict, rng: np.random.Generator) -> dict:
        """What `read` gives with the same `rng`, from what `read_whole` gave. Leaves `sample` as it is."""
        sample = dict(sample)
        if self.num_frames is not None:
            sample["start"] = self.draw_start(sample["video"].shape[1], rng)
            window = slice(sample["start"], sample["start"] + self.num_frames)
            sample["video"] = sample["video"][:, window]
            _window_arrays(sample, window)
        return self.crop_sample(sample, rng)

    def draw_start(self, length: int, rng: np.random.Generator) -> int:
        if length < self.num_frames:
            raise ValueError(f"the clip has {length} frames, {self.num_frames} are needed")
        return int(rng.integers(length - self.num_frames + 1)) if self.random else 0

    def crop_sample(self, sample: dict, rng: np.random.Generator) -> dict:
        if self.crop is None:
            return sample
        height, width = sample["video"].shape[2:]
        free = height - self.crop[0], width - self.crop[1]
        if min(free) < 0:
            raise ValueError(f"frames of {height}x{width} are smaller than the crop {self.crop[0]}x{self.crop[1]}")
        top, left = (int(rng.integers(f + 1)) if self.random else f // 2 for f in free)
        rows, columns = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
        sample["video"] = sample["video"][:, :, rows, columns]
        if "masks" in sample:
            sample["masks"] = sample["masks"][:, rows, columns]
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
        caption = _bytes(files["txt"]).decode().strip() if "txt" in files else record.get("caption") or ""
        if not isinstance(caption, str):
            raise ValueError(f"'caption' in {key}.json must be a string, got {type(caption).__name__}")
        if self.need_caption and not caption:
            raise ValueError(f"no caption: {key}.txt, or 'caption' in {key}.json, is missing or empty")
        return caption, record

    def video(self, files: dict[str, bytes | Path]) -> bytes | Path:
        """The one among a sample's files that is its video."""
        for suffix in VIDEO_SUFFIXES:
            if suffix[1:] in files:
                return files[suffix[1:]]
        raise ValueError(f"no video ({', '.join(VIDEO_SUFFIXES)}) among its files {sorted(files)}")

    def _assemble(self, files, key: str, clip: Clip, length: int, start: int) -> dict:
        """The sample around decoded frames `start`, `start` + 1, ... of a clip of `length` frames."""
        caption, record = self.text(files, key)
        told, own = record.get("fps"), clip.source.get("source_fps")
        if told is not None and abs(own - told) > 0.01 * own:
            raise ValueError(f"the video runs at {own:g} fps, its record says {told}")
        sample = {"video": clip.frames, "fps": float(clip.fps), "caption": caption, "key": key, "record": record}
        sample["start"] = start
        if "npz" in files and self.fps is not None and abs(self.fps - own) > 0.01 * own:
            raise ValueError(f"its arrays are given at {own:g} fps: fps={self.fps} would tear them from the frames")
        arrays = _read_arrays(files["npz"], length) if "npz" in files else {}
        if ("intrinsics" in arrays) != ("extrinsics" in arrays):
            raise ValueError("intrinsics and extrinsics of a camera go together, one is missing")
        sample |= arrays
        if "intrinsics" in sample:
            sample["camera"] = {"intrinsics": sample.pop("intrinsics"), "extrinsics": sample.pop("extrinsics")}
        _window_arrays(sample, slice(start, start + clip.frames.shape[1]))
        stored = tuple(clip.source["source_size"])
        if "masks" in sample and sample["masks"].shape[1:] != stored:
            raise ValueError(f"masks of {tuple(sample['masks'].shape[1:])} for frames of {stored}")
        if self.size is not None:
            self._resize_geometry(sample, *stored)
        return sample

    def _resize_geometry(self, sample: dict, height: int, width: int):
        """Camera and masks follow what `fit_image` did to frames of height x width."""
        if "camera" in sample:
            camera = sample["camera"]
            intrinsics = fit_intrinsics(camera["intrinsics"], (height, width), self.size)
            sample["camera"] = camera | {"intrinsics": intrinsics}
        if "masks" in sample:
            target = self.size[1], self.size[0]
            masks = [
                ImageOps.fit(Image.fromarray(m), target, Image.Resampling.NEAREST) for m in sample["masks"].numpy()
            ]
            sample["masks"] = torch.from_numpy(np.stack([np.asarray(mask) for mask in masks]))


def _bytes(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _read_arrays(file: bytes | Path, length: int) -> dict[str, torch.Tensor]:
    """The arrays of a clip of `length` frames, numbers as float32."""
    arrays = {}
    with np.load(io.BytesIO(_bytes(file))) as archive:
        for name in archive.files:
            array = archive[name]
            expected = length if name in PER_FRAME else length - 1 if name in PER_STEP else None
            if expected is not None and (array.ndim == 0 or len(array) != expected):
                entries = len(array) if array.ndim else "no"
                raise ValueError(f"{name} has {entries} entries for {length} frames, {expected} are needed")
            if np.issubdtype(array.dtype, np.floating):
                if not np.isfinite(array).all():
                    raise ValueError(f"{name} holds NaN or infinity")
                array = array.astype(np.float32)
            arrays[name] = torch.from_numpy(array)
    return arrays


def _window_arrays(sample: dict, window: slice):
    """Cut every per-frame array to the frames of `window`."""
    for name in PER_FRAME:
        if name in sample:
            sample[name] = sample[name][window]
    for name in PER_STEP:
        if name in sample:
            sample[name] = sample[name][window.start : window.stop - 1]
    if "camera" in sample:
        sample["camera"] = sample["camera"] | {"extrinsics": sample["camera"]["extrinsics"][window]}
