"""Things that move by themselves: the one that is named, where it is told to go, and nothing else."""

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.evaluation.instructions import Instruction
from cosmos_hf.worlds import tabletop_objects
from cosmos_hf.worlds.captions import direction_in_view
from cosmos_hf.worlds.tabletop_objects import CLIPS_PER_SCENE, SPLITS, simulate
from cosmos_hf.worlds.tabletop_scene import HELD_OUT_PAIRS, camera_pose


@pytest.fixture(scope="module")
def clips():
    return [simulate("train", index, renderer=None) for index in range(3 * CLIPS_PER_SCENE)]


def test_the_named_object_goes_where_it_is_told_and_all_else_stands_still(clips):
    for clip in clips:
        moves = clip.object_positions[-1] - clip.object_positions[0]
        others = np.delete(moves, clip.target, axis=0)
        assert len(others) >= 1 and np.abs(others).max() == 0 and np.ptp(clip.states, axis=0).max() == 0
        own = moves[clip.target]
        assert 0.06 <= np.linalg.norm(own) <= 0.10
        assert not np.abs(clip.object_positions[7:] - clip.object_positions[7]).any()
        name = clip.scene.objects[clip.target].name
        way = direction_in_view(own, camera_pose(clip.scene)[1])
        assert clip.caption == (f"Pick up the {name}." if own[2] else f"Push the {name} {way}.")
    told = [Instruction.of(clip.caption) for clip in clips]
    assert len({instruction.direction for instruction in told}) >= 4


def test_every_object_of_a_scene_has_its_turn(clips):
    for start in range(0, len(clips), CLIPS_PER_SCENE):
        scene = clips[start : start + CLIPS_PER_SCENE]
        assert len({clip.scene for clip in scene}) == 1 and {clip.target for clip in scene} == set(
            range(len(scene[0].scene.objects))
        )
        assert all(np.array_equal(clip.object_positions[0], scene[0].object_positions[0]) for clip in scene)
    assert clips[0].scene != clips[CLIPS_PER_SCENE].scene


def test_what_could_have_been_told_names_the_other_objects(clips):
    for clip in clips:
        names = [thing.name for thing in clip.scene.objects]
        others = clip.record()["alternatives"]
        assert clip.caption not in others
        assert {name for name in names if any(name in other for other in others)} >= set(names) - {names[clip.target]}


def test_equal_arguments_give_equal_clips_and_splits_keep_to_their_pairs():
    for split in SPLITS[:3]:
        one, again = (simulate(split, 5, renderer=None) for _ in range(2))
        assert one.caption == again.caption and np.array_equal(one.object_positions, again.object_positions)
    combo = [simulate("val_combo", index, renderer=None) for index in (0, 1, 6)]
    assert all(tuple(clip.scene.objects[clip.target].name.split()) in HELD_OUT_PAIRS for clip in combo)
    assert simulate("train", 5, 1, renderer=None).scene != simulate("train", 5, renderer=None).scene


def test_an_episode_is_complete(renderer):
    clip = simulate("val_iid", 0, renderer=renderer, masks=True)
    count = tabletop_objects.NUM_FRAMES
    assert clip.frames.shape == (count, 96, 128, 3) and clip.masks.shape == (count, 96, 128)
    own = clip.masks == 2 + clip.target
    assert own[0].any() and (own[0] != own[-1]).any() and (clip.frames[0] != clip.frames[-1]).any()
    assert clip.actions.shape == (count - 1, 7) and clip.extrinsics.shape == (count, 4, 4)
