"""Actions derived from end-effector states, in the Bridge convention that the paper's robot post-training uses (section 6.2).

A state is [x, y, z, roll, pitch, yaw, gripper]: metres and radians in the robot's base frame, gripper 0 closed to 1 open,
angles zero with the gripper pointing straight down. The action between two frames is the relative pose in the earlier
end-effector's frame, translation and rotation each times `SCALE`, and the absolute gripper opening of the later frame.
"""

import numpy as np

SCALE = 20.0


def rotation_from_euler(angles: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw [3] in radians -> rotation matrix [3, 3], Rz(yaw) Ry(pitch) Rx(roll)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    return np.array(
        [
            [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx],
        ]
    )


def euler_from_rotation(rotation: np.ndarray) -> np.ndarray:
    """Inverse of `rotation_from_euler`; pitch in [-pi/2, pi/2]."""
    return np.array(
        [
            np.arctan2(rotation[2, 1], rotation[2, 2]),
            np.arcsin(np.clip(-rotation[2, 0], -1, 1)),
            np.arctan2(rotation[1, 0], rotation[0, 0]),
        ]
    )


def actions_from_states(states: np.ndarray) -> np.ndarray:
    """States [T, 7] -> actions [T - 1, 7]."""
    actions = []
    for before, after in zip(states[:-1], states[1:], strict=True):
        frame = rotation_from_euler(before[3:6])
        turn = euler_from_rotation(frame.T @ rotation_from_euler(after[3:6]))
        move = frame.T @ (after[:3] - before[:3])
        actions.append(np.concatenate([SCALE * move, SCALE * turn, after[6:]]))
    return np.array(actions)


def compose_motions(
    moves: np.ndarray, turns: np.ndarray, frame: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where motions [T, 3], each in the frame that the ones before led to, lead from the origin on: positions in the moves'
    unit and Euler angles in radians, each [T, 3]. frame: the first orientation [3, 3], default: none."""
    position, frame, positions, angles = np.zeros(3), np.eye(3) if frame is None else frame, [], []
    for move, turn in zip(moves, turns, strict=True):
        position = position + frame @ move
        frame = frame @ rotation_from_euler(turn)
        positions.append(position)
        angles.append(euler_from_rotation(frame))
    return np.array(positions).reshape(-1, 3), np.array(angles).reshape(-1, 3)


def integrate_actions(start: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The states [T, 7] that actions [T - 1, 7] lead to from a start state [7]: inverse of `actions_from_states`."""
    first = rotation_from_euler(start[3:6])
    positions, angles = compose_motions(actions[:, :3] / SCALE, actions[:, 3:6] / SCALE, first)
    return np.concatenate([start[None], np.concatenate([start[:3] + positions, angles, actions[:, 6:]], axis=1)])
