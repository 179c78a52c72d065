"""Captions say what happened, in the camera's directions."""

import re

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.worlds import tabletop_instructions
from cosmos_hf.worlds.captions import alternatives, caption, direction_in_view, with_article
from cosmos_hf.worlds.tabletop import intrinsics, simulate, world_to_camera
from cosmos_hf.worlds.tabletop_scene import ObjectSpec, SceneSpec, camera_pose

THINGS = (ObjectSpec("red", "cube", 0.03, (0.1, 0.0), 0.0), ObjectSpec("orange", "ball", 0.03, (0.0, 0.1), 0.0))


def scene_seen_from(azimuth):
    return SceneSpec("light wood", "cream", "silver", azimuth, 0.65, 0.6, (0, 0, 0.08), (0, 0, 1.3), THINGS)


def pixels(scene, points):
    in_camera = np.c_[points, np.ones(len(points))] @ world_to_camera(scene)[:3].T
    projected = in_camera @ intrinsics().T
    return projected[:, :2] / projected[:, 2:]


@pytest.mark.parametrize("azimuth", [-1.1, -0.45, 0.75, 1.3])
@pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 16, endpoint=False) + 0.1)
def test_directions_agree_with_the_projected_motion(azimuth, angle):
    scene = scene_seen_from(azimuth)
    start, move = np.array([0.08, 0.0, 0.03]), 0.1 * np.array([np.cos(angle), np.sin(angle), 0])
    before, after = pixels(scene, np.stack([start, start + move]))
    right, down = after - before
    words = direction_in_view(move, camera_pose(scene)[1])
    assert {
        "to the right": right > 0,
        "to the left": right < 0,
        "towards the camera": down > 0,
        "away from the camera": down < 0,
    }[words], (words, right, down)


def say(kind, *target_path, gripper=((0, 0, 0.1), (0, 0, 0.1)), azimuth=0.75, seed=0):
    path = np.array(target_path, dtype=float)
    positions = np.stack([path, np.repeat([[0, 0.1, 0.03]], len(path), axis=0)], axis=1)
    scene = scene_seen_from(azimuth)
    axes = camera_pose(scene)[1]
    return caption(scene, kind, 0, positions, np.array(gripper, dtype=float), axes, np.random.default_rng(seed))


# The camera at azimuth 0 faces the robot: what goes to the world's +y goes to the right of the picture.
@pytest.mark.parametrize(
    "kind, path, words",
    [
        (
            "pick",
            [(0.1, 0, 0.03), (0.1, 0, 0.15), (0.1, 0.1, 0.03)],
            "picks up the red cube and puts it down to the right",
        ),
        ("pick", [(0.1, 0, 0.03), (0.1, 0, 0.15), (0.1, 0, 0.03)], "picks up the red cube and puts it back"),
        ("pick", [(0.1, 0, 0.03), (0.1, 0.1, 0.15)], "picks up the red cube and lifts it into the air"),
        (
            "pick",
            [(0.1, 0, 0.03), (0.1, 0, 0.15), (0.1, 0.5, -0.6)],
            "picks up the red cube and drops it off the table",
        ),
        ("pick", [(0.1, 0, 0.03), (0.1, 0, 0.03)], "reaches for the red cube"),
        ("push", [(0.1, 0, 0.03), (0.2, 0, 0.03)], "pushes the red cube towards the camera"),
        ("push", [(0.1, 0, 0.03), (0.0, 0, 0.03)], "pushes the red cube away from the camera"),
        ("push", [(0.1, 0, 0.03), (0.1, -0.6, -0.6)], "pushes the red cube off the table to the left"),
        ("push", [(0.1, 0, 0.03), (0.11, 0, 0.03)], "moves towards the red cube"),
        ("random", [(0.1, 0, 0.03), (0.2, 0, 0.03)], "bumps into the red cube"),
        ("random", [(0.1, 0, 0.03), (0.1, 0, 0.03)], "moves freely above the table"),
    ],
)
def test_what_happened(kind, path, words):
    assert words in say(kind, *path, azimuth=0.0)


@pytest.mark.parametrize(
    "end, words",
    [
        ((0, 0.1, 0.1), "moves to the right."),
        ((0.1, 0, 0), "moves towards the camera and down"),
        ((0, 0, 0.3), "moves up"),
    ],
)
def test_plans_are_told_as_the_camera_sees_them(end, words):
    still = (0.1, 0, 0.03)
    texts = [say("plan", still, still, gripper=((0, 0, 0.1), end), azimuth=0.0, seed=seed) for seed in range(8)]
    assert any(words in text for text in texts) and not any("robot's" in text or "seen from" in text for text in texts)


def test_articles():
    assert (with_article("orange ball"), with_article("red cube")) == ("an orange ball", "a red cube")
    still = (0.1, 0, 0.03)
    texts = [say("random", still, still, seed=seed) for seed in range(12)]
    assert any("next to an orange ball." in text for text in texts) and not any(" a orange" in text for text in texts)


def test_simulated_captions_name_the_target():
    for index in range(3):
        episode = simulate("train", index, renderer=None)
        if episode.kind in ("pick", "push"):
            assert episode.scene.objects[episode.target].name in episode.caption


def test_told_what_to_do_the_robot_does_nothing_else():
    """With no word of what stands beside the object, and with what it was not told; the held-out pair is the one meant."""
    for index in range(4):
        told = tabletop_instructions.simulate("val_combo", index, renderer=None)
        names = [thing.name for thing in told.scene.objects]
        assert told.kind in ("pick", "push") and told.target == 0
        assert re.match(rf"(Pick up|Push|Reach for|Move towards) the {names[0]}\b", told.caption), told.caption
        assert not any(name in told.caption for name in names[1:])
        others = told.record()["alternatives"]
        assert told.caption not in others and len(set(others)) == len(others)
        assert all(any(name in other for other in others) for name in names)


def test_every_object_of_a_scene_is_told_of():
    for start in (0, 4, 8):
        clips = [tabletop_instructions.simulate("train", start + turn, renderer=None) for turn in range(4)]
        assert all(
            clip.scene == clips[0].scene and np.array_equal(clip.states[0], clips[0].states[0]) for clip in clips
        )
        assert {clip.target for clip in clips} == set(range(len(clips[0].scene.objects)))
        assert len({clip.actions.tobytes() for clip in clips}) == 4


def test_alternatives_change_one_thing():
    text = "Push the red cube to the left."
    others = alternatives(text, "red cube", ["blue ball", "red cube"])
    assert others == [
        "Push the blue ball to the left.",
        "Push the red cube to the right.",
        "Push the red cube away from the camera.",
        "Push the red cube towards the camera.",
        "Pick up the red cube and put it down to the left.",
    ]
    assert text in alternatives(others[-1], "red cube", ["red cube"])
    for text in ("Reach for the red cube.", "Pick up the red cube and lift it into the air."):
        assert alternatives(text, "red cube", ["red cube"]) == []
