"""The way of a rig of cameras from its pictures: where a vehicle that a generated multi-view video shows has driven.

All views together tell the rotation of every step well, also in small pictures, and the direction of its motion. Its length cannot
be seen (in straight motion scale is not observable), so it is told: that of the way that was to be followed. What is left to
measure is whether the way is followed, in metres.

Axes: V views, T frames, N matches.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..conditioning.camera import camera_centres, check_extrinsics, check_intrinsics, relative_extrinsics
from .geometry import CANVAS_HEIGHT, MIN_MATCHES, load_pycolmap, quiet, rotation_angles

MATCH_ERROR = 4.0  # pixels of the canvas, of inliers
STILL = 0.02  # metres a step: below, a rig is taken to stand
_ENOUGH = 300  # matches for the direction of a step
_ANGLE = 0.01  # radians: an epipolar residual that counts as wrong


@dataclass
class RigPath:
    """Poses [T, 4, 4] of the first view's camera, world to camera, and how many of the steps could not be found; these repeat the
    step before."""

    extrinsics: torch.Tensor
    failed: int


Matches = list[list[tuple[np.ndarray, np.ndarray]]]


def recover_rig_path(matches: Matches, intrinsics, extrinsics, height: int) -> RigPath:
    """Follow a rig through its pictures, which are `height` high.

    Args:
        matches: [V][T - 1], of each view's frame with its next one ([N, 2] twice; `geometry.match_frames`).
        intrinsics: [V, 3, 3].
        extrinsics: [V, T, 4, 4] of the way that was to be followed: the rig is that of its first frame, and the lengths of the
            steps are its own.

    Raises ValueError for a single view, whose small pictures tell too little (`geometry.recover_poses`).
    """
    poses, matrices = check_extrinsics(extrinsics), check_intrinsics(intrinsics)
    if len(matches) < 2 or len(poses) != len(matches):
        raise ValueError(f"a rig needs two or more views, got matches of {len(matches)} and poses of {len(poses)}")
    rig = (poses[:, 0] @ torch.linalg.inv(poses[0, 0])).numpy()  # first view's camera -> each camera
    steps = (poses[0, 1:] @ torch.linalg.inv(poses[0, :-1])).numpy()
    motion, found, failed = np.eye(4), [np.eye(4)], 0
    for t, wanted in enumerate(steps):
        length = float(np.linalg.norm(wanted[:3, 3]))
        step = _find_step([view[t] for view in matches], matrices.numpy(), rig, length, height)
        failed += step is None
        motion = motion if step is None else step
        found.append(motion @ found[-1])
    return RigPath(torch.from_numpy(np.stack(found)), failed)


def following_errors(matches: Matches, intrinsics, extrinsics, height: int) -> dict[str, float]:
    """How far the way that the pictures show is from the one that was to be followed. Arguments: `recover_rig_path`.

    "following": mean distance of the positions in metres (the paper's trajectory following error, there in cm), of the frames
    after the first. "rotation": mean angle in degrees. "length": of the way, metres. "failed": steps that could not be found.
    """
    path = recover_rig_path(matches, intrinsics, extrinsics, height)
    truth = relative_extrinsics(check_extrinsics(extrinsics)[0])
    ours, theirs = camera_centres(path.extrinsics), camera_centres(truth)
    return {
        "following": float((ours - theirs).norm(dim=-1)[1:].mean()),
        "rotation": float(rotation_angles(path.extrinsics, truth)[1:].mean()),
        "length": float((theirs[1:] - theirs[:-1]).norm(dim=-1).sum()),
        "failed": path.failed,
    }


def _find_step(matches, intrinsics: np.ndarray, rig: np.ndarray, length: float, height: int) -> np.ndarray | None:
    """The rig's motion [4, 4] between two frames, from each view's matches; None for too few."""
    before, after = (np.concatenate([pair[i] for pair in matches]) for i in (0, 1))
    views = np.repeat(np.arange(len(matches)), [len(pair[0]) for pair in matches])
    if len(views) < MIN_MATCHES:
        return None
    pycolmap = load_pycolmap()
    options = pycolmap.RANSACOptions()
    options.max_error, options.random_seed = MATCH_ERROR * height / CANVAS_HEIGHT, 0
    options.min_num_trials, options.max_num_trials = 30, 300  # one takes milliseconds
    cameras = []
    for k in intrinsics:
        size = dict(width=int(2 * k[0, 2]) + 1, height=height)
        cameras.append(pycolmap.Camera(model="PINHOLE", params=[k[0, 0], k[1, 1], k[0, 2], k[1, 2]], **size))
    from_rig = [pycolmap.Rigid3d(np.ascontiguousarray(pose[:3])) for pose in rig]
    with quiet(pycolmap):
        numbers = views.tolist()
        found = pycolmap.estimate_generalized_relative_pose(
            before, after, numbers, numbers, from_rig, cameras, options
        )
    if found is None or found["num_inliers"] < MIN_MATCHES:
        return None
    pose = found.get("rig2_from_rig1", found.get("pano2_from_pano1"))  # the latter for cameras in one place
    rotation = pose.matrix()[:, :3]
    step = np.eye(4)
    step[:3, :3] = rotation
    if length > STILL:
        kept = np.nonzero(found["inlier_mask"])[0]
        kept = kept[:: -(-len(kept) // _ENOUGH)]
        rays = [_rays(points[kept], views[kept], intrinsics, rig) for points in (before, after)]
        centres = -np.einsum("vji,vj->vi", rig[:, :3, :3], rig[:, :3, 3])[views[kept]]
        step[:3, 3] = length * _direction(*rays, centres, rotation, length)
    return step


def _rays(points: np.ndarray, views: np.ndarray, intrinsics: np.ndarray, rig: np.ndarray) -> np.ndarray:
    """Pixels [N, 2] of views [N] -> unit directions [N, 3] in the axes of the rig."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    to_rig = np.einsum("vji,vjk->vik", rig[:, :3, :3], np.linalg.inv(intrinsics))  # R^T K^-1
    rays = np.einsum("nij,nj->ni", to_rig[views], homogeneous)
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _direction(before, after, centres, rotation, length: float) -> np.ndarray:
    """The unit direction of a motion with known rotation and length that the matched rays [N, 3] of a rig agree with best.

    A point is seen from `centres` [N, 3] before and after: P' = R P + t, and the ray after, R times the ray before and the way of
    the camera, t + R c - c, lie in one plane, with both depths positive. The sphere is searched, first coarsely.
    """
    turned = before @ rotation.T
    lever = centres @ rotation.T - centres
    normal = np.cross(after, turned)  # [N, 3]
    parallax = np.linalg.norm(normal, axis=1)

    def cost(directions):
        way = length * directions[:, None] + lever  # [D, N, 3]
        across = np.cross(way, turned)
        off = np.abs((way * normal).sum(-1)) / np.linalg.norm(across, axis=-1).clip(1e-9)
        depth_after = (across * normal).sum(-1)
        depth_before = -(np.cross(after, way) * normal).sum(-1)
        behind = (np.minimum(depth_after, depth_before) < 0) & (parallax > 2 * _ANGLE)
        return np.where(behind, 1.0, (off / _ANGLE).clip(max=1.0)).mean(1)

    directions = _sphere(1500)
    best = directions[cost(directions).argmin()]
    for spread in (0.06, 0.015):
        near = best + spread * _sphere(300)
        near = np.concatenate([best[None], near / np.linalg.norm(near, axis=1, keepdims=True)])
        best = near[cost(near).argmin()]
    return best


def _sphere(count: int) -> np.ndarray:
    """Directions [count, 3], evenly spread."""
    index = np.arange(count) + 0.5
    z, angle = 1 - 2 * index / count, np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - z * z)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1)
