"""The driving world: actions lead to states, routes keep their lane, six cameras have exact poses."""

from functools import cache

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.worlds import driving, driving_front
from cosmos_hf.worlds.driving_scene import HALF_ROAD, LIGHTS, PITCH, STYLES

without_pictures = cache(lambda split, index: driving.simulate(split, index, renderer=None))
CLIPS = [("train", i) for i in range(8)]


def test_an_arc_in_closed_form_is_the_sum_of_small_steps():
    state, action = np.array([1.0, 2.0, 0.3, 0.0]), np.array([0.4, 5.0])
    whole, small = driving.advance(state, action, 0.2), state
    for _ in range(2000):
        small = driving.advance(small, action, 0.0001)
    np.testing.assert_allclose(whole, small, atol=1e-9)
    np.testing.assert_allclose(driving.advance(state, (0, 5.0), 0.2)[:2], [1 + np.cos(0.3), 2 + np.sin(0.3)])
    assert driving.advance(state, action)[2] > state[2]  # a positive steer turns left


@pytest.mark.parametrize(("split", "index"), CLIPS)
def test_actions_lead_to_the_states(split, index):
    episode = without_pictures(split, index)
    assert episode.states.shape == (17, 4) and episode.actions.shape == (16, 2)
    state = episode.states[0]
    for action, expected in zip(episode.actions, episode.states[1:], strict=True):
        state = driving.advance(state, action)
        np.testing.assert_allclose(state, expected, atol=1e-12)
    assert np.abs(episode.actions[:, 0]).max() <= driving.MAX_STEER and episode.actions[:, 1].min() >= 0
    assert np.abs(np.diff(episode.states[:, 3])).max() < 0.7  # metres per second within 0.2 s


@pytest.mark.parametrize(("split", "index"), CLIPS)
def test_the_car_keeps_to_the_right_lane_and_away_from_others(split, index):
    episode = without_pictures(split, index)
    for x, y, yaw, _ in episode.states:
        off = (np.array([x, y]) + PITCH / 2) % PITCH - PITCH / 2  # from the nearest street's middle
        if np.abs(off).min() > HALF_ROAD or np.abs(off).max() < HALF_ROAD + 5:
            assert np.abs(off).min() < HALF_ROAD  # at a crossing: on the road
            continue
        across = off @ [-np.sin(yaw), np.cos(yaw)]
        assert -HALF_ROAD + 1 < across < -1.0 + 0.4
    middles = episode.states[:, :2] + 1.35 * np.stack([np.cos(episode.states[:, 2]), np.sin(episode.states[:, 2])], 1)
    assert np.linalg.norm(episode.car_states[:, :, :2] - middles[:, None], axis=-1).min() >= 6


def test_plans_do_what_they_say_from_one_start():
    clips = {clip.plan: clip for clip in (without_pictures("val_counterfactual", i) for i in range(4))}
    assert tuple(clips) == driving.PLANS
    turns = {plan: clip.states[-1, 2] - clip.states[0, 2] for plan, clip in clips.items()}
    assert turns["left"] > 0.9 and turns["right"] < -0.9 and abs(turns["straight"]) < 1e-6
    assert clips["stop"].states[-1, 3] == 0 and clips["straight"].states[-1, 3] > 4
    for clip in clips.values():
        np.testing.assert_array_equal(clip.states[0], clips["stop"].states[0])
        np.testing.assert_array_equal(clip.extrinsics[:, 0], clips["stop"].extrinsics[:, 0])
        assert clip.scene == clips["stop"].scene
        np.testing.assert_array_equal(clip.car_states, clips["stop"].car_states)
    assert len({clip.caption for clip in clips.values()}) == 4


def test_repeatable_splits_and_held_out_styles():
    first, again = without_pictures("train", 0), driving.simulate("train", 0, renderer=None)
    np.testing.assert_array_equal(first.states, again.states)
    assert first.scene == again.scene and first.view_captions == again.view_captions
    assert first.scene != without_pictures("val_iid", 0).scene != without_pictures("train", 1).scene
    for index in range(4):
        scene = without_pictures("train", index).scene
        assert scene.style != list(STYLES)[-1] and scene.light != list(LIGHTS)[-1]
        assert without_pictures("val_style", index).scene.style == list(STYLES)[-1]
        assert without_pictures("val_light", index).scene.light == list(LIGHTS)[-1]


def test_views_look_where_their_names_say_and_overlap_all_around():
    pose = {view: driving.camera_pose(np.array([3.0, 5.0, 0.7, 0]), view) for view in driving.VIEWS}
    ahead, left = np.array([np.cos(0.7), np.sin(0.7), 0]), np.array([-np.sin(0.7), np.cos(0.7), 0])
    looks = {view: matrix[2, :3] for view, matrix in pose.items()}
    assert looks["front"] @ ahead > 0.99 and looks["back"] @ ahead < -0.99
    assert looks["left"] @ left > 0.8 and looks["right"] @ left < -0.8
    assert looks["back_left"] @ left > 0.8 and looks["back_left"] @ ahead < 0
    width = 2 * np.degrees(np.arctan(driving.WIDTH / 2 / driving.intrinsics()[0, 0]))
    azimuths = sorted(azimuth % 360 for _, azimuth in driving.VIEWS.values())
    gaps = np.diff([*azimuths, azimuths[0] + 360])
    assert gaps.max() < width - 5  # neighbours share at least 5 degrees
    for matrix in pose.values():
        np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1)


def test_cars_project_onto_their_masks(renderer):
    """The recorded cameras: a car's middle is projected into its mask."""
    views = ("front", "back")
    index = next(i for i in range(20) if "car ahead" in without_pictures("val_iid", i).caption)
    episode = driving.simulate("val_iid", index, renderer=None, truth=True, views=views)
    assert episode.masks.shape == (2, 17, 64, 96) and episode.extrinsics.shape == (2, 17, 4, 4)
    checked = 0
    for v in range(2):
        for t in range(0, 17, 2):
            for k, (x, y, _) in enumerate(episode.car_states[t]):
                rows, columns = np.nonzero(episode.masks[v, t] == 1 + k)
                if len(rows) < 12 or columns.min() == 0 or columns.max() == 95 or rows.max() == 63:
                    continue
                u, w, depth = episode.intrinsics[v] @ (episode.extrinsics[v, t] @ [x, y, 0.8, 1])[:3]
                assert depth > 0
                assert abs(u / depth - columns.mean() - 0.5) < 2.5 and abs(w / depth - rows.mean() - 0.5) < 2.5
                checked += 1
    assert checked >= 3


def test_the_front_camera_alone_is_the_same_drive():
    front, six = driving_front.simulate("val_iid", 2, renderer=None), without_pictures("val_iid", 2)
    assert list(front.videos()) == [""] and front.arrays()["extrinsics"].shape == (17, 4, 4)
    np.testing.assert_array_equal(front.arrays()["extrinsics"], six.arrays()["extrinsics"][0])
    np.testing.assert_array_equal(front.actions, six.actions)
    assert front.caption == six.caption and front.record()["view_captions"] == {"front": six.view_captions["front"]}
