"""The way of a vehicle as a condition (arXiv 2501.03575, section 6.3): points of its path, told before it is driven.

A trajectory is N points [N, 3] in metres, equally spaced in time from just after the first frame to its end, in the axes of the
first view's camera in the first frame (x right, y down, z forward, as everywhere; docs/camera.md). What the points mean is an
`ActionSpec` of the kind "trajectory", and they enter the network where actions do, as one vector for the whole clip.
"""

import numpy as np
import torch

from .action import ActionSpec
from .camera import camera_centres, check_extrinsics, relative_extrinsics

NUM_POINTS = 64  # of the paper


def trajectory_points(extrinsics, fps: float, num_points: int = NUM_POINTS, rate: float | None = None) -> torch.Tensor:
    """The way of a camera, poses [T, 4, 4] (world to camera) at `fps` -> its points [num_points, 3], float32.

    `rate` is points per second; None spreads them over the T frames. Between frames the way is straight. Raises ValueError for
    a path that is shorter than the points last.
    """
    poses = check_extrinsics(extrinsics)
    if poses.ndim != 3 or len(poses) < 2:
        raise ValueError(f"a trajectory needs poses [T, 4, 4] of at least 2 frames, got {tuple(poses.shape)}")
    duration = (len(poses) - 1) / fps
    rate = rate or num_points / duration
    if num_points / rate > duration * 1.001:
        raise ValueError(
            f"the path lasts {duration:g} s, {num_points} points at {rate:g} per second {num_points / rate:g} s"
        )
    centres = camera_centres(relative_extrinsics(poses)).numpy()
    times = np.arange(1, num_points + 1) / rate
    known = np.arange(len(poses)) / fps
    points = [np.interp(times, known, centres[:, axis]) for axis in range(3)]
    return torch.from_numpy(np.stack(points, axis=1)).float()


def trajectory_spec(rate: float, embodiment: str = "vehicle") -> ActionSpec:
    """What points at `rate` per second mean."""
    return ActionSpec(
        names=("right", "down", "forward"),
        units=("m",) * 3,
        frame="first view's camera in the first frame",
        kind="trajectory",
        rate=rate,
        embodiment=embodiment,
    )


def trajectory_vector(spec: ActionSpec, points, num_points: int) -> torch.Tensor:
    """Points [..., N, 3] in metres -> what the network takes, [..., 1, 3 N]. ValueError where they are not `num_points`."""
    points = spec.normalise(points)
    if points.ndim < 2 or points.shape[-2] != num_points:
        raise ValueError(
            f"a trajectory is {num_points} points [{num_points}, {spec.width}], {spec.rate:g} per second, got "
            f"{tuple(points.shape)}: trajectory_points (cosmos_hf.conditioning.trajectory) makes them from poses"
        )
    return points.flatten(-2).unsqueeze(-2)
