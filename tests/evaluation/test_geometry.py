"""Pose errors and Sampson errors against synthetic geometry, exactly; and recovered from ray-cast pictures, closely."""

import sys
from functools import cache

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.camera import CameraPath
from cosmos_hf.conditioning.camera_paths import joystick_path, named_trajectory, rotation_about
from cosmos_hf.evaluation.geometry import (
    align_scale,
    cross_view_sampson_error,
    fundamental_matrix,
    match_frames,
    path_errors,
    pose_errors,
    recover_poses,
    rotation_angles,
    sampson_distances,
    sampson_error,
    summarise_poses,
    temporal_sampson_error,
)
from textured_box import K, picture


def path(seed=0, frames=9):
    moves = np.random.default_rng(seed).normal(0, [0.2, 0.1, 0.2, 5, 3, 2], (frames - 1, 6))
    return joystick_path(moves)


def test_another_world_and_another_scale_are_no_error():
    truth = path()
    elsewhere = torch.eye(4, dtype=torch.float64)
    elsewhere[:3, :3], elsewhere[:3, 3] = (
        torch.from_numpy(rotation_about(np.array([1.0, 2, 3]))),
        torch.tensor([4.0, 5, 6]),
    )
    moved = truth.clone()
    moved[:, :3, 3] *= 0.3
    errors = pose_errors(moved @ elsewhere, truth)
    assert errors["rotation"] < 1e-6 and errors["translation"] < 1e-9 and errors["distance"] < 1e-9
    torch.testing.assert_close(align_scale(moved, truth), truth)
    whole = path_errors(moved @ elsewhere, truth)
    assert max(whole["ate"], whole["rpe_translation"], whole["rpe_rotation"]) < 1e-6
    centres = -(truth[:, :3, :3].mT @ truth[:, :3, 3:])[..., 0]
    assert whole["following"] == pytest.approx(float(0.7 * centres[1:].norm(dim=1).mean()))


@pytest.mark.parametrize("angle", [1e-4, 0.5, 30.0, 90.0, 179.0, 180.0])
def test_angles_are_exact_over_their_whole_range(angle):
    turned = torch.from_numpy(rotation_about(np.radians(angle) * np.array([0.6, 0.0, 0.8])))
    assert float(rotation_angles(torch.eye(3, dtype=torch.float64), turned)) == pytest.approx(angle, rel=1e-6)


def test_errors_of_known_size():
    """Every frame but the first turned by 3 degrees about its own centre; and each centre 0.1 aside of a straight way."""
    truth = named_trajectory("dolly_in", 5, distance=2.0)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = torch.from_numpy(rotation_about(np.radians([0, 3.0, 0])))
    turned = torch.cat([truth[:1], turn @ truth[1:]])
    errors = pose_errors(turned, truth)
    assert errors["rotation"] == pytest.approx(3) and errors["translation"] < 1e-9
    aside = truth.clone()
    aside[1:, 0, 3] += 0.1
    scale = 7.5 / (7.5 + 4 * 0.01)  # the centres' inner product over their square: 0.25 + 1 + 2.25 + 4
    away = [np.hypot(0.1 * scale, (1 - scale) * z) for z in (0.5, 1, 1.5, 2)]
    assert pose_errors(aside, truth)["translation"] == pytest.approx(np.mean(away) / 2)
    assert path_errors(aside, truth)["following"] == pytest.approx(0.1)
    still = named_trajectory("pan_left", 5)
    assert np.isnan(pose_errors(still, still)["translation"]) and pose_errors(still, still)["rotation"] < 1e-6


def test_a_way_back_is_not_taken_for_the_way_there():
    there, back = named_trajectory("dolly_in", 5), named_trajectory("dolly_out", 5)
    assert pose_errors(back, there)["translation"] == pytest.approx(0.625)  # scaled to nothing: the mean of the way


def test_summary_counts_what_failed():
    good = dict(rotation=1.0, translation=0.1, distance=0.2)
    summary = summarise_poses([good, None, dict(good, rotation=3.0, translation=float("nan")), None])
    assert summary == dict(success_rate=0.5, count=4, rotation=2.0, translation=0.1, distance=0.2)
    assert summarise_poses([None])["rotation"] is None
    with pytest.raises(ValueError, match="no clips"):
        summarise_poses([])


def seen_by_both(count=200):
    cameras = CameraPath(K, path(3, 2), 240, 320)
    points = np.random.default_rng(0).uniform([-1, -1, 3], [1, 1, 6], (count, 3))
    pixels, _ = cameras.project(points)
    return cameras, pixels


def test_matches_of_a_rigid_scene_have_no_sampson_error():
    cameras, pixels = seen_by_both()
    fundamental = fundamental_matrix(K, cameras.extrinsics[0], K, cameras.extrinsics[1])
    assert sampson_distances(*pixels, fundamental).max() < 1e-8
    swapped = fundamental_matrix(K, cameras.extrinsics[1], K, cameras.extrinsics[0])
    torch.testing.assert_close(
        sampson_distances(pixels[1], pixels[0], swapped + 0), torch.zeros(200).double(), atol=1e-8, rtol=0
    )


def test_the_sampson_error_is_the_distance_to_the_nearest_agreeing_match():
    """For small errors: a point moved d pixels off its epipolar line can be mended by moving both points, by less than d."""
    cameras, pixels = seen_by_both()
    fundamental = fundamental_matrix(K, cameras.extrinsics[0], K, cameras.extrinsics[1])
    ones = torch.ones(200, 1, dtype=torch.float64)
    lines_b = torch.cat([pixels[0], ones], dim=1) @ fundamental.mT
    lines_a = torch.cat([pixels[1], ones], dim=1) @ fundamental
    normal = lines_b[:, :2] / lines_b[:, :2].norm(dim=1, keepdim=True)
    error = sampson_distances(pixels[0], pixels[1] + 0.5 * normal, fundamental)
    b, a = lines_b[:, :2].norm(dim=1), lines_a[:, :2].norm(dim=1)
    torch.testing.assert_close(error, 0.5 * b / (a**2 + b**2).sqrt(), rtol=0.02, atol=1e-4)
    along = torch.stack([-normal[:, 1], normal[:, 0]], dim=1)
    assert sampson_distances(pixels[0], pixels[1] + 5 * along, fundamental).max() < 1e-8


def test_refusals():
    with pytest.raises(ValueError, match="in one place"):
        fundamental_matrix(K, path()[0], K, named_trajectory("pan_left", 2)[1])
    with pytest.raises(ValueError, match=r"matched points \[N, 2\] twice"):
        sampson_distances(np.zeros((3, 2)), np.zeros((4, 2)), np.eye(3))
    with pytest.raises(ValueError, match="of one length of at least 2"):
        pose_errors(path(frames=4), path(frames=5))


def test_without_pycolmap_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(ImportError, match=r"cosmos-hf\[geometry\]"):
        match_frames(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint8))


# ---- pictures of a textured box, by casting rays: what every pixel sees is known -------------------------------------


@cache
def box_clip():
    poses = joystick_path(np.tile([0.12, 0.02, 0.06, 1.5, 0.5, 0], (6, 1)))
    return poses, np.stack([picture(pose) for pose in poses])


@pytest.fixture
def needs_pycolmap():
    pytest.importorskip("pycolmap", reason="needs the extra cosmos-hf[geometry]")


def test_frames_of_a_rigid_scene_have_a_small_error_and_broken_ones_a_large_one(needs_pycolmap):
    poses, frames = box_clip()
    known = fundamental_matrix(K, poses[0], K, poses[2])
    wrong = fundamental_matrix(K, poses[0], K, named_trajectory("pedestal_up", 2)[1])
    good = sampson_error(frames[0], frames[2], known)
    assert good < 0.5 and sampson_error(frames[0], frames[2], wrong) > 5 * good
    true = temporal_sampson_error(frames[:4])
    assert true["error"] < 0.5 and (true["pairs"], true["failed"]) == (3, 0)
    # Rows pushed aside by waves of another phase in every frame: no rigid scene moves so.
    y = np.arange(240)
    waves = frames[:4].copy()
    for t, frame in enumerate(waves):
        for row in y:
            frame[row] = np.roll(frame[row], round(4 * np.sin(0.2 * row + 2 * t)), axis=0)
    assert temporal_sampson_error(waves)["error"] > 4 * true["error"]
    blank = temporal_sampson_error(np.zeros((3, 64, 64, 3), np.uint8))
    assert np.isnan(blank["error"]) and blank["failed"] == 2


def test_views_of_a_rig(needs_pycolmap):
    poses, frames = box_clip()
    videos = {"a": frames[:2], "b": frames[2:4]}
    rig = {("a", "b"): fundamental_matrix(K, poses[0], K, poses[2])}
    assert cross_view_sampson_error(videos, [("a", "b")], rig)["error"] < 0.5
    assert cross_view_sampson_error(videos, [("a", "b")])["pairs"] == 2
    apart = {"a": frames[:2], "b": np.stack([picture(named_trajectory("pan_left", 2, angle=150)[1])] * 2)}
    failed = cross_view_sampson_error(apart, [("a", "b")], rig)
    assert failed["failed"] == 2 or failed["error"] > 5


def test_poses_are_recovered_from_pictures(needs_pycolmap, capfd):
    poses, frames = box_clip()
    found = recover_poses(frames, K)
    assert found is not None and found.frames == list(range(7))
    errors = pose_errors(found.extrinsics, poses)
    assert errors["rotation"] < 0.5 and errors["translation"] < 0.03
    output = capfd.readouterr()
    assert output.out == output.err == ""  # a library does not print
    assert recover_poses(np.zeros((4, 64, 64, 3), np.uint8) + 128, K) is None
