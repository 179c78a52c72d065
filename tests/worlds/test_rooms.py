"""The rooms world: exact poses (by reprojection with depth), free ways, splits and captions."""

from functools import cache

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.conditioning.camera import CameraPath, camera_centres, relative_extrinsics
from cosmos_hf.worlds import rooms
from cosmos_hf.worlds.rooms_scene import COLORS, FLOORS, FURNITURE, WALLS, sample_room

without_pictures = cache(lambda split, index: rooms.simulate(split, index, renderer=None))


def test_depth_and_poses_agree_by_reprojection(renderer):
    """What a pixel of the first frame sees lies, moved into a later frame by the poses, at the depth that is seen there."""
    index = next(i for i in range(20) if without_pictures("val_iid", i).kind.startswith(("orbit", "truck")))
    episode = rooms.simulate("val_iid", index, renderer=None, truth=True)
    assert episode.depth.shape == (rooms.NUM_FRAMES, 96, 128) and episode.depth.dtype == np.float16
    path = CameraPath(episode.intrinsics, episode.extrinsics, 96, 128)
    y, x = (v.ravel() for v in np.mgrid[4:92:3, 4:124:3])
    depth = episode.depth.astype(float)
    rays = np.linalg.inv(episode.intrinsics) @ np.stack([x + 0.5, y + 0.5, np.ones(len(x))])
    points = episode.extrinsics[0, :3, :3].T @ (rays * depth[0, y, x] - episode.extrinsics[0, :3, 3:])
    assert (camera_centres(path.extrinsics)[-1] - camera_centres(path.extrinsics)[0]).norm() > 0.1
    for frame in (8, 16, 32):
        pixels, distances = (v[frame].numpy() for v in path.project(points.T))
        inside = (distances > 0) & (pixels > 1).all(1) & (pixels < [126, 94]).all(1)
        columns, rows = pixels[inside].astype(int).T
        off = np.abs(depth[frame, rows, columns] - distances[inside])
        assert inside.sum() > 200 and np.median(off) < 0.01
        assert (off < 0.05).mean() > 0.85  # the rest is hidden behind something


def test_a_clip_is_repeatable_and_seeds_and_splits_differ():
    first, again = without_pictures("train", 0), rooms.simulate("train", 0, renderer=None)
    assert first.scene == again.scene and first.caption == again.caption
    np.testing.assert_array_equal(first.extrinsics, again.extrinsics)
    others = [without_pictures("train", 1), without_pictures("val_iid", 0), rooms.simulate("train", 0, 1, None)]
    assert all(first.scene != other.scene for other in others)
    assert first.videos()[""].shape == (33, 96, 128, 3) and first.extrinsics.shape == (33, 4, 4)


@pytest.mark.parametrize("index", range(4))
def test_the_camera_keeps_clear_of_walls_and_furniture(index):
    episode = without_pictures("train", index)
    eyes = camera_centres(CameraPath(episode.intrinsics, episode.extrinsics, 96, 128).extrinsics).numpy()
    assert np.abs(eyes[:, 0]).max() < episode.scene.half_length - 0.3
    assert np.abs(eyes[:, 1]).max() < episode.scene.half_width - 0.3
    for piece in episode.scene.pieces:
        assert np.hypot(*(eyes[:, :2] - piece.position).T).min() > FURNITURE[piece.kind][0] + 0.3


def test_a_room_without_a_free_way_gives_way_to_the_next():
    assert rooms.simulate("train", 25, renderer=None).kind in rooms.KINDS  # of the first room too little floor is free


def test_pieces_stand_apart_and_inside():
    for seed in range(20):
        room = sample_room(np.random.default_rng(seed), "train")
        assert len(room.pieces) >= 6
        for i, piece in enumerate(room.pieces):
            assert abs(piece.position[0]) < room.half_length and abs(piece.position[1]) < room.half_width
            for other in room.pieces[:i]:
                assert np.hypot(*np.subtract(piece.position, other.position)) > piece.radius + other.radius


def test_held_out_styles_and_ways():
    for index in range(5):
        scene, style = without_pictures("train", index).scene, without_pictures("val_style", index).scene
        assert scene.wall != list(WALLS)[-1] and scene.floor != list(FLOORS)[-1]
        assert all(piece.color != list(COLORS)[-1] for piece in scene.pieces)
        assert (style.wall, style.floor) == (list(WALLS)[-1], list(FLOORS)[-1])
        assert without_pictures("val_trajectory", index).kind in rooms.HELD_OUT_KINDS
        assert without_pictures("train", index).kind in rooms.KINDS
    assert not set(rooms.HELD_OUT_KINDS) & set(rooms.KINDS)


def test_counterfactual_clips_share_room_and_start():
    clips = [without_pictures("val_counterfactual", i) for i in range(4)]
    assert [clip.plan for clip in clips] == list(rooms.PLANS)
    for clip in clips[1:]:
        assert clip.scene == clips[0].scene
        np.testing.assert_array_equal(clip.extrinsics[0], clips[0].extrinsics[0])
        assert np.abs(clip.extrinsics[-1] - clips[0].extrinsics[-1]).max() > 0.2
    assert without_pictures("val_counterfactual", 4).scene != clips[0].scene


def test_captions_name_the_room_what_is_seen_and_the_motion():
    texts = [without_pictures("train", i).caption for i in range(4)]
    for i, text in enumerate(texts):
        episode = without_pictures("train", i)
        assert f"{episode.scene.wall} walls" in text and f"{episode.scene.floor} floor" in text
        assert any(piece.name in text for piece in episode.scene.pieces) and text.endswith(".")
        if episode.kind != "wander":
            assert f"The camera {rooms._SAID[episode.kind]}." in text
    wandering = next(e for e in (without_pictures("train", i) for i in range(12)) if e.kind == "wander")
    turn = relative_extrinsics(CameraPath(np.diag([9.0, 9, 1]), wandering.extrinsics, 96, 128).extrinsics)[-1, 2, 0]
    said = wandering.caption.split("The camera ")[1]
    assert ("turns to the right" in said) <= (turn > 0) and ("turns to the left" in said) <= (turn < 0)
