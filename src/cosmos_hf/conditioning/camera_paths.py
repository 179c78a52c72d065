"""Camera paths without a file: named trajectories and a joystick, relative to the first frame.

Both give extrinsics [T, 4, 4] (world to camera, `camera.py`) that begin with the identity. Lengths are in the units of the
data that a model was trained on: metres for simulated rooms, the reconstruction's own units elsewhere.
"""

import math

import numpy as np
import torch

from .camera import invert_pose

# What one step of the joystick holds, in the camera's own axes: lengths, then degrees.
JOYSTICK_AXES = ("right", "up", "forward", "pan_right", "tilt_up", "roll_right")
_FORWARD, _RIGHT, _UP, _PAN = np.eye(6)[[2, 0, 1, 3]]
KEYS = {
    "w": _FORWARD,
    "s": -_FORWARD,
    "d": _RIGHT,
    "a": -_RIGHT,
    "r": _UP,
    "f": -_UP,
    "e": _PAN,
    "q": -_PAN,
    ".": np.zeros(6),
}
# Name -> share of `distance` along (right, up, forward) and of `angle` about (pan right, tilt up, roll right).
TRAJECTORIES = {
    "static": (0, 0, 0, 0, 0, 0),
    "dolly_in": (0, 0, 1, 0, 0, 0),
    "dolly_out": (0, 0, -1, 0, 0, 0),
    "truck_left": (-1, 0, 0, 0, 0, 0),
    "truck_right": (1, 0, 0, 0, 0, 0),
    "pedestal_up": (0, 1, 0, 0, 0, 0),
    "pedestal_down": (0, -1, 0, 0, 0, 0),
    "pan_left": (0, 0, 0, -1, 0, 0),
    "pan_right": (0, 0, 0, 1, 0, 0),
    "tilt_up": (0, 0, 0, 0, 1, 0),
    "tilt_down": (0, 0, 0, 0, -1, 0),
    "roll_left": (0, 0, 0, 0, 0, -1),
    "roll_right": (0, 0, 0, 0, 0, 1),
}
# Around the point straight ahead at `depth`, which stays in the picture's centre: sign of the pan and of the tilt.
ORBITS = {"orbit_left": (1, 0), "orbit_right": (-1, 0), "orbit_up": (0, -1), "orbit_down": (0, 1)}


def named_trajectory(
    name: str, num_frames: int, distance: float = 1.0, angle: float = 30.0, depth: float = 2.0
) -> torch.Tensor:
    """Extrinsics [num_frames, 4, 4] of a trajectory of `TRAJECTORIES` or `ORBITS`, at constant speed.

    `distance` is the length of the whole way and `angle` the whole turn in degrees; `depth` is the distance of the point
    that orbits go around. `orbit_left` carries the camera to its left. Raises ValueError for an unknown name.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    part = np.linspace(0, 1, num_frames)[:, None]
    if name in TRAJECTORIES:
        moves = np.array(TRAJECTORIES[name], dtype=float) * np.repeat([distance, angle], 3)
        poses = [_step(row) for row in part * moves]
    elif name in ORBITS:
        if not depth > 0:
            raise ValueError(f"depth must be positive, got {depth}")
        pan, tilt = ORBITS[name]
        turns = part * np.array([0, 0, 0, pan * angle, tilt * angle, 0])
        ahead, back = np.eye(4), np.eye(4)
        ahead[2, 3], back[2, 3] = depth, -depth
        poses = [ahead @ _step(row) @ back for row in turns]
    else:
        raise ValueError(f"unknown trajectory {name!r}; there is {', '.join([*TRAJECTORIES, *ORBITS])}")
    return invert_pose(torch.from_numpy(np.stack(poses)))


def joystick_path(moves, step: float = 0.1, turn: float = 3.0) -> torch.Tensor:
    """Extrinsics [T, 4, 4] from one command per step between frames.

    Args:
        moves: numbers [T - 1, 6] in the order of `JOYSTICK_AXES` (lengths and degrees, in the camera's axes of that moment),
            or keys, one per step, such as "wwwwdd": w s forward and back, a d left and right, r f up and down, q e turn left
            and right, "." stay.
        step, turn: length and degrees of one key; not used for numbers.
    """
    if isinstance(moves, str):
        unknown = sorted(set(moves) - set(KEYS))
        if unknown:
            raise ValueError(f"unknown keys {''.join(unknown)!r}; there is {''.join(KEYS)!r}")
        moves = [KEYS[key] * np.repeat([step, turn], 3) for key in moves]
    moves = np.asarray(moves, dtype=float)
    moves = moves if moves.size else moves.reshape(0, 6)
    if moves.ndim != 2 or moves.shape[1] != 6 or not np.isfinite(moves).all():
        raise ValueError(f"moves must be finite numbers [T - 1, 6] ({', '.join(JOYSTICK_AXES)}), got {moves.shape}")
    poses = [np.eye(4)]
    for row in moves:
        poses.append(poses[-1] @ _step(row))
    return invert_pose(torch.from_numpy(np.stack(poses)))


def _step(row: np.ndarray) -> np.ndarray:
    """One row of `JOYSTICK_AXES` -> the new camera in the old one's coordinates [4, 4] (x right, y down, z forward)."""
    right, up, forward, pan, tilt, roll = row
    pose = np.eye(4)
    pose[:3, :3] = rotation_about(np.radians([tilt, pan, roll]))
    pose[:3, 3] = right, -up, forward
    return pose


def rotation_about(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] about the direction of a vector [3] by its length in radians."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle if angle else vector
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
