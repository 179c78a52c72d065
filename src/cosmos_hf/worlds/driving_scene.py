"""What a town looks like: style, light, blocks and cars, and the MuJoCo model built from them.

World frame: streets run along x and y at multiples of `PITCH`, z up, metres; traffic keeps to the right. The style is limited
on purpose, so that a small model can learn it; `val_style` and `val_light` have houses and a light of their own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .baking import MeshBaker
from .render import SKY, mujoco

ASSET = Path(__file__).parent / "assets" / "town.xml"
PITCH, HALF_ROAD, REACH = 44.0, 4.2, 3  # between streets; of a street's width; streets to each side of the middle
NUM_CARS = 8

# Name -> range of the houses' colours. The last is held out.
STYLES = {
    "brick": ((0.50, 0.26, 0.20), (0.72, 0.44, 0.34)),
    "sandstone": ((0.66, 0.56, 0.40), (0.86, 0.76, 0.58)),
    "pastel": ((0.62, 0.62, 0.62), (0.92, 0.88, 0.84)),
    "concrete": ((0.42, 0.43, 0.45), (0.66, 0.67, 0.69)),
    "blue-painted": ((0.24, 0.36, 0.56), (0.44, 0.58, 0.80)),
}
# Name -> sun's colour, its height (the z part of its direction), sky. The last is held out.
LIGHTS = {
    "at noon": ((0.95, 0.92, 0.86), 1.6, SKY),
    "in the morning": ((0.95, 0.82, 0.62), 0.8, (0.72, 0.82, 0.92)),
    "under a grey sky": ((0.55, 0.56, 0.58), 2.0, (0.74, 0.76, 0.78)),
    "at dusk": ((0.85, 0.46, 0.26), 0.55, (0.86, 0.62, 0.48)),
}
CARS = {
    "red": (0.78, 0.12, 0.10),
    "blue": (0.12, 0.26, 0.66),
    "white": (0.90, 0.90, 0.88),
    "black": (0.10, 0.10, 0.11),
    "silver": (0.60, 0.62, 0.65),
    "yellow": (0.92, 0.72, 0.12),
    "green": (0.14, 0.44, 0.22),
}


@dataclass(frozen=True)
class TownSpec:
    style: str
    light: str
    sun: float  # direction that it shines to, radians
    town_seed: int  # of the blocks
    parks: tuple[tuple[int, int], ...]  # blocks (i, j) from (i PITCH, j PITCH) to the next streets
    cars: tuple[str, ...]  # colours


def sample_town(rng: np.random.Generator, split: str) -> TownSpec:
    style = list(STYLES)[-1] if split == "val_style" else str(rng.choice(list(STYLES)[:-1]))
    light = list(LIGHTS)[-1] if split == "val_light" else str(rng.choice(list(LIGHTS)[:-1]))
    blocks = [(i, j) for i in range(-REACH, REACH) for j in range(-REACH, REACH)]
    parks = tuple(block for block in blocks if rng.random() < 0.2)
    cars = tuple(str(color) for color in rng.choice(list(CARS), NUM_CARS))
    return TownSpec(style, light, float(rng.uniform(0, 2 * np.pi)), int(rng.integers(2**31)), parks, cars)


def build_model(town: TownSpec, skybox: bool = False) -> "mujoco.MjModel":
    """Compile the MuJoCo model of a town, its cars as bodies that are moved by hand; deterministic."""
    spec = mujoco.MjSpec.from_file(str(ASSET))
    color, height, sky = LIGHTS[town.light]
    spec.light("sun").diffuse = color
    spec.light("sun").dir = [np.cos(town.sun), np.sin(town.sun), -height]
    spec.light("fill").dir = [-np.cos(town.sun - 0.5), -np.sin(town.sun - 0.5), -0.4]  # walls in the sun's lee
    if skybox:
        spec.add_texture(
            name="sky",
            type=mujoco.mjtTexture.mjTEXTURE_SKYBOX,
            builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
            rgb1=sky,
            rgb2=sky,
            width=64,
            height=384,
        )
    baker = MeshBaker()
    _Town(baker, town).build()
    for k, name in enumerate(town.cars):
        spec.worldbody.add_body(name=f"car{k}", mocap=True, pos=[0, 0, -50])
        _bake_car(baker, f"car{k}", CARS[name])
    baker.add_to(spec, bodies={f"car{k}": f"car{k}" for k in range(len(town.cars))})
    return spec.compile()


class _Town:
    """Streets, pavements, houses, trees and street lamps, in one mesh for each 2 x 2 blocks."""

    def __init__(self, baker: MeshBaker, town: TownSpec):
        self.baker, self.town, self.rng = baker, town, np.random.default_rng(town.town_seed)
        low, high = np.array(STYLES[town.style])
        colors = low + (high - low) * np.clip(self.rng.random((12, 1)) + self.rng.normal(0, 0.08, (12, 3)), 0, 1)
        self.facades = [baker.picture(_facade(rgb, self.rng)) for rgb in colors]
        along_x = _road()
        self.roads = baker.picture(along_x), baker.picture(along_x.transpose(1, 0, 2))
        self.crossing, self.pavement = baker.color((0.29, 0.29, 0.30)), baker.color((0.64, 0.62, 0.59))
        self.grass, self.roof = baker.color((0.30, 0.50, 0.22)), baker.color((0.40, 0.38, 0.37))
        self.bark, self.metal = baker.color((0.34, 0.24, 0.15)), baker.color((0.27, 0.27, 0.29))
        self.leaves = [baker.color((0.20, green, 0.13)) for green in (0.36, 0.43, 0.50)]

    def build(self):
        for i in range(-REACH, REACH + 1):
            for j in range(-REACH, REACH + 1):
                self._streets(i, j)
        for i in range(-REACH, REACH):
            for j in range(-REACH, REACH):
                self._block(i, j)

    def _group(self, i: int, j: int) -> str:
        return f"town{i // 2}_{j // 2}"

    def _streets(self, i: int, j: int):
        """A crossing and the streets from it along +x and +y."""
        group, x, y, half = self._group(i, j), i * PITCH, j * PITCH, PITCH / 2 - HALF_ROAD
        self.baker.floor(group, (x, y, 0.02), (HALF_ROAD, HALF_ROAD), self.crossing)
        if i < REACH:
            self.baker.floor(group, (x + PITCH / 2, y, 0.02), (half, HALF_ROAD), self.roads[0], (5, 1))
        if j < REACH:
            self.baker.floor(group, (x, y + PITCH / 2, 0.02), (HALF_ROAD, half), self.roads[1], (1, 5))

    def _block(self, i: int, j: int):
        group, centre, half = self._group(i, j), np.array([i + 0.5, j + 0.5]) * PITCH, PITCH / 2 - HALF_ROAD
        park = (i, j) in self.town.parks
        self.baker.box(group, (*centre, 0), (half - 0.3, half - 0.3, 0.12), self.pavement)
        if park:
            self.baker.box(group, (*centre, 0), (half - 2.5, half - 2.5, 0.14), self.grass)
        else:
            for side in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
                self._house(group, centre + 8.2 * np.array(side))
        for _ in range(12 if park else 5):
            edge, along = self.rng.choice([-1, 1]) * (half - 1.5), self.rng.uniform(-half + 2, half - 2)
            offset = self.rng.permutation([edge, along])
            place = centre + (self.rng.uniform(-half + 3, half - 3, 2) if park else offset)
            self._tree(group, place) if self.rng.random() < 0.75 else self._lamp(group, place)

    def _house(self, group: str, place):
        half = self.rng.uniform([5, 5, 3], [7.2, 7.2, 8])
        if self.rng.random() < 0.25:
            half[2] *= 1.7
        facade = self.facades[self.rng.integers(len(self.facades))]
        self.baker.box(group, (*place, half[2]), half, facade, tile=4.5)
        self.baker.floor(group, (*place, 2 * half[2] + 0.02), half[:2], self.roof)

    def _tree(self, group: str, place):
        size = self.rng.uniform(0.9, 1.5)
        self.baker.solid(group, "coarse cylinder", (*place, 1), (0.16, 0.16, 1), self.bark)
        leaves = self.leaves[self.rng.integers(3)]
        self.baker.solid(group, "coarse sphere", (*place, 2 + 0.8 * size), (size, size, 1.2 * size), leaves)

    def _lamp(self, group: str, place):
        self.baker.solid(group, "coarse cylinder", (*place, 2.5), (0.08, 0.08, 2.5), self.metal)
        self.baker.solid(group, "coarse sphere", (*place, 5), (0.28, 0.28, 0.28), self.baker.color((1, 0.95, 0.7)))


def _bake_car(baker: MeshBaker, group: str, rgb):
    """A car whose middle is the origin and which looks along x."""
    paint, glass, tyre = baker.color(rgb), baker.color((0.12, 0.14, 0.17)), baker.color((0.05, 0.05, 0.05))
    baker.box(group, (0, 0, 0.62), (2.1, 0.88, 0.32), paint)
    baker.box(group, (-0.2, 0, 1.18), (1.1, 0.78, 0.28), glass)
    baker.box(group, (-0.2, 0, 1.47), (0.95, 0.72, 0.04), paint)
    for side in (-1, 1):
        for end in (-1.3, 1.3):
            baker.box(group, (end, 0.82 * side, 0.33), (0.33, 0.10, 0.31), tyre)
        baker.box(group, (2.09, 0.6 * side, 0.7), (0.04, 0.2, 0.08), baker.color((1, 1, 0.85)))
        baker.box(group, (-2.09, 0.6 * side, 0.7), (0.04, 0.2, 0.08), baker.color((0.9, 0.05, 0.05)))


def _road(size: int = 64) -> np.ndarray:
    """Asphalt of a street along x, uint8 [size, size, 3]: lines at both edges and a dashed one in the middle."""
    picture = 74 + np.random.default_rng(0).normal(0, 4, (size, size, 1)).repeat(3, axis=2)
    across = (np.arange(size) + 0.5) / size
    picture[(np.abs(across - 0.05) < 0.016) | (np.abs(across - 0.95) < 0.016)] = 215
    picture[np.ix_(np.abs(across - 0.5) < 0.02, across < 0.5)] = (225, 190, 70)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _facade(rgb, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A wall with one row of windows, uint8 [size, size, 3]."""
    picture = np.array(rgb) * 255 + rng.normal(0, 4, (size, size, 1))
    windows = int(rng.integers(1, 3))
    low, high = rng.uniform(0.20, 0.30), rng.uniform(0.70, 0.80)
    up, across = (np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size * windows % 1
    inside = np.ix_((up > low) & (up < high), (across > 0.26) & (across < 0.74))
    picture[inside] = rng.uniform(0.15, 0.45) * 255 * np.array([0.8, 0.95, 1.1])
    picture[-3:] *= 0.85  # a ledge between storeys
    return np.clip(picture, 0, 255).astype(np.uint8)
