"""What a room looks like: style, furniture, lens, and the MuJoCo model built from them.

World frame: the floor's centre is the origin, z up, metres. The style is limited on purpose, so that a small model can learn
it; `val_style` has a wall, a floor and a furniture colour of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .baking import MeshBaker
from .render import mujoco
from .tabletop_scene import paint

ASSET = Path(__file__).parent / "assets" / "rooms.xml"
HEIGHT = 2.6  # of the ceiling

# Name -> pattern and two colours. The last of each is held out.
WALLS = {
    "cream": ("noise", (0.90, 0.86, 0.76), (0.86, 0.82, 0.72)),
    "pale blue": ("noise", (0.72, 0.80, 0.88), (0.68, 0.76, 0.84)),
    "pale green": ("noise", (0.76, 0.84, 0.74), (0.72, 0.80, 0.70)),
    "striped": ("stripes", (0.88, 0.84, 0.80), (0.78, 0.76, 0.76)),
    "white": ("noise", (0.92, 0.92, 0.90), (0.88, 0.88, 0.87)),
    "pink": ("noise", (0.88, 0.72, 0.72), (0.84, 0.68, 0.68)),
}
FLOORS = {
    "light wood": ("wood", (0.80, 0.62, 0.42), (0.68, 0.50, 0.32)),
    "dark wood": ("wood", (0.56, 0.40, 0.28), (0.44, 0.30, 0.20)),
    "grey carpet": ("noise", (0.60, 0.60, 0.62), (0.50, 0.50, 0.53)),
    "white tile": ("tiles", (0.86, 0.86, 0.84), (0.62, 0.64, 0.66)),
    "checkered": ("checks", (0.82, 0.80, 0.76), (0.36, 0.38, 0.42)),
}
COLORS = {
    "red": (0.78, 0.20, 0.18),
    "blue": (0.20, 0.36, 0.74),
    "green": (0.25, 0.56, 0.32),
    "yellow": (0.90, 0.74, 0.22),
    "white": (0.88, 0.87, 0.84),
    "brown": (0.56, 0.38, 0.24),
    "grey": (0.48, 0.50, 0.53),
    "purple": (0.52, 0.32, 0.66),
}
# Radius of the floor that a piece takes, metres, and whether it stands at a wall.
FURNITURE = {
    "sofa": (0.95, True),
    "bed": (1.10, True),
    "bookcase": (0.55, True),
    "cupboard": (0.50, True),
    "table": (0.65, False),
    "round table": (0.50, False),
    "chair": (0.32, False),
    "plant": (0.32, False),
    "lamp": (0.28, False),
    "ball": (0.28, False),
    "stack of boxes": (0.34, False),
}
FOVS = (50.0, 58.0, 66.0)  # vertical, degrees


@dataclass(frozen=True)
class Piece:
    kind: str
    color: str
    position: tuple[float, float]
    yaw: float  # the way its front looks

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}" if self.kind != "plant" else "plant"

    @property
    def radius(self) -> float:
        return FURNITURE[self.kind][0]


@dataclass(frozen=True)
class RoomSpec:
    wall: str
    floor: str
    half_length: float  # along x
    half_width: float  # along y
    pieces: tuple[Piece, ...]
    fov: float
    decor_seed: int  # of pictures, windows and the door


def sample_room(rng: np.random.Generator, split: str) -> RoomSpec:
    """Draw a room of a split."""
    held_out = split == "val_style"
    wall, floor = (list(s)[-1] if held_out else str(rng.choice(list(s)[:-1])) for s in (WALLS, FLOORS))
    half = float(rng.uniform(2.8, 3.6)), float(rng.uniform(2.4, 3.0))
    colors = list(COLORS) if held_out else list(COLORS)[:-1]
    at_wall = [kind for kind, (_, wall_side) in FURNITURE.items() if wall_side]
    inside = [kind for kind, (_, wall_side) in FURNITURE.items() if not wall_side]
    wanted = [*rng.choice(at_wall, 4), *rng.choice(inside, 7)]
    pieces: list[Piece] = []
    for number, kind in enumerate(wanted):
        color = colors[-1] if held_out and number == 0 else str(rng.choice(colors))
        for _ in range(30):
            place, yaw = _place(rng, str(kind), half)
            gaps = [np.hypot(*(np.subtract(place, p.position))) - p.radius - FURNITURE[kind][0] for p in pieces]
            if min(gaps, default=1) > 0.1:
                pieces.append(Piece(str(kind), color, place, yaw))
                break
    return RoomSpec(wall, floor, *half, tuple(pieces), float(rng.choice(FOVS)), int(rng.integers(2**31)))


def _place(rng: np.random.Generator, kind: str, half: tuple[float, float]) -> tuple[tuple[float, float], float]:
    """A position and the direction that the front looks to."""
    radius, wall_side = FURNITURE[kind]
    if not wall_side:
        x, y = (float(rng.uniform(-h + radius + 0.1, h - radius - 0.1)) for h in half)
        return (x, y), float(rng.uniform(-np.pi, np.pi))
    axis, sign = int(rng.integers(2)), int(rng.choice([-1, 1]))
    place = [0.0, 0.0]
    place[axis] = sign * (half[axis] - _DEPTH[kind] - 0.03)
    place[1 - axis] = float(rng.uniform(-1, 1) * (half[1 - axis] - radius - 0.1))
    return (place[0], place[1]), float(np.arctan2(*((-sign, 0) if axis else (0, -sign))))


_DEPTH = {"sofa": 0.42, "bed": 1.0, "bookcase": 0.17, "cupboard": 0.28}  # half of it, back to front


def build_model(room: RoomSpec) -> "mujoco.MjModel":
    """Compile the MuJoCo model of a room; deterministic."""
    spec = mujoco.MjSpec.from_file(str(ASSET))
    for name, style in (("wall", WALLS[room.wall]), ("floor", FLOORS[room.floor])):
        spec.texture(name).data = paint(*style).tobytes()
    spec.material("floor").texrepeat = [round(room.half_length), round(room.half_width)]
    spec.material("wall").texrepeat = [3, 1]
    spec.camera("main").fovy = room.fov
    length, width = room.half_length, room.half_width
    box, thin, half_height = mujoco.mjtGeom.mjGEOM_BOX, 0.05, HEIGHT / 2
    spec.worldbody.add_geom(
        name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[length, width, 0.1], material="floor"
    )
    for name, position, size in (
        ("east", [length + thin, 0, half_height], [thin, width + 2 * thin, half_height]),
        ("west", [-length - thin, 0, half_height], [thin, width + 2 * thin, half_height]),
        ("north", [0, width + thin, half_height], [length, thin, half_height]),
        ("south", [0, -width - thin, half_height], [length, thin, half_height]),
    ):
        spec.worldbody.add_geom(name=name, type=box, pos=position, size=size, material="wall")
    spec.worldbody.add_geom(
        name="ceiling",
        type=box,
        pos=[0, 0, HEIGHT + thin],
        size=[length + 2 * thin, width + 2 * thin, thin],
        rgba=[0.93, 0.93, 0.91, 1],
    )
    baker = MeshBaker()
    for piece in room.pieces:
        _Builder(baker, piece).build()
    _decorate(baker, room)
    baker.add_to(spec)
    return spec.compile()


class _Builder:
    """Puts one piece together from boxes and round solids; local axes: x to the front, y to the left."""

    def __init__(self, baker: MeshBaker, piece: Piece):
        self.baker, self.piece = baker, piece
        rgb = np.array(COLORS[piece.color])
        self.plain = baker.color(rgb)
        self.cloth = self._texture("noise", rgb, 0.86 * rgb)
        self.wood = self._texture("wood", (0.70, 0.52, 0.34), (0.54, 0.38, 0.24))
        self.dark = baker.color((0.20, 0.19, 0.19))
        cosine, sine = np.cos(piece.yaw), np.sin(piece.yaw)
        self._rotation = np.array([[cosine, -sine], [sine, cosine]])

    def _texture(self, pattern: str, light, dark) -> int:
        key = (pattern, *np.round(light, 3))
        textures = self.baker.__dict__.setdefault("textures", {})
        if key not in textures:
            textures[key] = self.baker.picture(paint(pattern, light, dark))
        return textures[key]

    def _at(self, x: float, y: float, z: float) -> np.ndarray:
        return np.array([*(self._rotation @ [x, y] + self.piece.position), z])

    def box(self, x, y, z, half_x, half_y, half_z, cell, turn: float = 0.0):
        self.baker.box("furniture", self._at(x, y, z), (half_x, half_y, half_z), cell, self.piece.yaw + turn)

    def round(self, shape, x, y, z, scale, cell):
        self.baker.solid("furniture", shape, self._at(x, y, z), scale, cell)

    def build(self):
        getattr(self, f"_{self.piece.kind.replace(' ', '_')}")()

    def _sofa(self):
        self.box(0, 0, 0.22, 0.42, 0.85, 0.22, self.cloth)
        self.box(-0.32, 0, 0.62, 0.10, 0.85, 0.22, self.cloth)
        for side in (-1, 1):
            self.box(0, side * 0.76, 0.50, 0.42, 0.10, 0.10, self.cloth)
            self.box(0.06, side * 0.33, 0.47, 0.32, 0.31, 0.05, self.plain)

    def _bed(self):
        self.box(0, 0, 0.18, 1.0, 0.55, 0.18, self.wood)
        self.box(0.02, 0, 0.42, 0.96, 0.53, 0.08, self.baker.color((0.92, 0.91, 0.88)))
        self.box(0.29, 0, 0.47, 0.71, 0.56, 0.06, self.cloth)
        self.box(-0.95, 0, 0.55, 0.05, 0.55, 0.45, self.wood)
        self.box(-0.72, 0, 0.54, 0.16, 0.36, 0.06, self.baker.color((0.97, 0.96, 0.94)))

    def _bookcase(self):
        self.box(-0.15, 0, 0.85, 0.02, 0.50, 0.85, self.wood)
        for side in (-1, 1):
            self.box(0, side * 0.49, 0.85, 0.17, 0.02, 0.85, self.wood)
        books = np.random.default_rng(int(1000 * abs(self.piece.position[0] + self.piece.yaw)))
        colors = list(COLORS.values())[:-1]
        for shelf in range(5):
            self.box(0, 0, 0.02 + 0.41 * shelf, 0.17, 0.49, 0.02, self.wood)
            left = -0.44
            while shelf < 4 and left < 0.40:
                thick, tall = books.uniform(0.03, 0.07), books.uniform(0.11, 0.16)
                cell = self.baker.color(colors[books.integers(len(colors))])
                self.box(0.02, left + thick, 0.04 + 0.41 * shelf + tall, 0.11, thick, tall, cell)
                left += 2 * thick + 0.01

    def _cupboard(self):
        rgb = np.array(COLORS[self.piece.color])
        self.box(0, 0, 0.45, 0.28, 0.48, 0.45, self._texture("wood", rgb, 0.8 * rgb))
        for side in (-1, 1):
            self.box(0.285, side * 0.23, 0.45, 0.01, 0.21, 0.38, self.plain)
            self.box(0.31, side * 0.06, 0.50, 0.02, 0.015, 0.06, self.dark)
        self.round("sphere", 0, 0.15, 1.02, (0.12, 0.12, 0.12), self.baker.color((0.85, 0.80, 0.62)))

    def _table(self):
        self.box(0, 0, 0.72, 0.40, 0.60, 0.025, self.wood)
        for x in (-0.34, 0.34):
            for y in (-0.54, 0.54):
                self.box(x, y, 0.35, 0.03, 0.03, 0.35, self.wood)
        self.round("cylinder", 0.05, 0.2, 0.82, (0.07, 0.07, 0.08), self.plain)
        self.box(-0.05, -0.22, 0.765, 0.11, 0.15, 0.02, self.plain, 0.4)

    def _round_table(self):
        self.round("cylinder", 0, 0, 0.70, (0.48, 0.48, 0.02), self.wood)
        self.round("cylinder", 0, 0, 0.34, (0.05, 0.05, 0.34), self.dark)
        self.round("sphere", 0.1, 0.05, 0.83, (0.11, 0.11, 0.11), self.plain)

    def _chair(self):
        self.box(0, 0, 0.44, 0.21, 0.21, 0.025, self.plain)
        self.box(-0.20, 0, 0.72, 0.02, 0.21, 0.20, self.plain)
        for x in (-0.18, 0.18):
            for y in (-0.18, 0.18):
                self.box(x, y, 0.21, 0.02, 0.02, 0.21, self.wood)

    def _plant(self):
        self.round("cylinder", 0, 0, 0.18, (0.17, 0.17, 0.18), self.plain)
        leaf = self.baker.color((0.22, 0.50, 0.24))
        for x, y, z, size in ((0, 0, 0.72, 0.26), (0.12, 0.08, 0.95, 0.19), (-0.10, 0.06, 1.02, 0.17)):
            self.round("sphere", x, y, z, (size, size, 1.25 * size), leaf)

    def _lamp(self):
        self.round("cylinder", 0, 0, 0.02, (0.17, 0.17, 0.02), self.dark)
        self.round("cylinder", 0, 0, 0.75, (0.02, 0.02, 0.75), self.dark)
        self.round("cylinder", 0, 0, 1.55, (0.20, 0.20, 0.14), self.plain)

    def _ball(self):
        self.round("sphere", 0, 0, 0.24, (0.24, 0.24, 0.24), self.plain)

    def _stack_of_boxes(self):
        card = self._texture("noise", (0.74, 0.60, 0.42), (0.66, 0.52, 0.36))
        for i, (cell, size) in enumerate(((card, 0.24), (self.plain, 0.20), (card, 0.15))):
            self.box(0, 0, 0.2 + 0.4 * i if i < 2 else 0.95, size, size, 0.2 if i < 2 else 0.15, cell, 0.35 * i)


def _decorate(baker: MeshBaker, room: RoomSpec):
    """A door, windows and pictures on the walls, flat enough to be out of every camera's way."""
    rng = np.random.default_rng(room.decor_seed)
    door, frame = baker.picture(paint("wood", (0.60, 0.42, 0.28), (0.48, 0.32, 0.20))), baker.color((0.95, 0.94, 0.92))
    window = np.linspace([150, 195, 235], [215, 232, 245], 64)[:, None].repeat(64, axis=1)
    window[30:34], window[:, 30:34] = 245, 245
    pane = baker.picture(window.astype(np.uint8))
    walls = [(axis, sign) for axis in (0, 1) for sign in (-1, 1)]
    for axis, sign in walls:
        reach, across = (room.half_length, room.half_width) if axis == 0 else (room.half_width, room.half_length)

        def hang(place, z, half_across, half_up, cell, depth, axis=axis, sign=sign, reach=reach):
            centre = np.array([sign * reach, place, z])[[0, 1, 2] if axis == 0 else [1, 0, 2]]
            half = np.array([depth, half_across, half_up])[[0, 1, 2] if axis == 0 else [1, 0, 2]]
            baker.box("decor", centre, half, cell)

        places = rng.permutation([-0.62, 0.0, 0.62]) * across
        kinds = rng.permutation(["door" if (axis, sign) == (0, 1) else "window", "picture", "picture"])
        for place, kind in zip(places, kinds, strict=True):
            if kind == "door":
                hang(place, 1.0, 0.42, 1.0, door, 0.03)
            elif kind == "window":
                hang(place, 1.5, 0.58, 0.48, frame, 0.02)
                hang(place, 1.5, 0.52, 0.42, pane, 0.03)
            else:
                colors = rng.permutation(list(COLORS))[:2]
                art = paint(str(rng.choice(["marble", "checks", "stripes", "noise"])), *(COLORS[c] for c in colors))
                width, height = rng.uniform(0.22, 0.40), rng.uniform(0.20, 0.32)
                hang(place, 1.55, width + 0.03, height + 0.03, baker.color((0.22, 0.19, 0.17)), 0.015)
                hang(place, 1.55, width, height, baker.picture(art), 0.025)
