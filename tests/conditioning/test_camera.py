"""Cameras: the convention by reprojection, relative poses, intrinsics that follow the picture, and Plücker rays."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_hf.conditioning.camera import (
    CameraPath,
    camera_centres,
    invert_pose,
    move_rays,
    plucker_rays,
    relative_extrinsics,
    representative_frames,
)
from cosmos_hf.conditioning.camera_paths import (
    KEYS,
    ORBITS,
    TRAJECTORIES,
    joystick_path,
    named_trajectory,
    rotation_about,
)
from cosmos_hf.data.video import fit_image

K = np.array([[100.0, 0, 64], [0, 110, 48], [0, 0, 1]])


def wandering(frames=9, seed=0):
    """A path that turns and moves, not starting at the origin."""
    rng = np.random.default_rng(seed)
    poses = [np.eye(4)]
    poses[0][:3, :3], poses[0][:3, 3] = rotation_about(rng.normal(0, 1, 3)), rng.normal(0, 2, 3)
    for _ in range(frames - 1):
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = rotation_about(rng.normal(0, 0.1, 3)), rng.normal(0, 0.2, 3)
        poses.append(step @ poses[-1])
    return CameraPath(K, np.stack(poses), 96, 128)


def points_before(path, seed=1):
    """World points that the first camera sees."""
    rng = np.random.default_rng(seed)
    seen = torch.from_numpy(np.c_[rng.uniform([-1, -1, 3], [1, 1, 6], (20, 3)), np.ones(20)])
    return (seen @ invert_pose(path.extrinsics[0]).mT)[:, :3]


def test_a_point_ahead_is_in_the_centre_right_is_right_and_down_is_down():
    path = CameraPath(K, np.eye(4)[None], 96, 128)
    pixels, depths = path.project([[0, 0, 2], [0.5, 0, 2], [0, 0.5, 2], [0, 0, -1]])
    torch.testing.assert_close(pixels[0, :3], torch.tensor([[64.0, 48], [89, 48], [64, 75.5]], dtype=torch.float64))
    assert depths[0].tolist() == [2, 2, 2, -1]


def test_relative_poses_see_the_same_and_begin_with_the_identity():
    path = wandering()
    relative = path.relative()
    torch.testing.assert_close(relative.extrinsics[0], torch.eye(4, dtype=torch.float64))
    points = points_before(path)
    in_first = torch.cat([points, torch.ones(20, 1)], dim=1) @ path.extrinsics[0].mT
    torch.testing.assert_close(relative.project(in_first[:, :3])[0], path.project(points)[0])
    other = relative_extrinsics(path.extrinsics, path.extrinsics[3])
    torch.testing.assert_close(other[3], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(invert_pose(path.extrinsics), torch.linalg.inv(path.extrinsics))


@pytest.mark.parametrize("size", [(48, 64), (96, 96), (40, 160), (192, 256)])
def test_intrinsics_follow_resizing_and_cutting(size):
    """A bright dot of the picture is where the moved camera projects its point, by the very rule of the pipelines."""
    y, x = np.mgrid[0:96, 0:128] + 0.5
    dot = np.array([80.0, 40.0])
    picture = Image.fromarray((255 * np.exp(-((x - dot[0]) ** 2 + (y - dot[1]) ** 2) / 18)).astype(np.uint8))
    moved = np.asarray(fit_image(picture, *size), dtype=float)
    yy, xx = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    seen = torch.tensor([(moved * xx).sum() / moved.sum(), (moved * yy).sum() / moved.sum()])
    path = CameraPath(K, np.eye(4)[None], 96, 128)
    point = np.linalg.inv(K) @ [*dot, 1] * 2
    torch.testing.assert_close(path.fit(*size).project([point])[0][0, 0], seen, atol=0.1, rtol=0)
    cut = path.crop(10, 20, 60, 90)
    assert (cut.height, cut.width) == (60, 90)
    assert cut.project([point])[0][0, 0].tolist() == pytest.approx([60, 30])


def test_representative_frames():
    assert representative_frames(17, 8) == [0, 4, 12]  # the 4th of each group of 8: frames 1..8 and 9..16
    assert representative_frames(9, 4) == [0, 2, 6]
    assert representative_frames(5, 1) == [0, 1, 2, 3, 4]
    assert representative_frames(1, 8) == [0]
    with pytest.raises(ValueError, match=r"num_frames must be 1 \+ k \* 8, got 16"):
        representative_frames(16, 8)


@pytest.mark.parametrize("compression", [(8, 8), (8, 4), (16, 1)])
def test_rays_go_through_what_their_pixels_see(compression):
    """A point on the ray of a latent pixel's centre satisfies p x d = o x d and projects back onto that centre."""
    spatial, temporal = compression
    path = wandering(17)
    rays = plucker_rays(path.intrinsics, path.extrinsics, 96, 128, spatial, temporal)
    frames = representative_frames(17, temporal)
    assert rays.shape == (6, len(frames), 96 // spatial, 128 // spatial) and rays.dtype == torch.float32
    moments, directions = rays.double()[:3], rays.double()[3:]
    torch.testing.assert_close(directions.norm(dim=0), torch.ones_like(directions[0]), atol=1e-6, rtol=0)
    assert (moments * directions).sum(0).abs().max() < 1e-5
    relative = path.relative()
    for latent, frame in enumerate(frames):
        row, column = 2, 3
        d = directions[:, latent, row, column]
        on_ray = torch.linalg.cross(d, moments[:, latent, row, column])  # the ray's point nearest to the origin
        pixels, depths = relative.project((on_ray + 5 * d)[None])
        assert depths[frame, 0] > 0
        torch.testing.assert_close(
            pixels[frame, 0], (torch.tensor([column, row]) + 0.5).double() * spatial, atol=1e-3, rtol=0
        )
    # The first frame's camera is the origin: its moments vanish.
    assert moments[:, 0].abs().max() < 1e-12


def test_rays_of_a_batch_of_views_and_of_one_world_for_all_views():
    paths = [wandering(9, seed) for seed in range(4)]
    intrinsics = torch.stack([path.intrinsics[0] for path in paths]).view(2, 2, 3, 3)
    extrinsics = torch.stack([path.extrinsics for path in paths]).view(2, 2, 9, 4, 4)
    rays = plucker_rays(intrinsics, extrinsics, 96, 128, 8, 4)
    assert rays.shape == (2, 2, 6, 3, 12, 16)
    torch.testing.assert_close(rays[1, 0], plucker_rays(K, paths[2].extrinsics, 96, 128, 8, 4))
    shared = plucker_rays(intrinsics, extrinsics, 96, 128, 8, 4, reference=extrinsics[:, :1, 0])
    torch.testing.assert_close(shared[:, 0], rays[:, 0])
    assert (shared[:, 1] - rays[:, 1]).abs().max() > 0.1


def test_moved_rays_are_those_of_another_reference():
    extrinsics = torch.stack([wandering(9, seed).extrinsics for seed in range(2)])
    intrinsics = wandering().intrinsics[:2]
    rays = plucker_rays(intrinsics, extrinsics, 96, 128, 8, 4)
    there = extrinsics[:, 5]
    moved = move_rays(rays, there @ torch.linalg.inv(extrinsics[:, 0]))
    torch.testing.assert_close(moved, plucker_rays(intrinsics, extrinsics, 96, 128, 8, 4, reference=there))


def test_windows_and_scale():
    path = wandering()
    part = path.window(2, 3, step=2)
    torch.testing.assert_close(part.extrinsics, path.extrinsics[[2, 4, 6]])
    with pytest.raises(ValueError, match="frames 4 to 10 are wanted of 9"):
        path.window(4, 7)
    doubled = path.scaled(2)
    torch.testing.assert_close(doubled.centres, 2 * path.centres)
    assert path.scaled(1 / path.extent()).extent() == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e * 1.1, "hold no rotation"),
        (lambda e: e.mT, "look transposed|last row"),
        (lambda e: e @ torch.diag(torch.tensor([1.0, -1, 1, 1])).double(), "mirror"),
        (lambda e: e[:, :2], r"must be \[\.\.\., 4, 4\]"),
        (lambda e: e[0], r"one per frame"),
        (lambda e: e * math.nan, "extrinsics hold NaN"),
    ],
)
def test_extrinsics_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        CameraPath(K, change(wandering().extrinsics), 96, 128)


@pytest.mark.parametrize(
    ("intrinsics", "message"),
    [
        (K.T, "transposed"),
        (np.diag([0.9, 1.2, 1]), "relative to the picture's size"),
        (np.diag([-90.0, 90, 1]), "must be positive"),
        (np.tile(K, (4, 1, 1)), r"one per frame \[9, 3, 3\]"),
        (K[:2], r"must be \[\.\.\., 3, 3\]"),
    ],
)
def test_intrinsics_that_are_none(intrinsics, message):
    with pytest.raises(ValueError, match=message):
        CameraPath(intrinsics, wandering().extrinsics, 96, 128)


def test_other_refusals():
    path = wandering()
    for arguments, message in (
        ((K, path.extrinsics, 90, 128), "multiples of 8, got 90"),
        ((K, path.extrinsics[0], 96, 128), r"must be \[\.\.\., T, 4, 4\]"),
        ((path.intrinsics[:5], path.extrinsics, 96, 128), "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            plucker_rays(*arguments)
    with pytest.raises(ValueError, match="3 names for 9 frames"):
        CameraPath(K, path.extrinsics, 96, 128, ("a", "b", "c"))
    with pytest.raises(ValueError, match="scale must be positive"):
        path.scaled(0)


# ---- named trajectories and the joystick: what a point before the camera does in the picture -----------------------


def drift(extrinsics, point=(0, 0, 2)):
    """How a point moves in the picture from the first frame to the last, and its depths."""
    pixels, depths = CameraPath(K, extrinsics, 96, 128).project([point])
    return (pixels[-1, 0] - pixels[0, 0]).tolist(), depths[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "right", "down"),
    [
        ("truck_left", 1, 0),
        ("truck_right", -1, 0),
        ("pedestal_up", 0, 1),
        ("pedestal_down", 0, -1),
        ("pan_left", 1, 0),
        ("pan_right", -1, 0),
        ("tilt_up", 0, 1),
        ("tilt_down", 0, -1),
        ("dolly_in", 0, 0),
        ("static", 0, 0),
        ("orbit_left", 0, 0),
        ("orbit_up", 0, 0),
    ],
)
def test_trajectories_move_the_picture_the_other_way(name, right, down):
    (x, y), depths = drift(named_trajectory(name, 9, distance=0.5, angle=10, depth=2))
    assert (np.sign(round(x, 6)), np.sign(round(y, 6))) == (right, down)
    assert (depths[-1] < depths[0] - 0.4) == (name == "dolly_in")


def test_an_orbit_keeps_its_distance_and_goes_to_its_side():
    path = CameraPath(K, named_trajectory("orbit_left", 9, angle=40, depth=3), 96, 128)
    torch.testing.assert_close(path.project([[0, 0, 3]])[1][:, 0], torch.full((9,), 3.0, dtype=torch.float64))
    assert path.centres[-1, 0] < -1 and path.centres[-1, 1].abs() < 1e-12
    assert camera_centres(named_trajectory("orbit_up", 9))[-1, 1] < -0.5  # y is down


def test_every_trajectory_is_a_camera_path_from_the_identity():
    for name in (*TRAJECTORIES, *ORBITS):
        path = CameraPath(K, named_trajectory(name, 5), 96, 128)
        torch.testing.assert_close(path.extrinsics[0], torch.eye(4, dtype=torch.float64))
    rolled = named_trajectory("roll_right", 3, angle=90)
    (x, y), _ = drift(rolled, (1, 0, 2))  # the camera turns clockwise: what was right goes up
    assert x == pytest.approx(-50) and y == pytest.approx(-55)


def test_the_joystick_goes_where_the_camera_looks():
    path = joystick_path("ww" + "e" * 30 + "w", step=1, turn=3)  # two ahead, a right angle to the right, one ahead
    assert camera_centres(path)[-1].tolist() == pytest.approx([1, 0, 2])
    assert len(path) == 34
    numbers = joystick_path([[0, 0, 0.5, 0, 0, 0], [0.1, 0.2, 0, 0, 0, 0]])
    torch.testing.assert_close(camera_centres(numbers)[-1], torch.tensor([0.1, -0.2, 0.5], dtype=torch.float64))
    assert joystick_path("").shape == (1, 4, 4)
    for one, other in ("ws", "ad", "rf", "qe"):
        torch.testing.assert_close(joystick_path(one + other)[-1], torch.eye(4, dtype=torch.float64))
    assert set(KEYS) == set("wsadrfqe.")


def test_unknown_names_and_moves():
    with pytest.raises(ValueError, match="unknown trajectory 'zoom'; there is static, dolly_in"):
        named_trajectory("zoom", 9)
    with pytest.raises(ValueError, match="unknown keys 'xz'"):
        joystick_path("wxz")
    with pytest.raises(ValueError, match=r"\[T - 1, 6\]"):
        joystick_path([[1, 2, 3]])
    with pytest.raises(ValueError, match="depth must be positive"):
        named_trajectory("orbit_left", 5, depth=0)
