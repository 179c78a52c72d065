"""The table-top world with a robot that stands still, where things move by themselves, as if they were told to: "Push the red cube
to the left", and it slides there; "Pick up the red cube", and it rises.

What such a clip shows is decided by its text alone and from its first frame on. A small model learns from a few thousand of them
what the names mean, which it does not from clips of a robot at work, where most of the picture is the arm's. The words are those
that `tabletop_instructions` tells the robot: what a name meant in "The red cube slides" a nano model did not know in "Push the
red cube". Four clips in a row show one scene, in which each of two or three things moves.
"""

from dataclasses import dataclass

import numpy as np

from ..conditioning.robot_states import actions_from_states
from .captions import direction_in_view
from .render import mujoco
from .tabletop import FPS, HEIGHT, WIDTH, Camera, Robot, intrinsics, world_to_camera
from .tabletop_instructions import CLIPS_PER_SCENE, SPLITS, ToldEpisode
from .tabletop_scene import SceneSpec, build_model, camera_pose, sample_scene

__all__ = ["FPS", "HEIGHT", "NUM_FRAMES", "SPLITS", "VERSION", "WIDTH", "simulate"]

VERSION = 2
NUM_FRAMES = 17
REACH_FRAMES = 3  # in which a hand gets to the thing that moves (`tabletop_hand`)


@dataclass
class _Move:
    """An even motion, and then rest."""

    text: str  # with {} for the name of what moves
    along: np.ndarray  # [3] of length 1, in the world
    distance: float  # metres
    steps: int  # frames until it is there

    def at(self, frame: int) -> np.ndarray:
        """The displacement [3] at a frame, in metres."""
        return self.along * self.distance * np.clip(frame / self.steps, 0, 1)

    def grip(self, thing: np.ndarray) -> tuple[np.ndarray, float]:
        """Where a hand at the thing is, in the world, and how far it is open: about what it lifts, behind what it pushes."""
        if self.along[2]:
            return np.array([*thing[:2], max(thing[2], 0.018)]), 0.35
        return np.array([*(thing - 0.05 * self.along)[:2], 0.025]), 0.0


def simulate(
    split: str, index: int, seed: int = 0, renderer: str | None = "filament", masks: bool = False, hand: bool = False
) -> ToldEpisode:
    """Clip `index` of a split, a pure function of its arguments as `tabletop.simulate` is, whose arguments these are.

    `hand`: the gripper goes to the thing first, and then along with it (`tabletop_hand`).

    Nothing falls, is pushed or collides: places are set, not simulated.
    """
    scene_index, turn = divmod(index, CLIPS_PER_SCENE)
    rng = np.random.default_rng([seed, *split.encode(), scene_index])
    scene = sample_scene(rng, split)
    while len(scene.objects) < 2:
        scene = sample_scene(rng, split)
    robot = _standing_robot(scene, rng)
    order = rng.permutation(len(scene.objects))
    target = 0 if split == "val_combo" else int(order[turn % len(order)])  # there it is the held-out pair
    move = _draw_move(scene, np.random.default_rng([seed, *split.encode(), scene_index, turn]))
    take = Camera(robot.model, renderer, masks)
    start = robot.object_positions()[target].copy()
    rest = robot.state()[:3]
    for frame in range(NUM_FRAMES):
        place = start + move.at(frame - REACH_FRAMES if hand else frame)
        robot.put_object(target, place)
        if hand and frame:
            goal, opening = move.grip(place)
            robot.put_hand(rest + (goal - rest) * min(1, frame / REACH_FRAMES), opening)
        take.picture(robot)
    states = np.array(take.states)
    actions = actions_from_states(states)  # which a robot that stands still was also told
    return ToldEpisode(
        scene=scene,
        kind="objects",
        caption=move.text.format(scene.objects[target].name),
        frames=np.array(take.frames),
        states=states,
        actions=actions,
        commands=actions,
        object_positions=np.array(take.positions),
        intrinsics=intrinsics(),
        extrinsics=np.repeat(world_to_camera(scene)[None], NUM_FRAMES, axis=0),
        target=target,
        masks=np.array(take.masks) if masks else None,
    )


def _standing_robot(scene: SceneSpec, rng: np.random.Generator) -> Robot:
    """Where a short random walk of an open gripper left it, above the table."""
    robot = Robot(build_model(scene))
    for _ in range(8):
        robot.step(np.array([*rng.normal(0, 0.02, 2), abs(rng.normal(0, 0.02)), 0, 0, 0, 1]))
    mujoco.mj_forward(robot.model, robot.data)  # a step leaves the objects' places as they were before it
    return robot


def _draw_move(scene: SceneSpec, rng: np.random.Generator) -> _Move:
    """Half of the moves go up, since there an object is in nobody's way; the others along the picture's axes on the table."""
    distance, steps = rng.uniform(0.06, 0.10), int(rng.integers(4, 8))
    if rng.random() < 0.5:
        return _Move("Pick up the {}.", np.array([0, 0, 1.0]), distance, steps)
    axes = camera_pose(scene)[1]
    along = axes[[0, 2][rng.integers(2)]] * rng.choice([-1.0, 1.0]) * [1, 1, 0]
    along /= np.linalg.norm(along)
    return _Move(f"Push the {{}} {direction_in_view(along, axes)}.", along, distance, steps)
