"""What scenes are drawn per split, and the texture painter."""

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.worlds.tabletop_scene import (
    AZIMUTHS,
    HELD_OUT_AZIMUTH,
    HELD_OUT_PAIRS,
    TABLES,
    WALLS,
    camera_pose,
    paint,
    sample_scene,
)

BAND = np.radians(5)


def scenes(split, count=300):
    return [sample_scene(np.random.default_rng([0, *split.encode(), i]), split) for i in range(count)]


def pairs(scene):
    return {(thing.color, thing.shape) for thing in scene.objects}


@pytest.mark.parametrize("split", ["train", "val_iid", "val_style", "val_view", "val_counterfactual"])
def test_held_out_pairs_are_only_in_their_split(split):
    assert not set().union(*map(pairs, scenes(split))) & HELD_OUT_PAIRS


def test_val_combo_always_shows_a_held_out_pair_and_shows_each():
    drawn = scenes("val_combo")
    firsts = {(scene.objects[0].color, scene.objects[0].shape) for scene in drawn}
    assert firsts == HELD_OUT_PAIRS


def test_style_and_view_are_held_out():
    last_table, last_wall = list(TABLES)[-1], list(WALLS)[-1]
    for scene in scenes("train"):
        assert scene.table != last_table and scene.wall != last_wall
        assert min(abs(scene.azimuth - azimuth) for azimuth in AZIMUTHS) <= BAND
        assert abs(scene.azimuth - HELD_OUT_AZIMUTH) > 2 * BAND
    assert all((scene.table, scene.wall) == (last_table, last_wall) for scene in scenes("val_style", 20))
    assert all(abs(scene.azimuth - HELD_OUT_AZIMUTH) <= BAND for scene in scenes("val_view", 20))


def test_training_covers_its_styles_and_objects_stay_apart():
    drawn = scenes("train")
    assert {scene.table for scene in drawn} == set(list(TABLES)[:-1])
    assert {scene.wall for scene in drawn} == set(list(WALLS)[:-1])
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3}
    for scene in drawn:
        assert len({thing.color for thing in scene.objects}) == len(scene.objects)
        places = np.array([thing.position for thing in scene.objects])
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(len(places))
        assert gaps.min() > 0.11


def test_camera_axes_are_a_rotation_that_looks_at_the_scene():
    scene = scenes("train", 1)[0]
    eye, axes = camera_pose(scene)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)
    ahead = axes @ (np.array(scene.look_at) - eye)
    np.testing.assert_allclose(ahead, [0, 0, scene.distance], atol=1e-12)
    assert axes[1][2] < 0  # down in the picture is down in the world


def test_textures_are_repeatable_and_unknown_patterns_refused():
    for pattern, light, dark in [*TABLES.values(), *WALLS.values()]:
        picture = paint(pattern, light, dark)
        assert picture.shape == (128, 128, 3) and picture.std() > 1
        np.testing.assert_array_equal(picture, paint(pattern, light, dark))
    with pytest.raises(ValueError, match="zigzag"):
        paint("zigzag", (0, 0, 0), (1, 1, 1))
