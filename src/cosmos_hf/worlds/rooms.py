"""The rooms world: a camera moves through a furnished room at 10 Hz, with exact poses and depth. Nothing else moves.

World frame: the floor's centre is the origin, z up, metres. Cameras are those of `conditioning.camera`.
"""

from dataclasses import asdict, dataclass

import numpy as np

from ..conditioning.camera_paths import joystick_path, named_trajectory
from .render import DepthRenderer, aim_camera, make_renderer, mujoco
from .rooms_scene import HEIGHT as CEILING
from .rooms_scene import RoomSpec, build_model, sample_room

VERSION = 1  # of the simulated content: raised when equal arguments give other clips
SPLITS = ("train", "val_iid", "val_style", "val_trajectory", "val_counterfactual")
FPS, HEIGHT, WIDTH, NUM_FRAMES = 10, 96, 128, 33
MOST_ROOMS = 50  # that are tried for a clip
# What the camera does and how often; "wander" is a smooth random joystick.
KINDS = {
    "dolly_in": 0.1,
    "dolly_out": 0.07,
    "truck_left": 0.07,
    "truck_right": 0.07,
    "pan_left": 0.06,
    "pan_right": 0.06,
    "orbit_left": 0.07,
    "orbit_right": 0.07,
    "pedestal_up": 0.04,
    "pedestal_down": 0.04,
    "wander": 0.35,
}
HELD_OUT_KINDS = ("swerve", "orbit_up")  # of val_trajectory
PLANS = ("dolly_in", "pan_left", "pan_right", "truck_right")  # of the counterfactual split, from one start

_SAID = {
    "dolly_in": "moves forward",
    "dolly_out": "moves back",
    "truck_left": "slides to the left",
    "truck_right": "slides to the right",
    "pan_left": "turns to the left",
    "pan_right": "turns to the right",
    "orbit_left": "circles to the left",
    "orbit_right": "circles to the right",
    "orbit_up": "rises and tilts down",
    "pedestal_up": "rises",
    "pedestal_down": "sinks",
    "swerve": "moves forward in a curve",
}
_CLEARANCE = 0.35  # metres between the camera and anything


@dataclass
class RoomEpisode:
    """One clip of T frames."""

    scene: RoomSpec
    kind: str
    caption: str
    frames: np.ndarray  # uint8 [T, H, W, 3]
    intrinsics: np.ndarray  # [3, 3] pixels; a pixel's centre is at + 0.5
    extrinsics: np.ndarray  # [T, 4, 4] world to camera, OpenCV axes
    depth: np.ndarray | None = None  # float16 [T, H, W], metres along the camera's axis
    plan: str | None = None  # counterfactual split only

    def videos(self) -> dict[str, np.ndarray]:
        return {"": self.frames}

    def arrays(self) -> dict[str, np.ndarray]:
        cameras = dict(intrinsics=self.intrinsics.astype(np.float32), extrinsics=self.extrinsics.astype(np.float32))
        return cameras | ({} if self.depth is None else {"depth": self.depth})

    def record(self) -> dict:
        return dict(caption=self.caption, kind=self.kind, plan=self.plan, scene=asdict(self.scene))


def simulate(
    split: str, index: int, seed: int = 0, renderer: str | None = "filament", truth: bool = False
) -> RoomEpisode:
    """Clip `index` of a split, a pure function of its arguments but for Filament's dithering (`render.restart_filament`).

    `renderer`: "filament", "classic", or None for no pictures (frames of zeros). `truth`: render depth too.
    """
    plan, scene_index = None, index
    if split == "val_counterfactual":
        scene_index, number = divmod(index, len(PLANS))
        plan = PLANS[number]
    rng = np.random.default_rng([seed, *b"rooms", *split.encode(), scene_index])
    scene = sample_room(rng, split)
    if plan is None:
        names = HELD_OUT_KINDS if split == "val_trajectory" else tuple(KINDS)
        shares = None if split == "val_trajectory" else list(KINDS.values())
        kinds = (str(rng.choice(names, p=shares)),)
    else:
        kinds = PLANS
    tries = 1
    while (paths := _sample_paths(rng, scene, kinds)) is None:  # about one room in a hundred is too full
        if tries == MOST_ROOMS:
            raise RuntimeError(
                f"no free way of the kinds {kinds} in {tries} rooms: are the rooms too small for their furniture?"
            )
        scene, tries = sample_room(rng, split), tries + 1
    kind = plan or kinds[0]
    extrinsics = paths[kinds.index(kind)]
    frames, depth = _render(scene, extrinsics, renderer, truth)
    return RoomEpisode(
        scene=scene,
        kind=kind,
        caption=describe(scene, kind, extrinsics),
        frames=frames,
        intrinsics=intrinsics(scene),
        extrinsics=extrinsics,
        depth=depth,
        plan=plan,
    )


def intrinsics(scene: RoomSpec) -> np.ndarray:
    focal = HEIGHT / 2 / np.tan(np.radians(scene.fov) / 2)
    return np.array([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])


def _render(scene: RoomSpec, extrinsics: np.ndarray, renderer: str | None, truth: bool):
    frames, depth = np.zeros((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8), []
    if renderer is None and not truth:
        return frames, None
    model = build_model(scene)
    data = mujoco.MjData(model)
    take = make_renderer(renderer, model, HEIGHT, WIDTH).render if renderer else None
    measure = DepthRenderer(model, HEIGHT, WIDTH).render if truth else None
    for t, pose in enumerate(extrinsics):
        aim_camera(model, "main", pose)
        mujoco.mj_forward(model, data)
        if take:
            frames[t] = take(data, "main")
        if measure:
            depth.append(measure(data, "main").astype(np.float16))
    return frames, np.array(depth) if truth else None


def _sample_paths(rng: np.random.Generator, scene: RoomSpec, kinds: tuple[str, ...]) -> list[np.ndarray] | None:
    """Ways of all `kinds` [T, 4, 4] from one start, none of which comes near anything; None where none are found."""
    for _ in range(2000):
        start = _sample_start(rng, scene)
        paths = [_motion(rng, kind) @ start for kind in kinds]
        if all(_is_free(scene, path) for path in paths):
            return paths
    return None


def _sample_start(rng: np.random.Generator, scene: RoomSpec) -> np.ndarray:
    """A first camera [4, 4] that looks across the room."""
    place = rng.uniform(-1, 1, 2) * (scene.half_length - _CLEARANCE, scene.half_width - _CLEARANCE)
    eye = np.array([*place, rng.uniform(0.9, 1.6)])
    yaw = np.arctan2(-place[1], -place[0]) + rng.uniform(-0.7, 0.7)
    pitch = rng.uniform(-0.28, 0.02)
    forward = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0])
    pose = np.eye(4)
    pose[:3, :3] = right, np.cross(forward, right), forward
    pose[:3, 3] = -pose[:3, :3] @ eye
    return pose


def _motion(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A way relative to its start [T, 4, 4]."""
    steps = NUM_FRAMES - 1
    if kind == "wander":
        targets = rng.normal(0, 1, (5, 6)) * (0.015, 0.006, 0.025, 0.9, 0.3, 0.0)
        return joystick_path(_smooth(targets, steps)).numpy()
    if kind == "swerve":  # an S: ahead, turning to one side and then to the other
        side, speed = rng.choice([-1, 1]), rng.uniform(0.02, 0.035)
        turn = side * rng.uniform(1.0, 1.8) * np.cos(np.linspace(0, 2 * np.pi, steps))
        zero = np.zeros(steps)
        return joystick_path(np.stack([zero, zero, zero + speed, turn, zero, zero], axis=1)).numpy()
    settings = dict(distance=rng.uniform(0.5, 1.3), angle=rng.uniform(22, 50), depth=rng.uniform(1.5, 2.5))
    if kind.startswith("pedestal"):
        settings["distance"] *= 0.5
    return named_trajectory(kind, NUM_FRAMES, **settings).numpy()


def _smooth(targets: np.ndarray, steps: int) -> np.ndarray:
    """Values [N, 6] at equal distances -> [steps, 6], going over between them without a jump."""
    place = np.linspace(0, len(targets) - 1, steps)
    low = np.minimum(place.astype(int), len(targets) - 2)
    part = (place - low)[:, None]
    part = part * part * (3 - 2 * part)
    return (1 - part) * targets[low] + part * targets[low + 1]


def _is_free(scene: RoomSpec, extrinsics: np.ndarray) -> bool:
    """Whether all cameras keep their distance to walls and furniture, and have something to see before them."""
    axes = extrinsics[:, :3, :3]
    eyes = -(axes.transpose(0, 2, 1) @ extrinsics[:, :3, 3:])[..., 0]
    x, y, z = np.abs(eyes[:, 0]), np.abs(eyes[:, 1]), eyes[:, 2]
    if x.max() > scene.half_length - _CLEARANCE or y.max() > scene.half_width - _CLEARANCE:
        return False
    if z.min() < 0.5 or z.max() > CEILING - 0.4:
        return False
    ahead = eyes[:, :2] + 1.1 * axes[:, 2, :2]  # no wall straight before the lens
    if (np.abs(ahead) > (scene.half_length, scene.half_width)).any():
        return False
    for piece in scene.pieces:
        away = np.array(piece.position) - eyes[:, :2]
        near = np.hypot(*away.T) - piece.radius
        ahead = away[0] @ axes[0, 2, :2] > 0.5 * np.hypot(*away[0])
        if near.min() < _CLEARANCE or (ahead and near[0] < 0.8):  # nothing may fill the first picture
            return False
    return True


def describe(scene: RoomSpec, kind: str, extrinsics: np.ndarray) -> str:
    """One sentence: the room, up to three pieces that the first frame shows, and what the camera does."""
    seen = []
    for piece in scene.pieces:
        x, y, depth = extrinsics[0, :3, :3] @ [*piece.position, 0.4] + extrinsics[0, :3, 3]
        focal = HEIGHT / 2 / np.tan(np.radians(scene.fov) / 2)
        if depth > 0.5 and abs(x / depth * focal) < WIDTH / 2 and abs(y / depth * focal) < HEIGHT / 2:
            seen.append((depth, piece.name))
    names = list(dict.fromkeys(name for _, name in sorted(seen)))[:3]
    things = [f"a {name}" for name in names]
    inside = f" with {', '.join(things[:-1])}{' and ' if things[1:] else ''}{things[-1]}" if things else ""
    room = f"A room with {scene.wall} walls and a {scene.floor} floor"
    return f"{room}{inside.replace(' with ', ', ', 1)}. The camera {_SAID.get(kind) or _said_of(extrinsics)}."


def _said_of(extrinsics: np.ndarray) -> str:
    """Words for a free way: its net motion and turn in the first camera's axes."""
    relative = extrinsics[-1] @ np.linalg.inv(extrinsics[0])
    right, down, forward = -relative[:3, :3].T @ relative[:3, 3]
    turn = np.degrees(np.arctan2(relative[2, 0], relative[2, 2]))
    words = []
    if max(abs(right), abs(forward)) > 0.15:
        if abs(forward) >= abs(right):
            words.append("moves forward" if forward > 0 else "moves back")
        else:
            words.append("slides to the right" if right > 0 else "slides to the left")
    if abs(turn) > 8:
        words.append("turns to the right" if turn > 0 else "turns to the left")
    return " and ".join(words) or "hardly moves"
