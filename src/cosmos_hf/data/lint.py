"""What is wrong with a data set, said before anyone trains on it: `python -m cosmos_hf lint <data set>`.

Checks, over all clips or an even choice of them: clips that cannot be read, frame counts and rates that contradict the
numbers beside them, frame counts that no training window or tokenizer fits; captions that are missing; actions and states of
changing width, out of scale, dead, not finite or of another meaning; cameras that are missing, dead, frozen, doubled or swapped;
poses that are none.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..conditioning.action import ActionSpec
from ..conditioning.camera import check_extrinsics, check_intrinsics
from .clips import BROKEN, open_clips
from .samples import VIDEO_SUFFIXES, SampleReader, VideoSegment, stream_frames

DARK = 3.0  # levels: frames with less contrast show nothing
STILL = 0.25  # levels: mean change between frames below which a picture stands still
FAR_OUT = 8.0  # times how far most clips go from the median: a clip that goes further is of another scale
SWAPPED = 0.6  # two cameras are swapped where changing them back leaves less than this share of the difference
_THUMB = 12  # pixels along each side of the picture that a camera is recognised by


@dataclass(frozen=True)
class Finding:
    """One thing that was found. `level` is "error" (training would fail or learn what is wrong) or "warning"."""

    level: str
    what: str
    clips: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = ""
        if self.clips:
            more = f" and {len(self.clips) - 3} more" if len(self.clips) > 3 else ""
            where = f" [{', '.join(self.clips[:3])}{more}]"
        return f"{self.level}: {self.what}{where}"


@dataclass
class _Clip:
    """What is remembered of a clip that could be read."""

    key: str
    num_frames: int
    fps: float
    sizes: dict[str, tuple[int, int]]  # view -> height, width
    caption: str
    actions: np.ndarray | None
    states: np.ndarray | None
    thumbs: dict[str, np.ndarray] = field(default_factory=dict)  # view -> mean picture
    contrast: dict[str, float] = field(default_factory=dict)
    motion: dict[str, float] = field(default_factory=dict)


def lint(
    path: str | Path,
    num_frames: int | None = None,
    temporal_compression: int | None = None,
    spec: ActionSpec | None = None,
    need_captions: bool = True,
    max_clips: int = 200,
) -> list[Finding]:
    """The findings of a data set, the worst first; an empty list is a clean one.

    Args:
        path: what `open_clips` takes.
        num_frames: the training window; shorter clips are found.
        temporal_compression: the tokenizer's; clips of other lengths than 1 + k times that are found.
        spec: what actions are to mean: width, rate, range and gripper are checked against it, and what the data set itself states
            (`meta/action_spec.json` of a LeRobot data set). None checks the actions against that.
        need_captions: whether a clip without a caption is an error.
        max_clips: clips to decode, evenly chosen; the choice is told where it is not all of them.

    Raises ValueError for a `num_frames` that the tokenizer cannot code.
    """
    if num_frames and temporal_compression and (over := (num_frames - 1) % temporal_compression):
        raise ValueError(
            f"num_frames {num_frames} is no window of a tokenizer with temporal_compression {temporal_compression}, which takes "
            f"1 + k * {temporal_compression}: {num_frames - over} or {num_frames - over + temporal_compression}"
        )
    source = open_clips(path)
    keys = source.keys
    if len(keys) > max_clips:
        keys = [keys[i] for i in np.linspace(0, len(keys) - 1, max_clips).round().astype(int)]
    clips, findings, broken = [], [], defaultdict(list)
    for key in keys:
        try:
            clips.append(_read(source.read(key), key))
        except BROKEN as error:
            broken[f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)].append(key)
    for reason, where in broken.items():
        findings.append(Finding("error", f"cannot be read: {reason}", tuple(where)))
    if clips:
        findings += _check_frames(clips, num_frames, temporal_compression)
        findings += _check_captions(clips, need_captions)
        findings += [*_check_numbers(clips, "actions"), *_check_numbers(clips, "states")]
        findings += _check_spec(clips, spec, getattr(source, "stated_spec", None))
        findings += _check_cameras(clips)
    if len(keys) < len(source.keys):
        findings.append(Finding("warning", f"only {len(keys)} of {len(source.keys)} clips were looked at (max_clips)"))
    return sorted(findings, key=lambda finding: finding.level)


def _read(files: dict, key: str) -> _Clip:
    """Read a clip with all its views, whatever they are, one after the other and frame by frame: an episode may be long."""
    views = [name.rpartition(".")[0] for name in files if f".{name.rpartition('.')[2].lower()}" in VIDEO_SUFFIXES]
    several = tuple(view for view in views if view)
    reader = SampleReader(random=False, views=several or None)
    seen = {view: _look(file) for view, file in reader.videos(files).items()}
    if len({(view.num_frames, round(view.fps, 3)) for view in seen.values()}) > 1:
        told = ", ".join(f"{name} has {view.num_frames} frames at {view.fps:g} fps" for name, view in seen.items())
        raise ValueError(f"views differ: {told}")
    first = next(iter(seen.values()))
    caption, _, arrays = reader.beside(files, key, first.num_frames, first.fps, first.size)
    if "camera" in arrays:
        check_intrinsics(arrays["camera"]["intrinsics"])
        check_extrinsics(arrays["camera"]["extrinsics"])
    numbers = {name: arrays[name].flatten(1).numpy() if name in arrays else None for name in ("actions", "states")}
    sizes = {name: view.size for name, view in seen.items()}
    clip = _Clip(key, first.num_frames, first.fps, sizes, caption, **numbers)
    for name, view in seen.items():
        clip.thumbs[name], clip.contrast[name], clip.motion[name] = view.thumb, view.contrast, view.motion
    return clip


@dataclass(frozen=True)
class _View:
    """What is remembered of the frames of one camera."""

    num_frames: int
    fps: float
    size: tuple[int, int]
    thumb: np.ndarray
    contrast: float
    motion: float


def _look(file: bytes | Path | VideoSegment) -> _View:
    count, total, before, contrast, motion = 0, 0, None, 0.0, 0.0
    for fps, picture in stream_frames(file):  # noqa: B007 (the last one counts)
        frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()  # [3, H, W]
        grey = frame.mean(0)
        if before is not None and before.shape != grey.shape:
            raise ValueError(f"its frames change from {tuple(before.shape)} to {tuple(grey.shape)} (height, width)")
        contrast = max(contrast, float(grey.std()))
        motion = motion if before is None else max(motion, float((grey - before).abs().mean()))
        count, total, before = count + 1, total + frame, grey
    if not count:
        raise ValueError("the video holds no frame")
    thumb = F.adaptive_avg_pool2d(total / count, _THUMB).flatten().numpy()
    return _View(count, fps, tuple(before.shape), thumb, contrast, motion)


def _check_frames(clips: list[_Clip], num_frames: int | None, temporal_compression: int | None):
    rates = sorted({round(clip.fps, 3) for clip in clips})
    if len(rates) > 1:
        yield Finding(
            "error", f"frame rates differ: {', '.join(f'{rate:g}' for rate in rates)}; resample to one (fps)"
        )
    yield from _check_sizes(clips)
    if num_frames:
        short = [clip.key for clip in clips if clip.num_frames < num_frames]
        if short:
            least = min(clip.num_frames for clip in clips)
            yield Finding("error", f"clips are shorter than {num_frames} frames, down to {least}", tuple(short))
    if temporal_compression and not num_frames:
        odd = [clip for clip in clips if (clip.num_frames - 1) % temporal_compression]
        if odd:
            lengths = ", ".join(str(n) for n in sorted({clip.num_frames for clip in odd})[:6])
            yield Finding(
                "warning",
                f"frame counts are not 1 + k * {temporal_compression} ({lengths}): choose a training window (num_frames)",
                tuple(clip.key for clip in odd),
            )


def _check_sizes(clips: list[_Clip]):
    mixed = [clip for clip in clips if len(set(clip.sizes.values())) > 1]
    if mixed:
        told = ", ".join(f"{view} {h}x{w}" for view, (h, w) in mixed[0].sizes.items())
        yield Finding(
            "warning",
            f"cameras differ in size (height x width): {told}; to read them together set height and width, to read one set camera",
            tuple(clip.key for clip in mixed) if len(mixed) < len(clips) else (),
        )
    for view in dict.fromkeys(view for clip in clips for view in clip.sizes):
        sizes = sorted({clip.sizes[view] for clip in clips if view in clip.sizes})
        if len(sizes) > 1:
            told, of = ", ".join(f"{h}x{w}" for h, w in sizes[:6]), f" of camera {view!r}" if view else ""
            yield Finding(
                "warning", f"frames{of} differ in size (height x width): {told}; set height and width, or a crop"
            )


def _check_captions(clips: list[_Clip], needed: bool):
    missing = [clip.key for clip in clips if not clip.caption]
    if missing:
        yield Finding("error" if needed else "warning", "captions are missing or empty", tuple(missing))
    elif len(clips) > 4 and len({clip.caption for clip in clips}) == 1:
        yield Finding(
            "warning", f"all clips have one caption, {clips[0].caption!r}: a model cannot learn to follow it"
        )


def _check_numbers(clips: list[_Clip], name: str):
    """Actions or states: there or not, width, scale, dead numbers."""
    have = [clip for clip in clips if getattr(clip, name) is not None]
    if not have:
        return
    lacking = [clip.key for clip in clips if getattr(clip, name) is None]
    if lacking:
        yield Finding("error", f"{name} are missing where other clips have them", tuple(lacking))
    widths = defaultdict(list)
    for clip in have:
        widths[getattr(clip, name).shape[1]].append(clip.key)
    if len(widths) > 1:
        usual = max(widths, key=lambda width: len(widths[width]))
        for width, keys in widths.items():
            if width != usual:
                yield Finding("error", f"{name} have {width} numbers, in most clips {usual}", tuple(keys))
        return
    table = np.concatenate([getattr(clip, name) for clip in have])
    middle = np.median(table, axis=0)
    reach = np.array([np.abs(getattr(clip, name) - middle).max(0) for clip in have])  # [clips, numbers]
    usual = np.quantile(reach, 0.9, axis=0, method="lower")
    for i in range(table.shape[1]):
        if np.ptp(table[:, i]) == 0:
            yield Finding("warning", f"{name}: number {i} is always {middle[i]:g}, it tells nothing")
            continue
        far = [clip.key for clip, far_out in zip(have, reach[:, i], strict=True) if far_out > FAR_OUT * usual[i] > 0]
        if far:
            yield Finding(
                "error" if name == "actions" else "warning",
                f"{name}: number {i} is out of scale, {reach[:, i].max():.3g} from its median where 9 of 10 clips stay "
                f"within {usual[i]:.3g}",
                tuple(far),
            )


def _check_spec(clips: list[_Clip], spec: ActionSpec | None, stated: ActionSpec | None):
    """Against the spec that was given, which what the data set itself states must equal, or against that."""
    if spec is not None and stated is not None:
        try:
            spec.check_same(stated)
        except ValueError as error:
            yield Finding("error", str(error))
    spec = spec or stated
    if spec is None:
        return
    refused = defaultdict(list)
    for clip in clips:
        if clip.actions is not None:
            try:
                spec.check(torch.from_numpy(clip.actions), clip.fps)
            except ValueError as error:
                refused[str(error)].append(clip.key)
    if all(clip.actions is None for clip in clips):
        yield Finding("error", "the clips have no actions, and a spec of actions was given")
    for reason, keys in refused.items():
        yield Finding("error", reason, tuple(keys))


def _check_cameras(clips: list[_Clip]):
    views = list(dict.fromkeys(view for clip in clips for view in clip.thumbs))
    for view in views:
        name = f"camera {view!r}" if view else "the camera"
        lacking = [clip.key for clip in clips if view not in clip.thumbs]
        if lacking:
            yield Finding("error", f"{name} is missing where other clips have it", tuple(lacking))
        dead = [clip.key for clip in clips if clip.contrast.get(view, 255) < DARK]
        if dead:
            yield Finding("error", f"{name} is dead: a picture of one colour", tuple(dead))
        frozen = [c.key for c in clips if c.motion.get(view, 255) < STILL and c.key not in dead and _acts(c)]
        if frozen:
            yield Finding(
                "error", f"{name} is frozen: nothing moves although actions or other views do", tuple(frozen)
            )
    yield from _check_views_against_each_other(clips, views)


def _acts(clip: _Clip) -> bool:
    """Whether something must be seen to move."""
    moves = [m for m in (clip.actions, clip.states) if m is not None and len(m) > 1 and np.ptp(m, axis=0).max() > 0]
    return clip.num_frames > 1 and (bool(moves) or max(clip.motion.values()) > 4 * STILL)


def _check_views_against_each_other(clips: list[_Clip], views: list[str]):
    """Doubled streams, and pairs of views that look like each other's usual picture."""
    whole = [clip for clip in clips if set(clip.thumbs) == set(views)]
    usual = {view: np.median([clip.thumbs[view] for clip in whole], axis=0) for view in views} if whole else {}
    for i, one in enumerate(views):
        for other in views[:i]:
            same = [
                c.key for c in whole if np.abs(c.thumbs[one] - c.thumbs[other]).max() < 1 and c.contrast[one] > DARK
            ]
            if same:
                yield Finding("error", f"cameras {other!r} and {one!r} show the same picture", tuple(same))
            swapped = []
            for clip in whole if len(whole) > 2 else []:
                a, b = clip.thumbs[one], clip.thumbs[other]
                kept = np.abs(a - usual[one]).mean() + np.abs(b - usual[other]).mean()
                changed = np.abs(a - usual[other]).mean() + np.abs(b - usual[one]).mean()
                if changed < SWAPPED * kept and clip.key not in same:
                    swapped.append(clip.key)
            if swapped:
                yield Finding("error", f"cameras {other!r} and {one!r} look swapped", tuple(swapped))
