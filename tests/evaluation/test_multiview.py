"""Figures of generated views: small for true pictures of one world, large where views or ways are exchanged."""

from functools import cache

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.camera_paths import joystick_path, named_trajectory
from cosmos_hf.evaluation.geometry import Features, find_features, match_frames
from cosmos_hf.evaluation.multiview import (
    match_views,
    neighbouring_views,
    score_features,
    score_geometry,
    score_pictures,
    seen_by_other,
    summarise_views,
)
from cosmos_hf.evaluation.rig_odometry import recover_rig_path
from textured_box import K, picture

FRAMES = 2


@cache
def rig_clip():
    """Three cameras that look to the left, ahead and to the right, turned and moved through the box together."""
    way = joystick_path(np.tile([0.06, 0.0, 0.24, 4.0, 0, 0], (FRAMES - 1, 1)))
    turns = [named_trajectory("pan_left", 2, angle=angle)[1] for angle in (36, 0, -36)]
    poses = []
    for turn, aside in zip(turns, (-0.3, 0.0, 0.3), strict=True):
        moved = turn.clone()
        moved[:3, 3] -= turn[:3, :3] @ torch.tensor([aside, 0, 0], dtype=torch.float64)
        poses.append(moved @ way)
    poses = torch.stack(poses)
    videos = np.stack([[picture(pose) for pose in view] for view in poses])
    return videos, np.repeat(K[None], 3, axis=0), poses


@cache
def features_of_the_truth():
    return [[find_features(frame) for frame in video] for video in rig_clip()[0]]


@cache
def scores_of_the_truth():
    return score_features(features_of_the_truth(), *rig_clip()[1:], 320)


@pytest.fixture
def needs_pycolmap():
    pytest.importorskip("pycolmap", reason="needs the extra cosmos-hf[geometry]")


def test_neighbours_follow_from_the_cameras():
    _, intrinsics, poses = rig_clip()
    assert neighbouring_views(intrinsics, poses[:, 0], 240, 320) == [(0, 1), (1, 2)]


def test_points_are_seen_by_another_camera_at_some_distance():
    intrinsics, ahead = torch.tensor([[100.0, 0, 80], [0, 100, 60], [0, 0, 1]]).double(), torch.eye(4).double()
    aside = ahead.clone()
    aside[0, 3] = -1.0  # one metre to the right: what is d away moves by 100 / d pixels to the left
    points = [[2.0, 60], [60, 60], [159, 60], [-5, 60]]
    cameras = (intrinsics, ahead), (intrinsics, aside)
    assert seen_by_other(points, *cameras, 120, 160).tolist() == [True, True, True, False]
    assert seen_by_other(points, *cameras, 120, 160, (10.0,)).tolist() == [False, True, True, False]
    back = (intrinsics, torch.diag(torch.tensor([-1.0, 1, -1, 1])).double())
    assert not seen_by_other(points, cameras[1], back, 120, 160).any()


def test_only_what_both_cameras_see_is_matched():
    """The same window in both pictures: where both can see it, it is matched; where the other one looks past it, it is not."""
    intrinsics, ahead = torch.tensor([[100.0, 0, 80], [0, 100, 60], [0, 0, 1]]).double(), torch.eye(4).double()
    turn = np.deg2rad(45.0)
    right = torch.tensor(
        [[np.cos(turn), 0, -np.sin(turn), -1], [0, 1, 0, 0], [np.sin(turn), 0, np.cos(turn), 0], [0, 0, 0, 1]]
    )
    descriptors = np.eye(4, 128)
    here = Features(np.array([[150.0, 60], [140, 80], [20, 60], [90, 60]]), descriptors, 120)
    there = Features(np.array([[30.0, 60], [25, 80], [10, 60], [150, 60]]), descriptors, 120)
    assert len(match_frames(here, there)[0]) == 4
    ours, theirs = match_views(here, there, (intrinsics, ahead), (intrinsics, right.double()), 160)
    assert ours.tolist() == [[150, 60], [140, 80]] and theirs.tolist() == [[30, 60], [25, 80]]


def test_true_pictures_have_small_errors(needs_pycolmap):
    true = scores_of_the_truth()
    assert true["temporal"]["error"] < 0.5 and true["temporal"]["failed"] == 0 and true["temporal"]["pairs"] == 3
    assert true["temporal_known"]["error"] < 1 and true["cross_view"]["error"] < 1.5
    assert true["cross_view"]["matches"] > 25
    way = true["trajectory"]
    assert way["following"] < 0.1 * way["length"] and way["rotation"] < 0.3 and way["failed"] == 0


def test_exchanged_views_and_ways_have_large_ones(needs_pycolmap):
    (_, intrinsics, poses), true, features = rig_clip(), scores_of_the_truth(), features_of_the_truth()
    swapped = score_features([features[i] for i in (1, 0, 2)], intrinsics, poses, 320)
    assert swapped["cross_view"]["error"] > 5 * true["cross_view"]["error"]
    assert swapped["temporal"]["error"] == pytest.approx(
        true["temporal"]["error"], rel=0.01
    )  # each is still one world
    back = score_features([view[::-1] for view in features], intrinsics, poses, 320)  # another way, by the same rig
    assert back["trajectory"]["following"] > 5 * true["trajectory"]["following"]
    assert back["trajectory"]["rotation"] > 5
    assert back["cross_view"]["error"] < 2 * true["cross_view"]["error"]
    nothing = Features(np.zeros((0, 2)), np.zeros((0, 128)), 240)
    blank = score_features([[nothing] * FRAMES] * 3, intrinsics, poses, 320)
    assert blank["cross_view"] == {"error": None, "matches": 0, "pairs": 2} and blank["trajectory"]["failed"] == 1


def test_frames_that_were_given_do_not_count(needs_pycolmap):
    """A rig that stands still, whose views are exchanged after the first frame, which was given and hides that."""
    (_, intrinsics, poses), true = rig_clip(), features_of_the_truth()
    poses = poses[:, :1].expand(-1, 5, -1, -1)
    features = [[true[i][0], *[true[other][0]] * 4] for i, other in enumerate((1, 0, 2))]
    flattered = score_features(features, intrinsics, poses, 320)
    honest = score_features(features, intrinsics, poses, 320, given=[1, 1, 1])
    assert flattered["cross_view"]["pairs"] == 4 and honest["cross_view"]["pairs"] == 2
    assert honest["cross_view"]["error"] > 5 * flattered["cross_view"]["error"]
    assert flattered["temporal"]["pairs"] == honest["temporal"]["pairs"] == 12  # no two of them were given
    one_whole = score_features(features, intrinsics, poses, 320, given=[5, 0, 0])
    assert one_whole["temporal"]["pairs"] == 8 and one_whole["cross_view"] == flattered["cross_view"]
    with pytest.raises(ValueError, match="says of 2 views how many frames they were given; there are 3"):
        score_features(true, intrinsics, rig_clip()[2], 320, given=[1, 1])


def test_pictures_are_compared_where_they_were_generated():
    truth = torch.rand(3, 3, 9, 16, 16) * 2 - 1
    generated = truth.clone()
    generated[1, :, 1:] += 0.2
    rows = score_pictures(generated, truth, [9, 1, 0])
    assert rows["model"].shape == (2,) and rows["model"][1] == 100 and 15 < rows["model"][0] < 25
    assert rows["copy_first_frame"].shape == (1,) and rows["copy_first_frame"] < 12
    with pytest.raises(ValueError, match="of 2 views differ"):
        score_pictures(generated, truth, [1, 1])


def test_summaries_leave_out_what_a_clip_lacks():
    scores = [
        {"cross_view": {"error": 2.0, "matches": 10}, "psnr": {"model": torch.tensor([20.0, 22.0])}},
        {"cross_view": {"error": None, "matches": 0}, "psnr": {"model": torch.tensor([24.0])}},
    ]
    result = summarise_views(scores)
    assert result["cross_view"]["error"]["mean"] == 2 and result["cross_view"]["error"]["count"] == 1
    assert result["cross_view"]["matches"] == 10 and result["psnr"]["model"]["mean"] == 22
    with pytest.raises(ValueError, match="no scores"):
        summarise_views([])


def test_refusals():
    videos, intrinsics, poses = rig_clip()
    with pytest.raises(ValueError, match="do not fit 3 views of 2 frames"):
        score_geometry(videos, intrinsics, poses[:, :1])
    with pytest.raises(ValueError, match="needs two or more views"):
        recover_rig_path([[]], intrinsics[:1], poses[:1], 240)
