"""Captions of table-top episodes from the simulator's state; directions are those that the camera sees."""

import re

import numpy as np

from ..conditioning.directions import DIRECTIONS
from .tabletop_scene import SceneSpec

SUBJECTS = ("A robot arm", "A robotic arm", "The robot arm", "A robot arm with a two-finger gripper")
# What an instruction names, and what it could have said of the same object instead.
_PUSH, _PICK = re.compile(r"Push the (\w+ \w+)"), re.compile(r"Pick up the (\w+ \w+) and put it down")
_VERBS = re.compile(r"\b(pick|put|lift|drop|push|reach|move)(?:es|s)\b")
LIFTED, MOVED = 0.08, 0.03  # metres: height and distance that count


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def direction_in_view(move: np.ndarray, camera_axes: np.ndarray) -> str:
    """World displacement [3] -> words, by the camera's axes (rows right, down, forward), on the table's plane."""
    right, forward = camera_axes[0][:2], camera_axes[2][:2] / np.linalg.norm(camera_axes[2][:2])
    across, away = move[:2] @ right, move[:2] @ forward
    if abs(across) > abs(away):
        return "to the right" if across > 0 else "to the left"
    return "away from the camera" if away > 0 else "towards the camera"


def _path_in_view(gripper: np.ndarray, camera_axes: np.ndarray) -> str:
    """What the camera sees of a straight path of the gripper [T, 3]."""
    move = gripper[-1] - gripper[0]
    words = [direction_in_view(move, camera_axes)] if np.linalg.norm(move[:2]) > MOVED else []
    if abs(move[2]) > MOVED:
        words.append("up" if move[2] > 0 else "down")
    return f"moves {' and '.join(words)}" if words else "stays where it is"


def caption(
    scene: SceneSpec,
    kind: str,
    target: int,
    positions: np.ndarray,
    gripper: np.ndarray,
    camera_axes: np.ndarray,
    rng: np.random.Generator,
    instruct: bool = False,
) -> str:
    """One sentence of what happened: who, which object, where to, and sometimes what stands beside it; or to `instruct` the robot
    to do it, without a word of who and what stands beside.

    `kind`: "pick", "push", "random" or "plan"; `positions` [T, N, 3] of the objects and `gripper` [T, 3], metres in the
    world; `camera_axes` as `camera_pose` gives them.
    """
    name = scene.objects[target].name
    moves = positions[-1] - positions[0]  # [N, 3]
    subject = str(rng.choice(SUBJECTS))
    distance, height = np.linalg.norm(moves[target][:2]), positions[:, target, 2].max()
    where = direction_in_view(moves[target], camera_axes)
    final_height = positions[-1, target, 2]
    if kind == "pick" and height > LIFTED:
        if final_height > LIFTED:
            text = f"picks up the {name} and lifts it into the air"
        elif final_height < 0:
            text = f"picks up the {name} and drops it off the table"
        else:
            text = f"picks up the {name} and puts it " + (f"down {where}" if distance > MOVED else "back")
    elif kind == "pick":
        text = f"reaches for the {name}"
    elif kind == "push":
        off = "off the table " if final_height < 0 else ""
        text = f"pushes the {name} {off}{where}" if distance > MOVED else f"moves towards the {name}"
    else:
        lengths = np.linalg.norm(moves, axis=1)
        hit = int(lengths.argmax())
        text = "moves freely above the table" if kind == "random" else _path_in_view(gripper, camera_axes)
        if lengths[hit] > MOVED:
            target, text = hit, f"bumps into the {scene.objects[hit].name}"
    if instruct:
        return _VERBS.sub(r"\1", text).capitalize() + "."
    others = [with_article(thing.name) for i, thing in enumerate(scene.objects) if i != target]
    neighbours = f", next to {' and '.join(others)}" if others and rng.random() < 0.7 else ""
    return f"{subject} {text}{neighbours}."


def alternatives(text: str, name: str, names: list[str]) -> list[str]:
    """What an instruction about the object `name` could have said instead in a scene of the objects `names`: the same with another
    object, in another direction, and with picking for pushing or the other way round."""
    told = [text.replace(name, other) for other in dict.fromkeys(names) if other != name]
    told += [text.replace(way, other) for way in DIRECTIONS if way in text for other in DIRECTIONS if other != way]
    told += [_PUSH.sub(r"Pick up the \1 and put it down", text), _PICK.sub(r"Push the \1", text)]
    return [other for other in told if other != text]
