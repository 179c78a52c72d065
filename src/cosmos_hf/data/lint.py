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
from .samples import VIDEO_SUFFIXES, SampleReader

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
    size: tuple[int, int]
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
    """
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
    """Read a clip with all its views, whatever they are."""
    views = [name.rpartition(".")[0] for name in files if f".{name.rpartition('.')[2].lower()}" in VIDEO_SUFFIXES]
    several = tuple(view for view in views if view)
    sample = SampleReader(random=False, views=several or None).read_whole(files, key)
    videos = dict(zip(several, sample["video"], strict=True)) if several else {"": sample["video"]}
    if "camera" in sample:
        check_intrinsics(sample["camera"]["intrinsics"])
        check_extrinsics(sample["camera"]["extrinsics"])
    length, height, width = sample["video"].shape[-3:]
    numbers = {name: sample[name].flatten(1).numpy() if name in sample else None for name in ("actions", "states")}
    clip = _Clip(key, length, sample["fps"], (height, width), sample["caption"], **numbers)
    for view, video in videos.items():
        grey = video.float().mean(0)  # [T, H, W]
        clip.thumbs[view] = F.adaptive_avg_pool2d(video.float().mean(1), _THUMB).flatten().numpy()
        clip.contrast[view] = float(grey.flatten(1).std(1).max())
        clip.motion[view] = float(grey.diff(dim=0).abs().mean((1, 2)).max()) if length > 1 else 0.0
    return clip


def _check_frames(clips: list[_Clip], num_frames: int | None, temporal_compression: int | None):
    rates = sorted({round(clip.fps, 3) for clip in clips})
    if len(rates) > 1:
        yield Finding(
            "error", f"frame rates differ: {', '.join(f'{rate:g}' for rate in rates)}; resample to one (fps)"
        )
    sizes = sorted({clip.size for clip in clips})
    if len(sizes) > 1:
        told = ", ".join(f"{h}x{w}" for h, w in sizes[:6])
        yield Finding("warning", f"frames differ in size (height x width): {told}; training needs `size` or `crop`")
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
