"""Generated views of several cameras (arXiv 2501.03575, section 6.3): do they show one world, and is the way followed?

The cameras are known, since the clips come from a simulator or a calibrated rig. All Sampson errors are in pixels of a picture 540
high (`geometry`); they need pycolmap: `pip install 'cosmos-hf[geometry]'`.

Axes: V views, T frames.
"""

import numpy as np
import torch

from ..conditioning.camera import camera_centres, check_extrinsics, check_intrinsics
from .geometry import (
    CANVAS_HEIGHT,
    Features,
    find_features,
    fundamental_matrix,
    match_frames,
    sampson_distances,
    sampson_error_of_matches,
)
from .metrics import mean_with_interval, psnr
from .rig_odometry import STILL, following_errors

LEAST_OVERLAP = 0.1  # of a view's picture that another one must see to be its neighbour
_DISTANCE = 15.0  # metres at which overlap is judged
_FAR = 10  # doublings of two cameras' distance up to where what both see may lie
_STEP = 4  # frames between those in which views are compared: neighbours in time have nearly the same matches


def seen_by_other(points, camera: tuple, other: tuple, height: int, width: int, distances=None) -> torch.Tensor:
    """Whether pixels [N, 2] of a camera, (intrinsics [3, 3], pose [4, 4]), lie in the picture of another one, bool [N], where what
    they show is at one of the `distances` along the camera's axis, in the poses' unit; None: at any of the two cameras' own
    distance and its doublings up to 2 ** `_FAR`. Both pictures have one size."""
    intrinsics, other_intrinsics = check_intrinsics(camera[0]), check_intrinsics(other[0])
    pose, other_pose = check_extrinsics(camera[1]), check_extrinsics(other[1])
    pixels = torch.as_tensor(np.asarray(points), dtype=torch.float64)
    rays = torch.linalg.inv(intrinsics) @ torch.cat([pixels, torch.ones(len(pixels), 1, dtype=torch.float64)], dim=1).T
    motion = other_pose @ torch.linalg.inv(pose)
    distances = distances or [float(motion[:3, 3].norm()) * 2**k for k in range(_FAR + 1)]
    seen = torch.zeros(len(pixels), dtype=torch.bool)
    for distance in distances:
        u, v, depth = other_intrinsics @ (motion[:3, :3] @ (distance * rays) + motion[:3, 3:])
        seen |= (depth > 0) & (u >= 0) & (u < width * depth) & (v >= 0) & (v < height * depth)
    return seen


def neighbouring_views(intrinsics, extrinsics, height: int, width: int) -> list[tuple[int, int]]:
    """Pairs of views of a rig, intrinsics [V, 3, 3] and poses [V, 4, 4], that share at least `LEAST_OVERLAP` of the picture.

    Views of cameras in one place are left out: they have no epipolar geometry.
    """
    cameras = list(zip(check_intrinsics(intrinsics), check_extrinsics(extrinsics), strict=True))
    centres = camera_centres(extrinsics)
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width))
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
    pairs = []
    for a, camera in enumerate(cameras):
        for b, other in enumerate(cameras[a + 1 :], a + 1):
            if (centres[b] - centres[a]).norm() < STILL:
                continue
            if seen_by_other(pixels, camera, other, height, width, (_DISTANCE,)).double().mean() >= LEAST_OVERLAP:
                pairs.append((a, b))
    return pairs


def match_views(
    features: Features, others: Features, camera: tuple, other: tuple, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """`match_frames` of two known cameras at one moment, among the points that both can see (`seen_by_other`).

    Neighbouring views share a strip of their pictures. What lies beyond it has no partner, and among windows and kerbs that look
    alike it finds a wrong one: of the matches in true renderings of the simulated town 44 % were more than a pixel off.
    """

    def shared(frame: Features, camera: tuple, other: tuple) -> Features:
        chosen = seen_by_other(frame.points, camera, other, frame.height, width).numpy()
        return Features(frame.points[chosen], frame.descriptors[chosen], frame.height)

    return match_frames(shared(features, camera, other), shared(others, other, camera))


def known_sampson_error(pairs: list[tuple], height: int) -> dict[str, float | int | None]:
    """Frames of known cameras, as (points [N, 2], matched points [N, 2], F), of pictures `height` high.

    "error", the median over all points of all pairs, and the number of "matches" and of "pairs". Frames that show one world have
    many matches and a small error.
    """
    distances = [sampson_distances(*pair) for pair in pairs if len(pair[0])]
    matches = torch.cat(distances) if distances else torch.zeros(0)
    error = float(matches.median()) * CANVAS_HEIGHT / height if len(matches) else None
    return {"error": error, "matches": len(matches), "pairs": len(pairs)}


def score_geometry(videos: np.ndarray, intrinsics, extrinsics, given: list[int] | None = None) -> dict[str, dict]:
    """Geometry of views, uint8 [V, T, H, W, 3], against the cameras that they should be seen through.

    Args:
        intrinsics: [V, 3, 3].
        extrinsics: [V, T, 4, 4] world to camera.
        given: [V], how many first frames of each view the model was given. Sampson errors leave out pairs of frames that were
            both given, which flatter it: they agree as the true ones do. None is none. The way is followed from the first frame
            on, given or not.

    Returns:
        "temporal": adjacent frames of each view agree with *some* rigid motion (the paper's temporal Sampson error).
        "temporal_known": they agree with the true motion of their camera.
        "cross_view": neighbouring views of one moment agree with the true rig, where both can see a point (`match_views`; the
            paper's cross-view Sampson error).
        "trajectory": `rig_odometry.following_errors`; absent for a single view.
    """
    intrinsics, extrinsics = check_intrinsics(intrinsics), check_extrinsics(extrinsics)
    views, frames, height, width = videos.shape[:4]
    if extrinsics.shape[:2] != (views, frames):
        raise ValueError(f"extrinsics {tuple(extrinsics.shape)} do not fit {views} views of {frames} frames")
    features = [[find_features(frame) for frame in video] for video in videos]
    return score_features(features, intrinsics, extrinsics, width, given)


def score_features(
    features: list[list[Features]], intrinsics, extrinsics, width: int, given: list[int] | None = None
) -> dict[str, dict]:
    """`score_geometry` of frames whose features [V][T] are known."""
    height, views, frames = features[0][0].height, len(features), len(features[0])
    given = [0] * views if given is None else given
    if len(given) != views:
        raise ValueError(
            f"given {given} says of {len(given)} views how many frames they were given; there are {views}"
        )
    matches = [[match_frames(view[t], view[t + 1]) for t in range(frames - 1)] for view in features]
    starts = [max(count - 1, 0) for count in given]  # of the pairs of frames that are not both given
    pairs = [pair for view, start in zip(matches, starts, strict=True) for pair in view[start:]]
    errors = np.array([sampson_error_of_matches(*pair, height) for pair in pairs])
    found = errors[np.isfinite(errors)]
    moved, crossed = [], []
    for v in range(views):
        centres = camera_centres(extrinsics[v])
        for t in range(starts[v], frames - 1):
            if (centres[t + 1] - centres[t]).norm() > STILL:
                known = fundamental_matrix(intrinsics[v], extrinsics[v, t], intrinsics[v], extrinsics[v, t + 1])
                moved.append((*matches[v][t], known))
    for a, b in neighbouring_views(intrinsics, extrinsics[:, 0], height, width):
        cameras = (intrinsics[a], extrinsics[a, 0]), (intrinsics[b], extrinsics[b, 0])
        known = fundamental_matrix(*cameras[0], *cameras[1])
        crossed += [
            (*match_views(features[a][t], features[b][t], *cameras, width), known)
            for t in range(0, frames, _STEP)
            if t >= min(given[a], given[b])
        ]
    error = float(np.median(found)) if len(found) else None
    result = {
        "temporal": {"error": error, "pairs": len(errors), "failed": len(errors) - len(found)},
        "temporal_known": known_sampson_error(moved, height),
        "cross_view": known_sampson_error(crossed, height),
    }
    if views > 1:
        result["trajectory"] = following_errors(matches, intrinsics, extrinsics, height)
    return result


def score_pictures(generated: torch.Tensor, truth: torch.Tensor, given: list[int]) -> dict[str, torch.Tensor]:
    """PSNR of generated views [V, 3, T, H, W] in [-1, 1] against the truth, of the frames after the `given` [V] first ones.

    "model" and, of views with a first frame that is given, "copy_first_frame": [V'] each, for views that were not given whole.
    """
    if generated.shape != truth.shape or len(given) != len(truth):
        raise ValueError(
            f"generated {tuple(generated.shape)} and truth {tuple(truth.shape)} of {len(given)} views differ"
        )
    rows = {"model": [], "copy_first_frame": []}
    for ours, true, count in zip(generated, truth, given, strict=True):
        if count == true.shape[1]:
            continue
        rows["model"].append(psnr(ours[None, :, count:], true[None, :, count:]).mean())
        if count:
            still = true[None, :, count - 1 : count].expand(-1, -1, true.shape[1] - count, -1, -1)
            rows["copy_first_frame"].append(psnr(still, true[None, :, count:]).mean())
    return {name: torch.stack(values) for name, values in rows.items() if values}


def summarise_views(scores: list[dict]) -> dict:
    """Nested dicts of numbers of many clips, as above -> the same dict with {"mean", "low", "high", "count"} (95 % over clips)
    in their place. Counts are summed up; what no clip has is None."""
    if not scores:
        raise ValueError("no scores to summarise")
    result = {}
    for name in dict.fromkeys(key for score in scores for key in score):
        values = [score[name] for score in scores if name in score]
        if isinstance(values[0], dict):
            result[name] = summarise_views(values)
        elif name in ("matches", "pairs", "failed"):
            result[name] = int(sum(values))
        else:
            numbers = torch.cat(
                [torch.as_tensor(value).double().flatten() for value in values if value is not None]
                or [torch.zeros(0)]
            )
            numbers = numbers[torch.isfinite(numbers)]
            result[name] = mean_with_interval(numbers) if len(numbers) else None
    return result
