"""What a table-top episode looks like: style, objects, camera, and the MuJoCo model built from them.

The style is limited on purpose (a handful of tables, walls and arm colours, three camera bands), so that a small model
can learn it; held-out splits leave out named colour-shape pairs, one table and wall, and one camera band.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .render import mujoco

ASSETS = Path(__file__).parent / "assets" / "vx300s"

COLORS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.12, 0.65, 0.2),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.8, 0.1),
    "orange": (0.95, 0.45, 0.08),
    "purple": (0.5, 0.15, 0.7),
    "pink": (0.95, 0.5, 0.7),
    "cyan": (0.1, 0.75, 0.8),
}
SHAPES = {"cube": "box", "cylinder": "cylinder", "ball": "sphere"}
HELD_OUT_PAIRS = {("purple", "cube"), ("orange", "cylinder"), ("cyan", "ball"), ("yellow", "cube")}

# Name -> pattern and two colours. The last of each is held out.
TABLES = {
    "light wood": ("wood", (0.80, 0.62, 0.42), (0.66, 0.48, 0.30)),
    "dark wood": ("wood", (0.50, 0.34, 0.22), (0.36, 0.24, 0.15)),
    "grey cloth": ("noise", (0.62, 0.63, 0.65), (0.52, 0.53, 0.56)),
    "white tiles": ("tiles", (0.86, 0.86, 0.84), (0.66, 0.68, 0.70)),
    "green felt": ("noise", (0.34, 0.58, 0.44), (0.28, 0.50, 0.38)),
    "blue checks": ("checks", (0.62, 0.72, 0.84), (0.50, 0.60, 0.76)),
    "marble": ("marble", (0.85, 0.80, 0.78), (0.60, 0.50, 0.52)),
}
WALLS = {
    "cream": ("noise", (0.86, 0.82, 0.72), (0.82, 0.78, 0.68)),
    "grey blue": ("noise", (0.56, 0.64, 0.72), (0.52, 0.60, 0.68)),
    "stripes": ("stripes", (0.78, 0.76, 0.74), (0.70, 0.68, 0.68)),
    "sage": ("noise", (0.62, 0.70, 0.60), (0.58, 0.66, 0.56)),
    "terracotta": ("tiles", (0.76, 0.48, 0.38), (0.62, 0.40, 0.34)),
}
ARMS = {"silver": (0.66, 0.67, 0.70), "black": (0.16, 0.17, 0.19), "white": (0.88, 0.88, 0.86)}
FINGERS = {"silver": (0.08, 0.08, 0.09), "black": (0.95, 0.5, 0.1), "white": (0.1, 0.1, 0.12)}
AZIMUTHS = (-1.1, -0.45, 0.75)  # radians around the vertical, 0 faces the robot
HELD_OUT_AZIMUTH = 1.3


@dataclass(frozen=True)
class ObjectSpec:
    color: str
    shape: str
    size: float  # half of the side, or the radius, in metres
    position: tuple[float, float]  # on the table, metres
    yaw: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class SceneSpec:
    table: str
    wall: str
    arm: str
    azimuth: float
    elevation: float
    distance: float
    look_at: tuple[float, float, float]
    lamp: tuple[float, float, float]
    objects: tuple[ObjectSpec, ...]


def sample_scene(rng: np.random.Generator, split: str) -> SceneSpec:
    """Draw a scene of a split; `val_combo` has a held-out pair as its first object, `val_style` and `val_view` their own."""
    seen = list(TABLES)[:-1], list(WALLS)[:-1]
    table, wall = (names[rng.integers(len(names))] for names in seen)
    if split == "val_style":
        table, wall = list(TABLES)[-1], list(WALLS)[-1]
    azimuth = HELD_OUT_AZIMUTH if split == "val_view" else AZIMUTHS[rng.integers(len(AZIMUTHS))]
    return SceneSpec(
        table=table,
        wall=wall,
        arm=list(ARMS)[rng.integers(len(ARMS))],
        azimuth=float(azimuth + rng.uniform(-0.087, 0.087)),
        elevation=float(rng.uniform(0.60, 0.70)),
        distance=float(rng.uniform(0.64, 0.70)),
        look_at=tuple(float(v) for v in np.array([-0.02, 0, 0.08]) + rng.uniform(-0.015, 0.015, 3)),
        lamp=tuple(float(v) for v in rng.uniform([-0.3, -0.4, 1.2], [0.5, 0.4, 1.5])),
        objects=_sample_objects(rng, split),
    )


def _sample_objects(rng: np.random.Generator, split: str) -> tuple[ObjectSpec, ...]:
    count = int(rng.integers(1, 4))
    colors = list(rng.permutation(list(COLORS)))
    names = list(SHAPES)
    held_out = sorted(HELD_OUT_PAIRS)[rng.integers(len(HELD_OUT_PAIRS))] if split == "val_combo" else None
    objects, places = [], []
    for i in range(count):
        if i == 0 and held_out:
            color, shape = held_out
            colors.remove(color)
        else:
            color = str(colors.pop())
            shape = names[rng.integers(len(names))]
            while (color, shape) in HELD_OUT_PAIRS:
                shape = names[rng.integers(len(names))]
        place = _free_place(rng, places)
        places.append(place)
        objects.append(
            ObjectSpec(color, shape, float(rng.uniform(0.025, 0.031)), tuple(place), float(rng.uniform(0, np.pi / 2)))
        )
    return tuple(objects)


def _free_place(rng: np.random.Generator, taken: list) -> np.ndarray:
    """A place on the table at least 11 cm from the others; the area is large enough for three."""
    while True:
        place = rng.uniform([-0.01, -0.17], [0.19, 0.17])
        if all(np.linalg.norm(place - other) > 0.11 for other in taken):
            return place


def camera_pose(scene: SceneSpec) -> tuple[np.ndarray, np.ndarray]:
    """Camera centre [3] and its axes [3, 3] as rows right, down, forward (OpenCV) in world coordinates."""
    direction = np.array(
        [
            np.cos(scene.azimuth) * np.cos(scene.elevation),
            np.sin(scene.azimuth) * np.cos(scene.elevation),
            np.sin(scene.elevation),
        ]
    )
    eye = np.array(scene.look_at) + scene.distance * direction
    forward = -direction
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    return eye, np.stack([right, np.cross(forward, right), forward])


def build_model(scene: SceneSpec) -> mujoco.MjModel:
    """Compile the MuJoCo model of a scene; deterministic."""
    spec = mujoco.MjSpec.from_file(str(ASSETS / "tabletop.xml"))
    for name, (pattern, light, dark) in (
        ("table", TABLES[scene.table]),
        ("wall", WALLS[scene.wall]),
        ("floor", ("noise", (0.45, 0.42, 0.40), (0.38, 0.36, 0.34))),
    ):
        spec.texture(name).data = paint(pattern, light, dark).tobytes()
    spec.material("arm").rgba = [*ARMS[scene.arm], 1]
    spec.material("finger").rgba = [*FINGERS[scene.arm], 1]

    eye, (right, down, _) = camera_pose(scene)
    camera, up = spec.camera("main"), -down
    rotation = np.stack([right, up, np.cross(right, up)], axis=1)  # MuJoCo looks along -z
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, rotation.flatten())
    camera.pos, camera.quat = eye, quat
    spec.geom("wall_side").pos = [0, -1.3 if eye[1] > 0 else 1.3, 0.4]
    lamp = np.array(scene.lamp)
    spec.light("lamp").pos, spec.light("lamp").dir = lamp, -lamp * [0.8, 0.8, 1]

    for i, thing in enumerate(scene.objects):
        _add_object(spec, f"object{i}", thing)
    return spec.compile()


def _add_object(spec: mujoco.MjSpec, name: str, thing: ObjectSpec):
    height = thing.size * (1.2 if thing.shape == "cylinder" else 1)
    body = spec.worldbody.add_body(name=name, pos=[*thing.position, height + 0.002])
    body.quat = [np.cos(thing.yaw / 2), 0, 0, np.sin(thing.yaw / 2)]
    body.add_freejoint()
    body.add_geom(
        type=getattr(mujoco.mjtGeom, f"mjGEOM_{SHAPES[thing.shape].upper()}"),
        size=[thing.size, height if thing.shape == "cylinder" else thing.size, thing.size],
        rgba=[*COLORS[thing.color], 1],
        mass=0.06,
        friction=[1, 0.02, 0.003],
        condim=4,
        solref=[0.01, 1],
    )


def paint(pattern: str, light, dark, size: int = 128) -> np.ndarray:
    """A texture uint8 [size, size, 3] that mixes two colours; the same arguments give the same texture."""
    rng = np.random.default_rng([ord(c) for c in pattern])
    y, x = np.mgrid[0:size, 0:size] / size
    if pattern == "wood":
        mix = 0.5 + 0.5 * np.sin((x * 6 + 1.5 * value_noise(size, 3, rng)) * 2 * np.pi)
        mix = 0.6 * mix + 0.4 * value_noise(size, 24, rng)
    elif pattern == "checks":
        mix = (np.floor(x * 6) + np.floor(y * 6)) % 2
    elif pattern == "tiles":
        mix = 0.8 * ((x * 5 % 1 < 0.06) | (y * 5 % 1 < 0.06)) + 0.2 * value_noise(size, 8, rng)
    elif pattern == "stripes":
        mix = (np.sin(x * 2 * np.pi * 6) > 0) * 1.0
    elif pattern == "marble":
        mix = np.abs(np.sin((x * 3 + 3 * value_noise(size, 4, rng)) * np.pi)) ** 0.5
    elif pattern == "noise":
        mix = value_noise(size, 5, rng)
    else:
        raise ValueError(f"unknown pattern {pattern!r}")
    mix = mix[..., None]
    return np.clip((np.array(light) * (1 - mix) + np.array(dark) * mix) * 255, 0, 255).astype(np.uint8)


def value_noise(size: int, cells: int, rng: np.random.Generator, octaves: int = 4) -> np.ndarray:
    """Smooth noise [size, size] in [0, 1]: random grids, each twice as fine and half as strong, enlarged and summed."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        grid = Image.fromarray(rng.random((cells * 2**octave,) * 2).astype(np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / 2**octave
    return (total - total.min()) / (np.ptp(total) + 1e-9)
