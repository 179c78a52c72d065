"""Reading and writing videos with PyAV, and contact sheets.

Frames are uint8 tensors [3, T, H, W]. Reading does, in this order: for every wanted time take the frame shown then (so a
variable frame rate is followed by its time stamps), undo the rotation that a phone stores beside the picture, make
pixels that are not square square, resize with antialiasing (Lanczos) until the wanted size is covered, crop the centre.
"""

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
MAX_DENOMINATOR = 1001  # of a frame rate: 30000/1001 is one
SEEK_FROM = 5  # seconds: below, decoding from the beginning is cheap and exact in every container


FILE_TYPES = (str, Path, bytes)
FITS = ("crop", "pad")


@dataclass
class Clip:
    """`frames` uint8 [3, T, H, W], `fps` of these frames (None for an image), `source`: what was read.

    `source` has "kind", "height" and "width"; for a file also "path" and "source_size" [height, width] (upright, with square
    pixels), for a video file "source_fps" and "start" in seconds.
    """

    frames: torch.Tensor
    fps: float | None
    source: dict


def read_video(
    video,
    num_frames: int | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    start: float = 0.0,
    from_end: bool = False,
    fit: str = "crop",
    nearest: bool = False,
) -> Clip:
    """Any video or image -> `Clip`.

    Args:
        video: path of a file that PyAV or Pillow reads, its bytes, a PIL image, a list of PIL images, or an array or tensor:
            uint8 [T, H, W, 3] (numpy), uint8 or float in [-1, 1] [3, T, H, W] (torch).
        num_frames: how many frames; None takes all, and then the whole clip lies in memory. Otherwise no more than these
            frames do, however long the file.
        fps: rate to resample a file to by time stamp; None keeps its own. Lists and arrays are taken to have this rate.
        height, width: size to resize and crop to; None keeps the size.
        fit: "crop" covers that size and cuts what is over; "pad" keeps the whole picture and mirrors its edges into the
            rest (`letterbox` says where it lies).
        start: seconds into a file to begin at.
        from_end: the last `num_frames` frames, the last of which is the file's last.
        nearest: take of a file the frames nearest to the wanted times instead of those on show then, for times that are rounded.

    Raises FileNotFoundError for a missing file, ValueError for one that is no video or image, for a list or array of
    another layout, and where fewer than `num_frames` frames are to be had; the message names the file and the numbers.
    """
    _check_request(video, num_frames, fps, height, width, start, from_end)
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    if isinstance(video, FILE_TYPES):
        pictures, rate, source = _from_file(video, num_frames, fps, height, width, start, from_end, fit, nearest)
    else:
        pictures, rate, source = _from_memory(video), fps, {"kind": type(video).__name__}
        if pictures:
            source["source_size"] = [pictures[0].height, pictures[0].width]
        if num_frames is not None:
            pictures = pictures[-num_frames:] if from_end else pictures[:num_frames]
        pictures = [fit_image(picture, height, width, fit) for picture in pictures]
    if num_frames is not None and len(pictures) < num_frames:
        raise _too_short(source.get("path", "the video"), len(pictures), rate, start, num_frames)
    if not pictures:
        raise ValueError(f"{source.get('path', 'the video')} holds no frame")
    frames = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(3, 0, 1, 2).contiguous()
    return Clip(frames, rate, source | {"height": frames.shape[2], "width": frames.shape[3]})


def source_size(video) -> tuple[int, int]:
    """(height, width) of anything that `read_video` takes, upright and with square pixels; of a file, one frame is decoded."""
    return tuple(read_video(video, num_frames=1).source["source_size"])


def count_frames(file, fps: float | None = None) -> tuple[int, float]:
    """(how many frames `read_video(file, fps=fps)` gives, their rate), from the time stamps alone: nothing is decoded."""
    with _open(file) as container:
        rate = fps or _own_rate(container)
        step = 1 / _fraction(rate)
        first, last = _span(container)
        return int((last - first + _slack(container, step)) / step) + 1, rate


def to_float(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Float [-1, 1] (clamped) -> uint8 [0, 255]; `to_uint8(to_float(x))` is x."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fit_image(picture: Image.Image, height: int | None, width: int | None, fit: str = "crop") -> Image.Image:
    """Resize (antialiased) until height x width is covered and crop the centre; None leaves the picture as it is.

    With fit="pad", resize until it fits within and mirror the picture's edges into the rest, as the published models' training
    data were padded.
    """
    if height is None or picture.size == (width, height):
        return picture
    if fit == "pad":
        box = letterbox(picture.height, picture.width, height, width)
        small = np.asarray(picture.resize((box.width, box.height), Image.Resampling.LANCZOS))
        below, right = height - box.top - box.height, width - box.left - box.width
        return Image.fromarray(np.pad(small, ((box.top, below), (box.left, right), (0, 0)), mode="symmetric"))
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Box:
    """Where a padded picture lies within its frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def padding_mask(self, height: int, width: int, device=None) -> torch.Tensor:
        """[1, 1, height, width], 1 on the padding around the picture, as the networks take it."""
        mask = torch.ones(1, 1, height, width, device=device)
        self.cut(mask).zero_()
        return mask

    def cut(self, frames: torch.Tensor) -> torch.Tensor:
        """The picture alone: [..., height, width] -> a view of it."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width]


def letterbox(source_height: int, source_width: int, height: int, width: int) -> Box:
    """The largest box of the source's shape in the middle of a frame of height x width."""
    scale = min(height / source_height, width / source_width)
    inner = max(1, min(height, round(source_height * scale))), max(1, min(width, round(source_width * scale)))
    return Box((height - inner[0]) // 2, (width - inner[1]) // 2, *inner)


# ---- reading -----------------------------------------------------------------------------------------------------


def _from_memory(video) -> list[Image.Image]:
    if isinstance(video, Image.Image):
        return [video.convert("RGB")]
    if isinstance(video, torch.Tensor):
        if video.ndim != 4 or video.shape[0] != 3:
            raise ValueError(f"a tensor must be [3, T, H, W], got {tuple(video.shape)}")
        if video.is_floating_point():
            if not torch.isfinite(video).all() or video.abs().max() > 1.001:
                raise ValueError("a floating-point video must lie in [-1, 1]")
            video = to_uint8(video)
        video = video.permute(1, 2, 3, 0).cpu().numpy()
    if isinstance(video, np.ndarray):
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
            raise ValueError(f"an array must be uint8 [T, H, W, 3], got {video.dtype} {video.shape}")
        return [Image.fromarray(frame) for frame in video]
    if isinstance(video, (list, tuple)) and video and all(isinstance(item, Image.Image) for item in video):
        if len({item.size for item in video}) > 1:
            raise ValueError(f"the images of a video differ in size: {sorted({item.size for item in video})}")
        return [item.convert("RGB") for item in video]
    raise ValueError(f"a video is a path, bytes, PIL images, a numpy array or a tensor, got {type(video).__name__}")


def _from_file(file, num_frames, fps, height, width, start, from_end, fit, nearest):
    """Frames by time stamp. Pictures are resized as they come, so a long or large file never lies in memory whole."""
    name = _name(file)
    if not isinstance(file, bytes) and Path(file).suffix.lower() in IMAGE_SUFFIXES:
        picture = read_image(file)
        source = {"path": name, "kind": "image", "source_size": [picture.height, picture.width]}
        return [fit_image(picture, height, width, fit)], None, source
    if from_end:
        start = _start_of_last(file, num_frames, fps)
    with _open(file) as container:
        own = _own_rate(container)
        rate = fps or own
        source = {"path": name, "kind": "video", "source_fps": own, "start": float(start)}
        pictures = []
        for picture in _resampled(container, name, start, rate, nearest):
            source["source_size"] = [picture.height, picture.width]
            pictures.append(fit_image(picture, height, width, fit))
            if len(pictures) == num_frames:
                break
    return pictures, rate, source


def _start_of_last(file, num_frames: int, fps: float | None) -> Fraction:
    """The time at which to begin so that the last of `num_frames` is the file's last frame."""
    available, rate = count_frames(file, fps)
    if available < num_frames:
        raise _too_short(_name(file), available, rate, 0, num_frames)
    with _open(file) as container:
        first, last = _span(container)
    return max(last - first - (num_frames - 1) / _fraction(rate), Fraction(0))


def stream_video(
    file, fps: float | None = None, height=None, width=None, start: float = 0.0, nearest: bool = False
) -> Iterator[tuple[float, Image.Image]]:
    """Frames of a video file of any length, one by one, as (fps, picture); same treatment and errors as `read_video`."""
    _check_request(file, None, fps, height, width, start, False)
    with _open(file) as container:
        rate = fps or _own_rate(container)
        for picture in _resampled(container, _name(file), start, rate, nearest):
            yield rate, fit_image(picture, height, width)


def _check_request(video, num_frames, fps, height, width, start, from_end):
    if (height is None) != (width is None):
        raise ValueError("give height and width together")
    for name, value in (("num_frames", num_frames), ("fps", fps), ("height", height), ("width", width)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if start < 0 or (start and not isinstance(video, FILE_TYPES)):
        raise ValueError(
            f"start is a time >= 0 into a file, got {start}" + ("" if start < 0 else "; cut the list instead")
        )
    if from_end and (num_frames is None or start):
        raise ValueError("from_end needs num_frames, and goes without start")


def _too_short(name: str, available: int, rate: float | None, start: float, needed: int) -> ValueError:
    return ValueError(
        f"{name} has {available} frame{'s' * (available != 1)}{f' at {rate:g} fps' if rate else ''}"
        f"{f' after {float(start):g} s' if start else ''}, {needed} are needed: "
        "give a longer video, a higher rate or fewer frames"
    )


def read_image(file) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file} is not an image that Pillow reads: {error}") from error


def _open(file):
    name = _name(file)
    if not isinstance(file, bytes) and not Path(file).exists():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        container = av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{name} is not a video that PyAV reads: {error}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{name} has no video stream")
    stream = container.streams.video[0]
    if stream.width * stream.height > 2**18:
        stream.thread_type = "AUTO"
    else:
        stream.codec_context.thread_count = 1  # on small frames, threads cost more than they bring
    return container


def _name(file) -> str:
    return "the data" if isinstance(file, bytes) else str(file)


def _own_rate(container) -> float:
    stream = container.streams.video[0]
    return float(stream.average_rate or stream.guessed_rate or 25)


def _fraction(rate: float) -> Fraction:
    return Fraction(rate).limit_denominator(MAX_DENOMINATOR)


def _slack(container, step: Fraction) -> Fraction:
    """Time stamps are rounded to the container's clock: a frame may come half a tick late and still be on time."""
    return max(step / 1000, container.streams.video[0].time_base / 2)


def _span(container) -> tuple[Fraction, Fraction]:
    """Times of the first and the last frame, from the packets."""
    stream = container.streams.video[0]
    stamps = [
        packet.dts if packet.pts is None else packet.pts for packet in container.demux(stream) if not packet.is_discard
    ]
    stamps = [stamp for stamp in stamps if stamp is not None]
    if not stamps:
        raise ValueError(f"{container.name or 'the data'} holds no frame")
    return min(stamps) * stream.time_base, max(stamps) * stream.time_base


def _resampled(
    container, name: str, start: float | Fraction, rate: float, nearest: bool = False
) -> Iterator[Image.Image]:
    """At times start + k / rate, the frame on show then or the nearest one, until the last frame's time is passed."""
    stream, step = container.streams.video[0], 1 / _fraction(rate)
    wanted, slack = Fraction(start).limit_denominator(10**6), _slack(container, step)
    if nearest:
        slack = max(slack, Fraction(49, 100) / _fraction(_own_rate(container)))  # of two as near, the one on show
    first = None
    if wanted > SEEK_FROM:
        # The stream's own start time is not always the first picture's (avi), so look at that.
        first = next((frame.pts * frame.time_base for frame in _decoded(container, name)), Fraction(0))
        container.seek(int((first + wanted) / stream.time_base), stream=stream)  # to the key frame before
    aspect = stream.sample_aspect_ratio or 1
    shown = time = None
    for frame in _decoded(container, name):
        first = frame.pts * frame.time_base if first is None else first
        time = frame.pts * frame.time_base - first
        if shown is None and wanted > SEEK_FROM and time > wanted + slack:
            raise ValueError(f"{name} cannot be searched: asked for {float(wanted):g} s it gives {float(time):g} s")
        while shown is not None and time > wanted + slack:
            yield _picture(shown, aspect)
            wanted += step
        shown = frame
    # The last frame is shown at its own time only: how long it stays is not known in every container.
    while shown is not None and time + slack >= wanted:
        yield _picture(shown, aspect)
        wanted += step


def _decoded(container, name: str) -> Iterator[av.VideoFrame]:
    """Frames that have a time stamp; a damaged file is a ValueError that says how far it was good."""
    time = 0.0
    try:
        for frame in container.decode(video=0):
            if frame.pts is not None:
                time = frame.time
                yield frame
    except av.FFmpegError as error:
        raise ValueError(f"{name} is damaged after {time:.2f} s: {error}") from error


def _picture(frame: av.VideoFrame, aspect: Fraction) -> Image.Image:
    picture = frame.to_image(threads=1)  # starting threads takes 100 times longer than converting a small frame
    if aspect != 1:
        picture = picture.resize((max(1, round(picture.width * aspect)), picture.height), Image.Resampling.LANCZOS)
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


# ---- writing -----------------------------------------------------------------------------------------------------


class VideoWriter:
    """Writes an h264 mp4 frame by frame; `metadata` goes into its comment, where `read_metadata` finds it.

    h264 in 4:2:0 has even sizes: an odd one gets its last row or column twice. `crf` 0 (lossless) to 51; 18 is hardly
    distinguishable by eye.
    """

    def __init__(self, path: str | Path, fps: float, metadata: dict | None = None, crf: int = 18):
        if fps <= 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self.path), "w", format="mp4", options={"movflags": "use_metadata_tags"})
        self._container.metadata["comment"] = json.dumps(metadata or {})
        self._stream, self._fps, self._crf = None, _fraction(fps), crf

    def write(self, frames: torch.Tensor):
        """Append uint8 [3, T, H, W]."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[0] != 3 or not frames.numel():
            raise ValueError(f"frames must be uint8 [3, T, H, W], not empty, got {frames.dtype} {tuple(frames.shape)}")
        pad_h, pad_w = frames.shape[2] % 2, frames.shape[3] % 2
        array = np.pad(frames.permute(1, 2, 3, 0).cpu().numpy(), ((0, 0), (0, pad_h), (0, pad_w), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": str(self._crf)})
            self._stream.height, self._stream.width, self._stream.pix_fmt = array.shape[1], array.shape[2], "yuv420p"
        for frame in array:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(frame))

    def close(self):
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def write_video(path, frames: torch.Tensor, fps: float, metadata: dict | None = None, crf: int = 18) -> Path:
    """Write uint8 [3, T, H, W] as an h264 mp4 with `metadata` (JSON-able) inside."""
    with VideoWriter(path, fps, metadata, crf) as writer:
        writer.write(frames)
    return Path(path)


def read_metadata(path) -> dict:
    """What `write_video` stored beside the frames; empty for a file of another origin."""
    with _open(path) as container:
        try:
            metadata = json.loads(container.metadata.get("comment", "{}"))
        except json.JSONDecodeError:
            return {}
    return metadata if isinstance(metadata, dict) else {}


def contact_sheet(rows: dict[str, torch.Tensor], columns: list[str] | None = None, scale: int = 1) -> Image.Image:
    """Rows of frames, label -> uint8 [3, T, H, W] of one size, as one picture; `columns` are written above."""
    if len({frames.shape[2:] for frames in rows.values()}) != 1:
        raise ValueError(f"rows must have one frame size, got { {k: tuple(v.shape) for k, v in rows.items()} }")
    margin, label = 4, 22
    height, width = next(iter(rows.values())).shape[2:]
    cell_h, cell_w = height * scale + margin, width * scale + margin
    count = max(frames.shape[1] for frames in rows.values())
    sheet = Image.new("RGB", (count * cell_w + margin, len(rows) * (cell_h + label) + label), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(columns or []):
        draw.text((margin + i * cell_w, 4), text, fill="black", font_size=13)
    for r, (name, frames) in enumerate(rows.items()):
        top = label + r * (cell_h + label)
        draw.text((margin, top + 2), name, fill="black", font_size=13)
        for i, frame in enumerate(frames.permute(1, 2, 3, 0).cpu().numpy()):
            picture = Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + i * cell_w, top + label - 2))
    return sheet
