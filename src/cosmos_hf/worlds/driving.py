"""The driving world: a car with six synchronous cameras drives through a town at 5 Hz, with exact states and poses.

The car is a kinematic bicycle: a state is [x, y, yaw, speed] of its rear axle's middle (metres, radians, metres per second,
world frame of `driving_scene`), and the action between two frames is (steer, speed): the front wheels' angle in radians, left
positive, and the speed, both held for that step. So actions lead to the states exactly (`advance`).
"""

from dataclasses import asdict, dataclass

import numpy as np

from .driving_scene import HALF_ROAD, LIGHTS, NUM_CARS, PITCH, REACH, TownSpec, build_model, sample_town
from .render import SegmentationRenderer, aim_camera, make_renderer, mujoco

VERSION = 1  # of the simulated content: raised when equal arguments give other clips
SPLITS = ("train", "val_iid", "val_style", "val_light", "val_counterfactual")
FPS, HEIGHT, WIDTH, NUM_FRAMES, FOV_Y = 5, 64, 96, 17, 62.0
KINDS = {"straight": 0.4, "left": 0.2, "right": 0.2, "stop": 0.1, "start": 0.1}
PLANS = ("straight", "left", "right", "stop")  # of the counterfactual split, from one start
# View -> where the camera is in the car (x to the front from the rear axle, y to the left, z up) and its azimuth, degrees.
VIEWS = {
    "front": ((2.2, 0.0, 1.6), 0),
    "left": ((1.7, 0.8, 1.5), 58),
    "right": ((1.7, -0.8, 1.5), -58),
    "back": ((-0.9, 0.0, 1.5), 180),
    "back_left": ((0.6, 0.8, 1.5), 122),
    "back_right": ((0.6, -0.8, 1.5), -122),
}
WHEELBASE, MAX_STEER = 2.7, 0.60
_LANE = HALF_ROAD / 2
_TILT = 0.06  # of the cameras, downwards, radians
_AWAY = 900.0  # metres: where cars are that are not there
_CAR_MIDDLE = 1.35  # of a car's body before its rear axle
_DOES = {
    "straight": "drives straight on",
    "left": "turns left at a crossing",
    "right": "turns right at a crossing",
    "stop": "slows down and stops",
    "start": "starts to drive",
}


@dataclass
class DrivingEpisode:
    """One clip of T frames and V views."""

    scene: TownSpec
    kind: str
    caption: str
    view_captions: dict[str, str]
    frames: dict[str, np.ndarray]  # view -> uint8 [T, H, W, 3]
    states: np.ndarray  # [T, 4]
    actions: np.ndarray  # [T - 1, 2]
    car_states: np.ndarray  # [T, N, 3] x, y, yaw of the middle of the other cars
    intrinsics: np.ndarray  # [V, 3, 3]
    extrinsics: np.ndarray  # [V, T, 4, 4] world to camera, OpenCV axes
    masks: np.ndarray | None = None  # uint8 [V, T, H, W]: 0 town, 1 + k car k
    plan: str | None = None

    def videos(self) -> dict[str, np.ndarray]:
        return self.frames

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("actions", "states", "car_states", "intrinsics", "extrinsics")
        arrays = {name: getattr(self, name).astype(np.float32) for name in names}
        return arrays | ({} if self.masks is None else {"masks": self.masks})

    def record(self) -> dict:
        told = {name: getattr(self, name) for name in ("caption", "view_captions", "kind", "plan")}
        return told | {"scene": asdict(self.scene)}


def advance(state: np.ndarray, action: np.ndarray, seconds: float = 1 / FPS) -> np.ndarray:
    """The state [4] after an action [2] (steer, speed): an arc, in closed form."""
    (x, y, yaw, _), (steer, speed) = state, action
    turn = speed * np.tan(steer) / WHEELBASE * seconds
    chord = speed * seconds * np.sinc(turn / 2 / np.pi)  # np.sinc(v) is sin(pi v) / (pi v)
    return np.array([x + chord * np.cos(yaw + turn / 2), y + chord * np.sin(yaw + turn / 2), yaw + turn, speed])


def simulate(
    split: str, index: int, seed: int = 0, renderer: str | None = "filament", truth: bool = False, views=tuple(VIEWS)
) -> DrivingEpisode:
    """Clip `index` of a split, a pure function of its arguments but for Filament's dithering (`render.restart_filament`).

    `renderer`: "filament", "classic", or None for no pictures (frames of zeros). `truth`: render the segmentation too.
    """
    plan, scene_index = None, index
    if split == "val_counterfactual":
        scene_index, number = divmod(index, len(PLANS))
        plan = PLANS[number]
    rng = np.random.default_rng([seed, *b"driving", *split.encode(), scene_index])
    town = sample_town(rng, split)
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    node, heading = rng.integers(-1, 2, 2), int(rng.integers(4))
    away, speed = rng.uniform(9, 14), rng.uniform(4.5, 6.5)
    cruise = rng.uniform(5, 8.5)
    if plan is None and kind in ("straight", "stop", "start"):
        away = rng.uniform(6, PITCH - 10)
        speed = 0.0 if kind == "start" else cruise
    kind = plan or kind
    # The plans of one start share their traffic, so it keeps clear of all of them.
    drives = {
        way: _drive(_Route(node, heading, way), away, speed, cruise, way) for way in (PLANS if plan else (kind,))
    }
    states, actions = drives[kind]
    car_states = _traffic(rng, node, [path for path, _ in drives.values()])
    extrinsics = np.stack([[camera_pose(state, view) for state in states] for view in views])
    frames, masks = _render(town, extrinsics, car_states, renderer, truth, views)
    visible = [_cars_in_view(pose[0], car_states[0]) for pose in extrinsics]
    return DrivingEpisode(
        scene=town,
        kind=kind,
        caption=_describe(town, kind, states, visible[0] if views[0] == "front" else []),
        view_captions={
            view: _describe_view(town, view, pose[0], cars)
            for view, pose, cars in zip(views, extrinsics, visible, strict=True)
        },
        frames=frames,
        states=states,
        actions=actions,
        car_states=car_states,
        intrinsics=np.repeat(intrinsics()[None], len(views), axis=0),
        extrinsics=extrinsics,
        masks=masks,
        plan=plan,
    )


def intrinsics() -> np.ndarray:
    focal = HEIGHT / 2 / np.tan(np.radians(FOV_Y) / 2)
    return np.array([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])


def camera_pose(state: np.ndarray, view: str) -> np.ndarray:
    """World to camera [4, 4] of a view, for a state of the car."""
    (place, azimuth), (x, y, yaw) = VIEWS[view], state[:3]
    cosine, sine = np.cos(yaw), np.sin(yaw)
    eye = np.array([x + cosine * place[0] - sine * place[1], y + sine * place[0] + cosine * place[1], place[2]])
    angle = yaw + np.radians(azimuth)
    forward = np.array([np.cos(angle) * np.cos(_TILT), np.sin(angle) * np.cos(_TILT), -np.sin(_TILT)])
    right = np.array([np.sin(angle), -np.cos(angle), 0])
    pose = np.eye(4)
    pose[:3, :3] = right, np.cross(forward, right), forward
    pose[:3, 3] = -pose[:3, :3] @ eye
    return pose


class _Route:
    """The middle of the lane towards a crossing and on from it, as points every 0.25 m."""

    def __init__(self, node, heading: int, kind: str):
        along, left = _direction(heading), _direction(heading + 1)
        centre = np.asarray(node) * PITCH
        entry = centre - _LANE * left  # right-hand traffic: the lane is to the right of the street's middle
        straight = np.arange(-PITCH, 60, 0.25)
        self.points = entry + straight[:, None] * along
        if kind in ("left", "right"):
            sign, radius = (1, 7.0) if kind == "left" else (-1, 4.6)
            out = sign * left
            exit_line = centre + sign * _LANE * along  # right-hand lane of the street that is left on
            ahead = (exit_line - entry) @ along  # where both lanes' middles cross
            corner = entry + ahead * along
            before = entry + np.arange(-PITCH, ahead - radius, 0.25)[:, None] * along
            turn = np.arange(0, np.pi / 2, 0.25 / radius)[:, None]
            arc = corner - radius * along + radius * out + radius * (np.sin(turn) * along - np.cos(turn) * out)
            after = corner + np.arange(radius, 60, 0.25)[:, None] * out
            self.points = np.concatenate([before, arc, after])
        self.start = np.concatenate([entry, [np.arctan2(along[1], along[0])]])
        self.along = along

    def begin(self, away: float) -> np.ndarray:
        """State [3] in the lane, `away` metres before the crossing's middle."""
        return np.array([*(self.start[:2] - away * self.along), self.start[2]])

    def steer(self, state: np.ndarray, lookahead: float) -> float:
        """Pure pursuit of the point that lies `lookahead` metres ahead."""
        distance = np.linalg.norm(self.points - state[:2], axis=1)
        nearest = int(distance.argmin())
        far = np.nonzero(distance[nearest:] > lookahead)[0]
        target = self.points[nearest + far[0]] - state[:2]
        across = -np.sin(state[2]) * target[0] + np.cos(state[2]) * target[1]
        return float(np.clip(np.arctan(2 * WHEELBASE * across / (target @ target)), -MAX_STEER, MAX_STEER))


def _direction(heading: int) -> np.ndarray:
    return np.array([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)][heading % 4])


def _drive(route: _Route, away: float, speed: float, cruise: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """States [T, 4] and actions [T - 1, 2]."""
    states, actions = [np.array([*route.begin(away), speed])], []
    for step in range(NUM_FRAMES - 1):
        now = states[-1]
        if kind == "stop":
            wanted = now[3] if step < 3 else max(0.0, now[3] - 2.6 / FPS)
        elif kind in ("left", "right"):
            wanted = 4.2 if kind == "left" else 3.6
        else:
            wanted = cruise
        reached = now[3] + np.clip(wanted - now[3], -3.0 / FPS, 2.2 / FPS)
        steer = route.steer(now, 3.0 + 0.25 * reached)
        actions.append(np.array([steer, reached]))
        states.append(advance(now, actions[-1]))
    return np.array(states), np.array(actions)


def _traffic(rng: np.random.Generator, node, drives: list[np.ndarray]) -> np.ndarray:
    """Other cars [T, N, 3], straight along their lanes; those that would come near any of the drives [T, 4] (which share their
    start) or each other stay away."""
    times, start_state = np.arange(NUM_FRAMES) / FPS, drives[0][0]
    taken = [path[:, :2] + _CAR_MIDDLE * np.stack([np.cos(path[:, 2]), np.sin(path[:, 2])], axis=1) for path in drives]
    cars = []
    for number in range(NUM_CARS):
        heading = int(rng.integers(4))
        along, left = _direction(heading), _direction(heading + 1)
        place = np.clip(node + rng.integers(-1, 2, 2), -REACH, REACH) * PITCH - _LANE * left
        start, speed = rng.uniform(-34, 30), rng.uniform(2.5, 8)
        if number < 2 and rng.random() < 0.6:  # someone before or towards the car
            ahead = np.array([np.cos(start_state[2]), np.sin(start_state[2])])
            along = ahead if number == 0 else -ahead
            left = np.array([-along[1], along[0]])
            offset = (start_state[:2] - np.asarray(node) * PITCH) @ along
            place = np.asarray(node) * PITCH - _LANE * left
            gap = rng.uniform(10, 20) if number == 0 else rng.uniform(-34, -16)
            start, speed = offset + gap, rng.uniform(3.5, 8)
        path = place + (start + speed * times)[:, None] * along
        near = min(np.linalg.norm(path - other, axis=1).min() for other in taken)
        if near < 6.0 or np.abs(path).max() > REACH * PITCH:
            path = np.full((NUM_FRAMES, 2), _AWAY)
        else:
            taken.append(path)
        cars.append(np.c_[path, np.full(NUM_FRAMES, np.arctan2(along[1], along[0]))])
    return np.stack(cars, axis=1)


def _render(town: TownSpec, extrinsics: np.ndarray, car_states: np.ndarray, renderer: str | None, truth: bool, views):
    frames = np.zeros((NUM_FRAMES, len(views), HEIGHT, WIDTH, 3), np.uint8)
    masks = []
    if renderer is None and not truth:
        return {view: frames[:, v] for v, view in enumerate(views)}, None
    model = build_model(town, skybox=renderer == "classic")
    data = mujoco.MjData(model)
    sky = LIGHTS[town.light][2]
    take = make_renderer(renderer, model, HEIGHT, WIDTH, len(views), sky).render_views if renderer else None
    segment = SegmentationRenderer(model, HEIGHT, WIDTH).render if truth else None
    class_of_geom = np.array([_class_of(model.geom(i).name) for i in range(model.ngeom)] + [0], np.uint8)
    for t in range(NUM_FRAMES):
        for v, view in enumerate(views):
            aim_camera(model, view, extrinsics[v, t])
        for k, (x, y, yaw) in enumerate(car_states[t]):
            index = model.body(f"car{k}").mocapid[0]
            data.mocap_pos[index], data.mocap_quat[index] = (x, y, 0), (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        mujoco.mj_forward(model, data)
        if take:
            frames[t] = take(data, views)
        if segment:
            masks.append([class_of_geom[segment(data, view)] for view in views])
    videos = {view: frames[:, v] for v, view in enumerate(views)}
    return videos, np.array(masks).transpose(1, 0, 2, 3) if truth else None


def _class_of(geom: str) -> int:
    return 1 + int(geom.removeprefix("car")) if geom.startswith("car") else 0


def _cars_in_view(pose: np.ndarray, cars: np.ndarray) -> list[tuple[float, int]]:
    """(distance, number) of the cars [N, 3] whose middle a camera sees within 35 m, the nearest first."""
    seen = []
    for k, (x, y, _) in enumerate(cars):
        across, _, depth = pose[:3, :3] @ [x, y, 0.8] + pose[:3, 3]
        if 2 < depth < 35 and abs(across / depth) * intrinsics()[0, 0] < WIDTH / 2:
            seen.append((float(depth), k))
    return sorted(seen)


def _describe(town: TownSpec, kind: str, states: np.ndarray, ahead: list[tuple[float, int]]) -> str:
    """One sentence: where, what the car does, and who is before it."""
    text = f"A car {_DOES[kind]} in a town of {town.style} houses {town.light}"
    return text + (f", with a {town.cars[ahead[0][1]]} car ahead." if ahead else ".")


def _describe_view(town: TownSpec, view: str, pose: np.ndarray, cars: list[tuple[float, int]]) -> str:
    eye = -pose[:3, :3].T @ pose[:3, 3]
    look = eye[:2] + 16 * pose[2, :2] / np.linalg.norm(pose[2, :2])
    place = look / PITCH - np.floor(look / PITCH)
    edge = HALF_ROAD / PITCH
    if min(place.min(), 1 - place.max()) < edge:
        what = "the street"
    else:
        what = "a park" if tuple(int(n) for n in np.floor(look / PITCH)) in town.parks else f"{town.style} houses"
    others = "".join(f" and a {town.cars[k]} car" for _, k in cars[:1])
    return f"The {view.replace('_', ' ')} camera sees {what}{others}."
