"""The table-top simulation: behaviour, states, actions and exact cameras. No pictures except where masks are checked."""

from functools import cache

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.conditioning.robot_states import integrate_actions
from cosmos_hf.worlds.tabletop import NUM_FRAMES, PLANS, Policy, Robot, simulate
from cosmos_hf.worlds.tabletop_scene import build_model, sample_scene

without_pictures = cache(lambda split, index: simulate(split, index, renderer=None))


def run_policy(kind, seed, target=None):
    rng = np.random.default_rng(seed)
    robot = Robot(build_model(sample_scene(rng, "train")))
    policy = Policy(robot, kind, rng, target)
    path = [robot.object_positions()]
    for _ in range(NUM_FRAMES - 1):
        robot.step(policy.command())
        path.append(robot.object_positions())
    return policy, np.array(path)


def test_picks_lift_their_object():
    heights = []
    for seed in range(4):
        policy, path = run_policy("pick", seed)
        heights.append(path[:, policy.target, 2].max())
    assert sum(height > 0.1 for height in heights) >= 3, heights


def test_pushes_move_their_object():
    moves = []
    for seed in range(4):
        policy, path = run_policy("push", seed)
        moves.append(np.linalg.norm((path[-1] - path[0])[policy.target][:2]))
    assert sum(move > 0.04 for move in moves) >= 3, moves


def test_the_chosen_target_is_the_one_that_is_pushed():
    chosen = []
    for target in (0, 1, 2):
        policy, path = run_policy("push", 6, target)
        assert policy.target == target
        chosen.append(int(np.linalg.norm(path[-1] - path[0], axis=1).argmax()))
    assert chosen == [0, 1, 2]


def test_an_episode_is_complete_and_its_actions_lead_to_its_states():
    episode = without_pictures("train", 0)
    objects = len(episode.scene.objects)
    assert episode.frames.shape == (NUM_FRAMES, 96, 128, 3)
    assert episode.states.shape == (NUM_FRAMES, 7)
    assert episode.actions.shape == episode.commands.shape == (NUM_FRAMES - 1, 7)
    assert episode.object_positions.shape == (NUM_FRAMES, objects, 3)
    assert episode.extrinsics.shape == (NUM_FRAMES, 4, 4)
    np.testing.assert_allclose(integrate_actions(episode.states[0], episode.actions), episode.states, atol=1e-9)


@pytest.mark.parametrize("index", range(6))
def test_the_gripper_stays_between_closed_and_open(index):
    gripper = without_pictures("train", index).states[:, 6]
    assert gripper.min() >= 0 and gripper.max() <= 1


def test_pick_closes_and_opens_the_gripper():
    episode = next(e for e in (without_pictures("train", i) for i in range(6)) if e.kind == "pick")
    assert episode.states[0, 6] > 0.95 and episode.commands[:, 6].min() == 0
    assert episode.states[:, 6].min() < 0.9  # the objects nearly fill the gripper: closed on one is about 0.8


def test_equal_arguments_give_equal_episodes_and_others_do_not():
    again = simulate("train", 0, renderer=None)
    first, other = without_pictures("train", 0), without_pictures("train", 1)
    np.testing.assert_array_equal(first.states, again.states)
    assert first.scene == again.scene and first.caption == again.caption
    assert first.scene != other.scene
    assert first.scene != simulate("train", 0, seed=1, renderer=None).scene
    assert first.scene != without_pictures("val_iid", 0).scene


def test_counterfactual_clips_share_their_start_and_differ_after_it():
    clips = [without_pictures("val_counterfactual", i) for i in range(len(PLANS))]
    assert [clip.plan for clip in clips] == list(PLANS)
    for clip in clips[1:]:
        assert clip.scene == clips[0].scene
        np.testing.assert_array_equal(clip.states[0], clips[0].states[0])
    ends = np.array([clip.states[-1, :3] for clip in clips])
    assert min(np.linalg.norm(ends[i] - ends[j]) for i in range(4) for j in range(i)) > 0.05
    assert len({clip.caption for clip in clips}) == 4
    assert without_pictures("val_counterfactual", 4).scene != clips[0].scene


@pytest.mark.parametrize("index", [2, 5, 8, 11])
def test_val_combo_acts_on_the_held_out_object(index):
    """These are pushes among several objects."""
    episode = without_pictures("val_combo", index)
    moved = np.linalg.norm(episode.object_positions[-1] - episode.object_positions[0], axis=1)
    assert (episode.kind, episode.target) == ("push", 0) and len(moved) > 1
    assert moved.argmax() == 0 and moved[0] > 0.03


def test_objects_project_onto_their_masks(renderer):
    """The recorded camera, to 1.5 pixels: an object's centre projects onto the centroid of its mask."""
    checked = 0
    for index in range(2):
        episode = simulate("val_iid", index, renderer=None, masks=True)
        mask = episode.masks[0]
        assert set(np.unique(mask)) <= set(range(2 + len(episode.scene.objects))) and (mask == 1).sum() > 100
        for i, position in enumerate(episode.object_positions[0]):
            x, y, depth = episode.intrinsics @ (episode.extrinsics[0] @ np.append(position, 1))[:3]
            rows, columns = np.nonzero(mask == 2 + i)
            assert len(rows) > 20
            assert np.hypot(columns.mean() + 0.5 - x / depth, rows.mean() + 0.5 - y / depth) < 1.5
            checked += 1
    assert checked >= 2
