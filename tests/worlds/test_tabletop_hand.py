"""A hand that gets to what is named, and goes along with it."""

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.worlds import tabletop_objects
from cosmos_hf.worlds.tabletop_hand import NUM_FRAMES, simulate
from cosmos_hf.worlds.tabletop_objects import REACH_FRAMES


@pytest.fixture(scope="module")
def clips():
    return [simulate("train", index, renderer=None) for index in range(8)]


def test_the_hand_gets_to_the_thing_and_goes_along(clips):
    for clip in clips:
        thing, hand = clip.object_positions[:, clip.target], clip.states[:, :3]
        assert np.array_equal(thing[0], thing[REACH_FRAMES])
        away = np.linalg.norm(hand - thing, axis=1)
        assert away[REACH_FRAMES:].max() < 0.07 < away[0]
        picked = clip.caption.startswith("Pick")
        assert (hand[-1, 2] > hand[REACH_FRAMES, 2] + 0.04) == picked
        assert (clip.states[REACH_FRAMES:, 6] > 0.2).all() == picked


def test_things_move_as_they_do_by_themselves(clips):
    for index, clip in enumerate(clips):
        alone = tabletop_objects.simulate("train", index, renderer=None)
        assert (clip.caption, clip.scene, clip.target) == (alone.caption, alone.scene, alone.target)
        later = alone.object_positions[: NUM_FRAMES - REACH_FRAMES]
        assert np.array_equal(clip.object_positions[REACH_FRAMES:], later)
        assert clip.record()["alternatives"] == alone.record()["alternatives"]
