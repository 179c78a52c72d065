"""Many simple solids as a few meshes that share one picture: draw calls, not triangles, are what rendering costs.

Solids are collected in groups; each group becomes one mesh. All meshes share an atlas, a picture of square cells, in which
every cell is a colour or a texture. Box faces show their whole cell; round solids take the colour of its centre.
"""

import numpy as np
from PIL import Image

from .render import mujoco

CELLS, PIXELS = 16, 64  # cells along each side of the atlas, pixels along each side of a cell
_INSET = 1.5 / PIXELS  # of a cell: filtering must not reach into its neighbours


def _sphere(around: int = 14, along: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit sphere: corners [N, 3], outward normals [N, 3], triangles [M, 3]."""
    polar = np.linspace(0, np.pi, along + 1)[:, None]
    turn = np.arange(around) * 2 * np.pi / around
    corners = np.stack(
        [
            np.sin(polar) * np.cos(turn),
            np.sin(polar) * np.sin(turn),
            np.broadcast_to(np.cos(polar), (along + 1, around)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    triangles = []
    for i in range(along):
        for j in range(around):
            a, b = i * around + j, i * around + (j + 1) % around
            c, d = a + around, b + around
            triangles += [[a, c, d]] * (i < along - 1) + [[a, d, b]] * (i > 0)
    return corners, corners, np.array(triangles)


def _cylinder(around: int = 14) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radius 1, from -1 to 1 along z, with a lid and without a bottom; the lid has its own corners and normals."""
    turn = np.arange(around) * 2 * np.pi / around
    ring = np.stack([np.cos(turn), np.sin(turn), np.zeros(around)], axis=1)
    up = np.array([[0, 0, 1.0]])
    corners = np.concatenate([ring - up, ring + up, ring + up, up])
    normals = np.concatenate([ring, ring, np.repeat(up, around + 1, axis=0)])
    triangles = []
    for j in range(around):
        k = (j + 1) % around
        triangles += [[j, k, around + k], [j, around + k, around + j], [2 * around + j, 2 * around + k, 3 * around]]
    return corners, normals, np.array(triangles)


_SOLIDS = {
    "sphere": _sphere(),
    "cylinder": _cylinder(),
    "coarse sphere": _sphere(8, 5),
    "coarse cylinder": _cylinder(6),
}


class MeshBaker:
    """Collects solids; `add_to` a model puts one mesh per group into it."""

    def __init__(self):
        self._atlas = np.zeros((CELLS * PIXELS, CELLS * PIXELS, 3), np.uint8)
        self._used = 0
        self._colors: dict[tuple, int] = {}
        self._groups: dict[str, list[tuple]] = {}

    def picture(self, image: np.ndarray) -> int:
        """The cell of a texture uint8 [N, N, 3]. ValueError when the atlas is full."""
        if self._used == CELLS * CELLS:
            raise ValueError(f"the atlas has {CELLS * CELLS} cells and all are used: use fewer textures and colours")
        row, column = divmod(self._used, CELLS)
        small = Image.fromarray(image).resize((PIXELS, PIXELS), Image.Resampling.BOX)
        self._atlas[row * PIXELS : (row + 1) * PIXELS, column * PIXELS : (column + 1) * PIXELS] = np.asarray(small)
        self._used += 1
        return self._used - 1

    def color(self, rgb) -> int:
        """The cell of a colour in [0, 1]; equal ones share a cell."""
        key = tuple(int(v) for v in np.clip(np.array(rgb) * 255, 0, 255).round())
        if key not in self._colors:
            self._colors[key] = self.picture(np.full((PIXELS, PIXELS, 3), key, np.uint8))
        return self._colors[key]

    def box(self, group: str, centre, half, cell: int, yaw: float = 0.0, tile: float | None = None):
        """A box with its sides along x and y, turned by `yaw`, without a bottom.

        `tile`: repeat the cell on the upright faces, about every `tile` metres; else each face shows it once.
        """
        half, turn = np.asarray(half, dtype=float), _turn(yaw)
        for axis in range(3):
            for sign in (-1, 1) if axis < 2 else (1,):
                across, up = ((1, 2), (0, 2), (0, 1))[axis]
                counts = (1, 1)
                if tile is not None and axis < 2:
                    counts = tuple(max(1, round(2 * half[side] / tile)) for side in (across, up))
                corners, triangles, uv = _grid(*counts)
                points = np.zeros((len(corners), 3))
                points[:, axis], points[:, across], points[:, up] = sign, corners[:, 0], corners[:, 1]
                normal = np.eye(3)[axis] * sign
                if (np.cross(np.eye(3)[across], np.eye(3)[up]) @ normal) < 0:
                    triangles = triangles[:, ::-1]
                self._add(
                    group,
                    points * half @ turn.T + centre,
                    np.tile(normal @ turn.T, (len(points), 1)),
                    triangles,
                    uv,
                    cell,
                )

    def floor(self, group: str, centre, half, cell: int, counts: tuple[int, int] = (1, 1)):
        """A rectangle that looks up, with the cell repeated `counts` times along x and y."""
        corners, triangles, uv = _grid(*counts)
        points = np.c_[corners * half, np.zeros(len(corners))] + centre
        self._add(group, points, np.tile([0.0, 0, 1], (len(points), 1)), triangles, uv, cell)

    def solid(self, group: str, shape: str, centre, scale, cell: int):
        """A "sphere" or "cylinder" (along z; "coarse ..." for small ones) of half-extents `scale`."""
        corners, normals, triangles = _SOLIDS[shape]
        normals = normals / np.asarray(scale)
        normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
        self._add(group, corners * scale + centre, normals, triangles, np.full((len(corners), 2), 0.5), cell)

    def _add(self, group: str, points, normals, triangles, uv, cell: int):
        row, column = divmod(cell, CELLS)
        inside = _INSET + uv * (1 - 2 * _INSET)
        uv = np.stack([column + inside[:, 0], row + 1 - inside[:, 1]], axis=1) / CELLS
        self._groups.setdefault(group, []).append((points, normals, triangles, uv))

    def add_to(self, spec: "mujoco.MjSpec", bodies: dict[str, str] | None = None):
        """Put every group into a model as mesh and geom `group`, fixed to the world, or to the body that `bodies` names."""
        texture = spec.add_texture(
            name="atlas",
            type=mujoco.mjtTexture.mjTEXTURE_2D,
            width=CELLS * PIXELS,
            height=CELLS * PIXELS,
            nchannel=3,
        )
        texture.data = self._atlas.tobytes()
        material = spec.add_material(name="atlas", specular=0.0)
        material.textures[int(mujoco.mjtTextureRole.mjTEXROLE_RGB)] = "atlas"
        for group, parts in self._groups.items():
            points, normals, triangles, uv = (list(part) for part in zip(*parts, strict=True))
            starts = np.cumsum([0, *(len(p) for p in points[:-1])])
            faces = np.concatenate([t + start for t, start in zip(triangles, starts, strict=True)]).ravel()
            mesh = spec.add_mesh(name=group)
            mesh.uservert, mesh.userface = np.concatenate(points).ravel(), faces
            mesh.usernormal, mesh.userfacenormal = np.concatenate(normals).ravel(), faces
            mesh.usertexcoord, mesh.userfacetexcoord = np.concatenate(uv).ravel(), faces
            mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
            parent = spec.body(bodies[group]) if bodies and group in bodies else spec.worldbody
            parent.add_geom(
                name=group,
                type=mujoco.mjtGeom.mjGEOM_MESH,
                meshname=group,
                material="atlas",
                contype=0,
                conaffinity=0,
            )


def _turn(yaw: float) -> np.ndarray:
    return np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])


def _grid(columns: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The square [-1, 1]^2 as columns x rows quads with corners of their own: corners, triangles, uv in [0, 1] per quad."""
    unit = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float)
    place = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 1, 2)
    corners = ((place + unit) / [columns, rows] * 2 - 1).reshape(-1, 2)
    quads = 4 * np.arange(columns * rows)[:, None, None] + np.array([[0, 1, 2], [0, 2, 3]])
    return corners, quads.reshape(-1, 3), np.tile(unit, (columns * rows, 1))
