"""Baked meshes: closed the right way round, textured from their own cell, and a full atlas says so."""

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.worlds.baking import CELLS, MeshBaker
from cosmos_hf.worlds.render import mujoco


def parts(baker, group="g"):
    yield from baker._groups[group]


@pytest.mark.parametrize("shape", ["box", "tiled box", "sphere", "cylinder", "coarse sphere", "floor"])
def test_triangles_and_normals_look_outwards(shape):
    baker, centre = MeshBaker(), np.array([1.0, 2.0, 3.0])
    cell = baker.color((1, 0, 0))
    if "box" in shape:
        baker.box("g", centre, (0.5, 1, 2), cell, yaw=0.4, tile=0.7 if "tiled" in shape else None)
    elif shape == "floor":
        baker.floor("g", centre + [0, 0, 1], (1, 2), cell, (3, 2))
    else:
        baker.solid("g", shape, centre, (0.5, 1, 2), cell)
    count = 0
    for points, normals, triangles, _ in parts(baker):
        a, b, c = points[triangles].transpose(1, 0, 2)
        face = np.cross(b - a, c - a)
        assert (np.einsum("ij,ij->i", face, (a + b + c) / 3 - centre) > 0).all()
        assert (np.einsum("ij,ikj->ik", face, normals[triangles]) > 0).all()
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-9)
        count += len(triangles)
    assert count >= (12 if shape == "floor" else 10)


def test_uv_stay_in_their_cell_and_equal_colours_share_one():
    baker = MeshBaker()
    assert baker.color((0.2, 0.4, 0.6)) == baker.color((0.2, 0.4, 0.6)) == 0
    cell = baker.picture(np.full((8, 8, 3), 9, np.uint8))
    baker.box("g", (0, 0, 0), (1, 1, 1), cell, tile=0.5)
    for _, _, _, uv in parts(baker):
        assert (uv * CELLS > [cell, 0]).all() and (uv * CELLS < [cell + 1, 1]).all()


def test_a_full_atlas_is_an_error():
    baker = MeshBaker()
    for i in range(CELLS * CELLS):
        baker.color((i / 255, 0, 0))
    with pytest.raises(ValueError, match="all are used"):
        baker.color((0, 1, 0))


def test_groups_become_meshes_of_their_bodies():
    baker, spec = MeshBaker(), mujoco.MjSpec()
    spec.worldbody.add_body(name="cart", mocap=True)
    baker.box("still", (5, 0, 0), (1, 1, 1), baker.color((1, 0, 0)))
    baker.solid("cart", "sphere", (0, 0, 1), (1, 1, 1), baker.color((0, 1, 0)))
    baker.add_to(spec, {"cart": "cart"})
    model = spec.compile()
    assert model.ngeom == 2 and model.body(model.geom("cart").bodyid[0]).name == "cart"
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    corners = (
        model.mesh_vert[: model.mesh_vertnum[0]] @ data.geom("still").xmat.reshape(3, 3).T + data.geom("still").xpos
    )
    np.testing.assert_allclose([corners.min(0), corners.max(0)], [[4, -1, -1], [6, 1, 1]], atol=1e-5)
