"""Geometry of generated videos (arXiv 2501.03575, sections 5.3.1, 6.1 and 6.3): pose errors, paths and Sampson errors.

Poses are world to camera [T, 4, 4] as in `conditioning.camera`. Errors of poses are taken relative to the first frame, since
nobody else knows the world's frame, and after scaling, since pictures alone know no metres. The Sampson error is the distance,
to first order, of a pair of matched points from agreeing with one rigid scene, in pixels of a picture 540 high, so that videos of
different size compare (the paper's canvas is 960 x 540).

What needs points or poses alone is exact and always there. Finding them in pictures (SIFT, structure from motion) needs pycolmap:
`pip install 'cosmos-hf[geometry]'`.
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..conditioning.camera import camera_centres, check_extrinsics, check_intrinsics, relative_extrinsics

CANVAS_HEIGHT = 540  # of the picture in whose pixels Sampson errors are told
MIN_MATCHES = 16  # fewer tell nothing of a pair of frames
MIN_MATCHES_OF_KNOWN = 4  # where the cameras are known, nothing is fitted to the matches
ENLARGED_HEIGHT = 384  # smaller pictures are enlarged: key points of a few pixels are not found otherwise
MATCH_RATIO = 0.8  # of the nearest to the second nearest descriptor (Lowe's test)

# ---- poses ---------------------------------------------------------------------------------------------------------


def align_scale(estimated, truth) -> torch.Tensor:
    """Estimated poses [T, 4, 4] relative to their first, in the scale in which their centres fit those of the truth best.

    Only the scale is fitted, by least squares; the first frames coincide by definition. Without motion it stays as it is.
    """
    estimated, truth = _pair(estimated, truth)
    ours, theirs = camera_centres(estimated), camera_centres(truth)
    size = (ours * ours).sum()
    scale = (ours * theirs).sum() / size if size > 1e-12 else torch.ones((), dtype=torch.float64)
    aligned = estimated.clone()
    aligned[:, :3, 3] *= scale.clamp(min=0)  # a path that goes the wrong way is not turned round
    return aligned


def rotation_angles(first, second) -> torch.Tensor:
    """Angles in degrees between rotations [..., 3, 3] (or poses), 0 to 180."""
    turn = torch.as_tensor(first)[..., :3, :3].mT @ torch.as_tensor(second)[..., :3, :3]
    # atan2 of sine and cosine: an arccosine loses small angles in rounding
    skew = torch.stack(
        [turn[..., 2, 1] - turn[..., 1, 2], turn[..., 0, 2] - turn[..., 2, 0], turn[..., 1, 0] - turn[..., 0, 1]]
    )
    cosine = turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
    return torch.rad2deg(torch.atan2(skew.norm(dim=0), cosine))


def pose_errors(estimated, truth) -> dict[str, float]:
    """How far recovered poses [T, 4, 4] are from the wanted ones, over all frames but the first.

    "rotation": mean angle in degrees. "translation": mean distance of the centres after `align_scale`, as a share of the
    truth's extent (its largest distance from the first frame), so 0.05 is 5 % of the way; NaN for a truth that stays in place.
    "distance": the same in the truth's units.
    """
    aligned, (_, truth) = align_scale(estimated, truth), _pair(estimated, truth)
    distance = (camera_centres(aligned) - camera_centres(truth)).norm(dim=-1)[1:].mean()
    extent = camera_centres(truth).norm(dim=-1).max()
    return {
        "rotation": float(rotation_angles(aligned, truth)[1:].mean()),
        "translation": float(distance / extent) if extent > 1e-9 else float("nan"),
        "distance": float(distance),
    }


def path_errors(estimated, truth) -> dict[str, float]:
    """Errors of a whole path after `align_scale`.

    "ate": root mean square distance of the centres. "rpe_translation", "rpe_rotation" (degrees): the same of the steps from
    frame to frame. "following": mean distance of the centres *without* scaling, for paths that are both in metres.
    """
    raw, wanted = _pair(estimated, truth)
    aligned = align_scale(estimated, truth)
    distance = (camera_centres(aligned) - camera_centres(wanted)).norm(dim=-1)
    ours, theirs = (poses[1:] @ torch.linalg.inv(poses[:-1]) for poses in (aligned, wanted))
    steps = (camera_centres(ours) - camera_centres(theirs)).norm(dim=-1)
    return {
        "ate": float(distance.square().mean().sqrt()),
        "rpe_translation": float(steps.square().mean().sqrt()),
        "rpe_rotation": float(rotation_angles(ours, theirs).square().mean().sqrt()),
        "following": float((camera_centres(raw) - camera_centres(wanted)).norm(dim=-1)[1:].mean()),
    }


def summarise_poses(errors: list[dict[str, float] | None]) -> dict[str, float | int | None]:
    """`pose_errors` (and other figures beside them) of many clips, None where no poses could be recovered -> "success_rate", the
    means over the recovered ones (None where there is none), and "count" of all clips."""
    if not errors:
        raise ValueError("no clips to summarise")
    found = [error for error in errors if error is not None]
    result = {"success_rate": len(found) / len(errors), "count": len(errors)}
    for name in dict.fromkeys(("rotation", "translation", "distance", *(name for error in found for name in error))):
        values = [error[name] for error in found if np.isfinite(error[name])]
        result[name] = float(np.mean(values)) if values else None
    return result


def _pair(estimated, truth) -> tuple[torch.Tensor, torch.Tensor]:
    estimated, truth = check_extrinsics(estimated), check_extrinsics(truth)
    if estimated.shape != truth.shape or estimated.ndim != 3 or len(truth) < 2:
        raise ValueError(
            f"need two paths [T, 4, 4] of one length of at least 2, got {tuple(estimated.shape)} and {tuple(truth.shape)}"
        )
    return relative_extrinsics(estimated), relative_extrinsics(truth)


# ---- Sampson errors ------------------------------------------------------------------------------------------------


def fundamental_matrix(intrinsics_a, pose_a, intrinsics_b, pose_b) -> torch.Tensor:
    """F [3, 3] of two known cameras: x_b' F x_a = 0 for what both see. ValueError where both stand in one place."""
    motion = check_extrinsics(pose_b) @ torch.linalg.inv(check_extrinsics(pose_a))
    x, y, z = motion[:3, 3].tolist()
    if max(abs(x), abs(y), abs(z)) < 1e-9:
        raise ValueError("cameras in one place have no fundamental matrix: their pictures differ by a homography")
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    inverse_a, inverse_b = (torch.linalg.inv(check_intrinsics(k)) for k in (intrinsics_a, intrinsics_b))
    fundamental = inverse_b.mT @ cross @ motion[:3, :3] @ inverse_a
    return fundamental / fundamental.norm()


def sampson_distances(points_a, points_b, fundamental) -> torch.Tensor:
    """Distances [N], in pixels, of matched points [N, 2] from the epipolar geometry F [3, 3] (Sampson 1982, square root)."""
    a, b = (torch.as_tensor(np.asarray(points), dtype=torch.float64) for points in (points_a, points_b))
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] != 2:
        raise ValueError(f"need matched points [N, 2] twice, got {tuple(a.shape)} and {tuple(b.shape)}")
    fundamental = torch.as_tensor(np.asarray(fundamental), dtype=torch.float64)
    a, b = (torch.cat([points, torch.ones(len(points), 1, dtype=torch.float64)], dim=1) for points in (a, b))
    lines_b, lines_a = a @ fundamental.mT, b @ fundamental
    residual = (b * lines_b).sum(1).abs()
    return residual / (lines_b[:, :2].square().sum(1) + lines_a[:, :2].square().sum(1)).sqrt().clamp(min=1e-30)


def sampson_error(frame_a, frame_b, fundamental=None) -> float:
    """Median Sampson distance of what two frames, uint8 [H, W, 3] or their `Features`, show in common, in pixels of the canvas.

    `fundamental`: of the known cameras; None estimates it from the matches (LO-RANSAC), which measures whether *some* rigid
    scene explains the pair. NaN for fewer than `MIN_MATCHES` matches, of known cameras `MIN_MATCHES_OF_KNOWN`.
    """
    frame_a, frame_b = find_features(frame_a), find_features(frame_b)
    return sampson_error_of_matches(*match_frames(frame_a, frame_b), frame_a.height, fundamental)


def sampson_error_of_matches(points_a, points_b, height: int, fundamental=None) -> float:
    """`sampson_error` of two frames whose matched points [N, 2] are known, of pictures that are `height` high."""
    if len(points_a) < (MIN_MATCHES if fundamental is None else MIN_MATCHES_OF_KNOWN):
        return float("nan")
    if fundamental is None:
        options = load_pycolmap().RANSACOptions()
        options.max_error, options.random_seed = height / CANVAS_HEIGHT * 2, 0
        found = load_pycolmap().estimate_fundamental_matrix(points_a, points_b, options)
        if found is None:
            return float("nan")
        fundamental = found["F"]
    distances = sampson_distances(points_a, points_b, fundamental)
    return float(distances.median()) * CANVAS_HEIGHT / height


def temporal_sampson_error(video) -> dict[str, float | int]:
    """Adjacent frames of one camera, uint8 [T, H, W, 3]: "error" (median over pairs), "pairs", "failed" (too few matches)."""
    return _over_pairs([(video[t], video[t + 1]) for t in range(len(video) - 1)])


def cross_view_sampson_error(videos: dict[str, np.ndarray], pairs: list[tuple[str, str]], fundamentals=None) -> dict:
    """Frames of one time by neighbouring cameras: view -> uint8 [T, H, W, 3], and which views overlap.

    `fundamentals`: pair -> F of the known rig; None estimates it for every pair of frames.
    """
    frames = [
        (videos[a][t], videos[b][t], (fundamentals or {}).get((a, b))) for a, b in pairs for t in range(len(videos[a]))
    ]
    return _over_pairs(frames)


def _over_pairs(frames: list[tuple]) -> dict[str, float | int]:
    errors = np.array([sampson_error(*pair) for pair in frames])
    good = errors[np.isfinite(errors)]
    error = float(np.median(good)) if len(good) else float("nan")
    return {"error": error, "pairs": len(errors), "failed": int(len(errors) - len(good))}


# ---- points and poses from pictures --------------------------------------------------------------------------------


class Features(NamedTuple):
    """Of a frame: key points [N, 2] in pixels from the edge, unit descriptors [N, 128], and its height."""

    points: np.ndarray
    descriptors: np.ndarray
    height: int


def find_features(frame) -> Features:
    """SIFT features of a frame, uint8 [H, W, 3]; features, which several comparisons can share, as they are."""
    return frame if isinstance(frame, Features) else Features(*_sift(frame), len(frame))


def match_frames(frame_a, frame_b) -> tuple[np.ndarray, np.ndarray]:
    """Matched points [N, 2] of two frames, uint8 [H, W, 3] or their `Features`: mutually nearest, by a clear distance."""
    (points_a, features_a, _), (points_b, features_b, _) = find_features(frame_a), find_features(frame_b)
    if len(points_a) < 2 or len(points_b) < 2:
        return np.zeros((0, 2)), np.zeros((0, 2))
    likeness = features_a.astype(np.float32) @ features_b.astype(np.float32).T  # descriptors have unit length
    forth, back, rows = likeness.argmax(1), likeness.argmax(0), np.arange(len(likeness))
    nearest = likeness[rows, forth]
    likeness[rows, forth] = -np.inf
    first, second = (np.sqrt(np.maximum(2 - 2 * value, 0)) for value in (nearest, likeness.max(1)))
    chosen = np.nonzero((back[forth] == rows) & (first < MATCH_RATIO * second))[0]
    return points_a[chosen], points_b[forth[chosen]]


@dataclass
class RecoveredPath:
    """Poses that structure from motion found: `frames` [N] says of which, `extrinsics` [N, 4, 4]."""

    frames: list[int]
    extrinsics: torch.Tensor


def recover_poses(video, intrinsics, min_share: float = 1.0) -> RecoveredPath | None:
    """The camera's way through a video, uint8 [T, H, W, 3], with known intrinsics [3, 3], by incremental structure from motion.

    None where fewer than `min_share` of the frames could be placed in one model, which counts as failed
    (`summarise_poses`).
    """
    pycolmap = load_pycolmap()
    matrix = check_intrinsics(intrinsics)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pictures").mkdir()
        for t, frame in enumerate(video):
            picture, factor = _enlarged(frame)
            picture.save(root / "pictures" / f"{t:05d}.png")
        reading = pycolmap.ImageReaderOptions()
        reading.camera_model = "PINHOLE"
        numbers = factor * torch.stack([matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]])
        reading.camera_params = ",".join(str(value) for value in numbers.tolist())
        with quiet(pycolmap):
            models = _reconstruct(pycolmap, root, reading)
    if not models:
        return None
    best = max(models.values(), key=lambda model: model.num_reg_images())
    images = sorted((image for image in best.images.values() if image.has_pose), key=lambda image: image.name)
    if len(images) < min_share * len(video) or len(images) < 2:
        return None
    poses = np.stack([image.cam_from_world().matrix() for image in images])
    return RecoveredPath([int(Path(image.name).stem) for image in images], check_extrinsics(poses))


def _reconstruct(pycolmap, root: Path, reading) -> dict:
    database, pictures, cpu = root / "database.db", root / "pictures", pycolmap.Device.cpu
    pycolmap.extract_features(
        database, pictures, camera_mode=pycolmap.CameraMode.SINGLE, reader_options=reading, device=cpu
    )
    pycolmap.match_exhaustive(database, device=cpu)
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed, options.min_model_size = 0, 3
    options.ba_refine_focal_length = options.ba_refine_extra_params = False
    # Short clips of small pictures move little and have few points.
    options.mapper.init_min_tri_angle, options.mapper.init_min_num_inliers = 2.0, 30
    options.mapper.abs_pose_min_num_inliers = 15
    return pycolmap.incremental_mapping(database, pictures, root, options)


@contextlib.contextmanager
def quiet(pycolmap):
    """Without what pycolmap tells of every step."""
    previous, pycolmap.logging.minloglevel = pycolmap.logging.minloglevel, 3
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = previous


def _enlarged(frame) -> tuple[Image.Image, int]:
    """A frame as a picture at least `ENLARGED_HEIGHT` high, and by how much it was enlarged."""
    picture = Image.fromarray(np.asarray(frame))
    factor = -(-ENLARGED_HEIGHT // picture.height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC), factor


def _sift(frame) -> tuple[np.ndarray, np.ndarray]:
    """Key points [N, 2] in pixels from the edge, and unit descriptors [N, 128]."""
    pycolmap = load_pycolmap()
    picture, factor = _enlarged(frame)
    grey = np.ascontiguousarray(picture.convert("L"), dtype=np.uint8)
    with quiet(pycolmap):
        points, features = pycolmap.Sift(device=pycolmap.Device.cpu).extract(grey)
    features = np.asarray(features, dtype=np.float64)
    features = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-9)
    return np.asarray(points, dtype=np.float64)[:, :2] / factor, features


def load_pycolmap():
    try:
        import pycolmap
    except ImportError as error:
        raise ImportError(
            "finding points and poses in pictures needs pycolmap: pip install 'cosmos-hf[geometry]'"
        ) from error
    return pycolmap
