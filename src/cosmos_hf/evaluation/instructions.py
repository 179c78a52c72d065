"""Whether a generated table-top clip does what its instruction says (arXiv 2501.03575, section 6.2): right object, right way.

Judged by geometry alone. Where the objects stand before anything is generated, and their colours there, is known;
each is followed by its colour through the generated frames, and its path in the picture is turned into one on the table
by the camera. Captions name the object and the direction as the camera sees it, so both can be checked.

Only instructions that the simulator fulfils within the window count. The true rendering is scored by the same means, which is the
ceiling (63 of 72 clips of 17 frames in two validation sets of `tabletop_instructions`), and so is a still picture (none of them).
Axes: T frames, N objects, H, W pixels.
"""

import re
from dataclasses import dataclass

import torch

from ..conditioning.directions import DIRECTIONS
from .metrics import mean_with_interval

OPPOSITE = dict(zip(DIRECTIONS, (DIRECTIONS[1], DIRECTIONS[0], DIRECTIONS[3], DIRECTIONS[2]), strict=True))
TRUE_MOVE, TRUE_RISE = 0.03, 0.06  # metres, by the simulator's state: instructions with less are not scored
SEEN_MOVE, SEEN_RISE = 0.02, 0.03  # metres, in the picture: less is no motion
WAY = 0.5  # cosine between a motion and the direction told: within 60 degrees, as captions round to 90
REACH = 0.12  # of the frame's width: how far an object gets from one frame to the next
OTHER_COLOR = 0.1  # between colours of length 1: objects nearer than that are told apart by their places alone
LEAST_SEEN = 0.35  # of an object's pixels: with fewer it is hidden, and taken to rest

_WAYS = "|".join(DIRECTIONS)
_PUSH = re.compile(rf"[Pp]ush(?:es)? the (\w+ \w+) (?:off the table )?({_WAYS})")
_PICK = re.compile(r"[Pp]icks? up the (\w+ \w+)")


@dataclass(frozen=True)
class Instruction:
    """What a caption asks for: that an object is pushed in a direction, or picked up (direction None)."""

    object: str
    direction: str | None

    @classmethod
    def of(cls, caption: str) -> "Instruction | None":
        """None for a caption that asks for nothing that could be measured."""
        if push := _PUSH.search(caption):
            return cls(*push.groups())
        pick = _PICK.search(caption)
        return cls(pick[1], None) if pick else None


def swap_instruction(caption: str, names: list[str]) -> str | None:
    """The same for another object of the scene, or where there is none, in the opposite direction; None where neither can be."""
    told = Instruction.of(caption)
    if told is None:
        raise ValueError(f"{caption!r} asks for nothing that could be measured")
    if others := [name for name in names if name != told.object]:
        exchange = {told.object: others[0], others[0]: told.object}
        pattern = rf"\b(?:(an?) )?({'|'.join(map(re.escape, exchange))})\b"

        def other(match):
            name = exchange[match[2]]
            return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" if match[1] else name

        return re.sub(pattern, other, caption)
    return None if told.direction is None else caption.replace(told.direction, OPPOSITE[told.direction])


# ---- what is seen ----------------------------------------------------------------------------------------------------


def follow_objects(video: torch.Tensor, first: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Places [N, T, 2] (x, y in pixels) of the objects in `video`, float [3, T, H, W] in [-1, 1].

    first: the true frame [3, H, W] that `video` begins with, and mask: its objects [H, W], 2 + i for object i.
    NaN for an object that cannot be seen there.
    """
    count, (height, width) = max(0, int(mask.max()) - 1), mask.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    start, shown = _colors(first[:, None])[:, 0], _colors(video)  # [3, H, W] and [3, T, H, W]
    masks = {i: mask == 2 + i for i in range(count) if (mask == 2 + i).any()}
    colors = {i: start[:, own].median(1).values for i, own in masks.items()}
    paths = torch.full((count, video.shape[1], 2), float("nan"))
    for i, own in masks.items():
        color = colors[i]
        tolerance = _tolerance(start, color, own)
        size = int(((_distance(start, color) < tolerance) & own).sum())
        others = [other for other in colors.values() if (other - color).norm() > OTHER_COLOR]
        place = torch.stack([x[own].mean(), y[own].mean()])
        for t in range(video.shape[1]):
            distance = _distance(shown[:, t], color)
            like = distance < tolerance
            for other in others:  # an orange cube passes a yellow ball
                like &= distance < _distance(shown[:, t], other)
            seen = like & ((x - place[0]) ** 2 + (y - place[1]) ** 2 < (REACH * width) ** 2)
            if seen.sum() >= max(3, LEAST_SEEN * size):
                place = torch.stack([x[seen].mean(), y[seen].mean()])
            paths[i, t] = place
    return paths


def _colors(video: torch.Tensor) -> torch.Tensor:
    """Hue and saturation, as rgb of length 1: light and shade take and give brightness alone."""
    rgb = (video.float() / 2 + 0.5).clamp(0, 1) + 0.02
    return rgb / rgb.norm(dim=0, keepdim=True)


def _distance(colors: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    return (colors - color.view(3, *[1] * (colors.ndim - 1))).norm(dim=0)


def _tolerance(start: torch.Tensor, color: torch.Tensor, own: torch.Tensor) -> float:
    """Half way from what the object's pixels differ to what those around it do."""
    distance = _distance(start, color)
    inner, outer = distance[own].quantile(0.75), distance[~own].quantile(0.02)
    return float((inner + outer) / 2 if outer > inner else inner)


class Table:
    """From places in the picture to motions on the table: a camera's intrinsics [3, 3] and extrinsics [4, 4]."""

    def __init__(self, intrinsics: torch.Tensor, extrinsics: torch.Tensor):
        self.intrinsics, self.rotation, self.offset = intrinsics.double(), *_split(extrinsics.double())
        self.eye = -self.rotation.T @ self.offset

    def project(self, points: torch.Tensor) -> torch.Tensor:
        """World points [..., 3] -> places [..., 2]."""
        seen = (points.double() @ self.rotation.T + self.offset) @ self.intrinsics.T
        return seen[..., :2] / seen[..., 2:]

    def move(self, start: torch.Tensor, end: torch.Tensor, height: float) -> torch.Tensor:
        """Places [2] -> the world's displacement [3] of something that stays at a height."""
        return self._at(end, height) - self._at(start, height)

    def rise(self, start: torch.Tensor, end: torch.Tensor, point: torch.Tensor) -> float:
        """Places [2] -> how far something at `point` [3] went up, if it went straight up; in metres."""
        up = point + torch.tensor([0, 0, 0.01])
        per_metre = (self.project(up) - self.project(point)) / 0.01
        return float((end - start).double() @ per_metre / per_metre.square().sum())

    def share(self, move: torch.Tensor, direction: str) -> float:
        """Cosine between a displacement [3], seen from above, and a direction in the words of captions."""
        right, ahead = self.rotation[0][:2], self.rotation[2][:2] / self.rotation[2][:2].norm()
        way = dict(zip(DIRECTIONS, (right, -right, ahead, -ahead), strict=True))[direction]
        return float(move[:2].double() @ way / move[:2].norm().clamp(min=1e-9))

    def _at(self, place: torch.Tensor, height: float) -> torch.Tensor:
        ray = self.rotation.T @ torch.linalg.solve(
            self.intrinsics, torch.cat([place.double(), torch.ones(1).double()])
        )
        return self.eye + ray * (height - self.eye[2]) / ray[2]


def _split(extrinsics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return extrinsics[:3, :3], extrinsics[:3, 3]


# ---- scores ----------------------------------------------------------------------------------------------------------


def object_names(sample: dict) -> list[str]:
    return [f"{thing['color']} {thing['shape']}" for thing in sample["record"]["scene"]["objects"]]


def is_fulfilled(sample: dict, instruction: Instruction, given: int) -> bool:
    """Whether the simulator's objects do so within the sample's frames, by its state."""
    path = sample["object_positions"][given - 1 :, object_names(sample).index(instruction.object)]  # [T, 3]
    move = path[-1] - path[0]
    if instruction.direction is None:
        return float((path[:, 2] - path[0, 2]).max()) > TRUE_RISE
    far = float(move[:2].norm()) > TRUE_MOVE and float(path[:, 2].min()) > 0
    table = _table(sample)
    return far and max(DIRECTIONS, key=lambda words: table.share(move, words)) == instruction.direction


def score_instruction(video: torch.Tensor, sample: dict, instruction: Instruction, given: int) -> dict[str, float]:
    """`object`: the named one moved, and farther than the others; `direction`: it moved as it was told; `followed`: both. 0 or 1.

    video: float [3, T, H, W] in [-1, 1], beginning with the sample's `given` frames; `sample` as the validation splits of the
    table-top world have them: with masks, positions of objects, and the camera.
    """
    last = sample["video"][:, given - 1].float() / 127.5 - 1
    paths = follow_objects(video[:, given - 1 :], last, sample["masks"][given - 1])
    table, named = _table(sample), object_names(sample).index(instruction.object)
    points = sample["object_positions"][given - 1].double()  # [N, 3]
    if named >= len(paths) or paths[named].isnan().any():
        return {"object": 0.0, "direction": 0.0, "followed": 0.0}
    moves = [_farthest(path, table, point) for path, point in zip(paths, points, strict=False)]
    if instruction.direction is None:
        right_way = max(table.rise(paths[named, 0], place, points[named]) for place in paths[named]) > SEEN_RISE
    else:
        move = table.move(paths[named, 0], paths[named, -1], float(points[named, 2]))
        right_way = float(move[:2].norm()) > SEEN_MOVE and table.share(move, instruction.direction) > WAY
    right_object = moves[named] > SEEN_MOVE and moves[named] == max(moves)
    return {
        "object": float(right_object),
        "direction": float(right_way),
        "followed": float(right_object and right_way),
    }


def _farthest(path: torch.Tensor, table: Table, point: torch.Tensor) -> float:
    """How far an object got, in metres on the table; 0 where it was never seen."""
    if path.isnan().any():
        return 0.0
    return max(float(table.move(path[0], place, float(point[2]))[:2].norm()) for place in path)


def _table(sample: dict) -> Table:
    return Table(sample["camera"]["intrinsics"], sample["camera"]["extrinsics"][0])


def evaluate_instructions(generate, samples: list[dict], given: int = 1) -> dict:
    """Figures of a model over samples whose instruction is fulfilled within their frames.

    generate(sample, caption, seed) -> video, float [3, T, H, W] in [-1, 1] that begins with `given` frames of the sample's.

    Returns {"model", "truth", "copy_last_frame", "swapped"} -> {"object", "direction", "followed"}, each {"mean", "low", "high",
    "count"}. "swapped" is the same first frame with another instruction (`swap_instruction`), judged by that one; its
    "still_the_first" is how often the video does what the first instruction asked for, and "changed" the rms difference of
    both generated futures over the rms change of the first from a still picture.
    """
    rows = {name: [] for name in ("model", "truth", "copy_last_frame", "swapped")}
    for seed, sample in enumerate(samples):
        told = Instruction.of(sample["caption"])
        if told is None:
            continue
        _check_sample(sample)
        if not is_fulfilled(sample, told, given):
            continue
        truth = sample["video"].float() / 127.5 - 1
        still = truth.clone()
        still[:, given:] = truth[:, given - 1 : given]
        video = generate(sample, sample["caption"], seed)
        for name, shown in (("model", video), ("truth", truth), ("copy_last_frame", still)):
            rows[name].append(score_instruction(shown, sample, told, given))
        if (other := swap_instruction(sample["caption"], object_names(sample))) is not None:
            changed = generate(sample, other, seed)
            row = score_instruction(changed, sample, Instruction.of(other), given)
            row["still_the_first"] = score_instruction(changed, sample, told, given)["followed"]
            row["changed"] = float((changed - video).square().mean().sqrt() / _motion(video, given))
            rows["swapped"].append(row)
    if not rows["model"]:
        raise ValueError(
            f"none of the {len(samples)} samples has an instruction that is fulfilled within its frames: take more clips"
        )
    return {name: _summary(scores) for name, scores in rows.items() if scores}


def _check_sample(sample: dict):
    lacks = [name for name in ("camera", "object_positions", "masks") if name not in sample]
    lacks += [] if "scene" in sample["record"] else ["scene (in its record)"]
    if lacks:
        raise ValueError(
            f"instructions are judged by the simulator's state, and the clip {sample.get('key')!r} has no {', '.join(lacks)}: take "
            "a validation split of the table-top world"
        )


def _motion(video: torch.Tensor, given: int) -> torch.Tensor:
    return (video - video[:, given - 1 : given]).square().mean().sqrt().clamp(min=1e-3)


def _summary(scores: list[dict]) -> dict:
    return {key: mean_with_interval(torch.tensor([row[key] for row in scores])) for key in scores[0]}
