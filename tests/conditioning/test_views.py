"""Names of views, the frames that are given in training, and trajectories."""

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.action import ActionSpec
from cosmos_hf.conditioning.camera_paths import joystick_path
from cosmos_hf.conditioning.frames import condition_indicator
from cosmos_hf.conditioning.trajectory import trajectory_points, trajectory_spec, trajectory_vector
from cosmos_hf.conditioning.views import check_view_names, draw_given_frames, join_views, pick_views


def test_views_lie_one_after_the_other():
    parts = torch.randn(2, 3, 16, 4, 5)
    joined = join_views(parts)
    assert joined.shape == (2, 16, 12, 5) and torch.equal(joined[:, :, 4:8], parts[:, 1])
    assert torch.equal(pick_views(joined, (2, 0), 3, 2), torch.cat([parts[:, 2], parts[:, 0]], dim=2))
    indicator = condition_indicator(6, torch.tensor([[1, 0, 2], [0, 2, 0]]))
    assert indicator.flatten(1).tolist() == [[1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("front", "must be a list of names"),
        (["front", 1], "must be a list of names"),
        (["front", "front"], "different names"),
        ([], "different names"),
        (["front", "left"], "2 names .front, left. for a model of 3 views"),
    ],
)
def test_names_that_are_none_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        check_view_names(names, 3)
    with pytest.raises(ValueError, match="8 latent frames must be a multiple of the 3 views"):
        condition_indicator(8, torch.zeros(1, 3))


def test_every_way_of_giving_frames_is_drawn():
    """0 to 2 first frames, of all views or of some; whole views in about the share that was asked for, never all of them."""
    torch.manual_seed(0)
    counts = draw_given_frames(4000, 3, 5, 2, 0.3)
    whole = counts == 5
    assert whole.any(1).float().mean() == pytest.approx(0.3, abs=0.03) and not whole.all(1).any()
    assert whole.float().mean(0).min() > 0.1  # every view has its turn
    first = counts[~whole.any(1)]
    equal = (first == first[:, :1]).all(1)
    assert set(first.flatten().tolist()) == {0, 1, 2} and 0.3 < equal.float().mean() < 0.9
    assert all(len(set(row.tolist()) - {0}) <= 1 for row in first)  # n frames or none
    assert draw_given_frames(50, 1, 5, 2, 1.0).max() == 2
    assert set(draw_given_frames(200, 2, 5, 2, 0.0, least=1)[:, 0].tolist()) == {
        0,
        1,
        2,
    }  # 0: half of the views of a sample
    assert (draw_given_frames(200, 2, 5, 1, 0.0, least=1) == 1).any(1).sum() > 150
    assert not (draw_given_frames(100, 3, 5, 2, 0.0) == 5).any()


def test_a_trajectory_is_the_way_of_the_camera():
    poses = joystick_path(np.tile([0.0, 0.0, 0.5, 0, 0, 0], (16, 1)))  # half a metre forward a frame
    points = trajectory_points(poses, fps=5, num_points=64)
    assert points.shape == (64, 3)
    torch.testing.assert_close(points[:, 2], torch.linspace(8 / 64, 8, 64))
    assert points[:, :2].abs().max() < 1e-6
    world = torch.eye(4, dtype=torch.float64)
    world[:3, 3] = torch.tensor([3.0, -1, 2])
    torch.testing.assert_close(trajectory_points(poses @ world, fps=5), points)  # in the first camera's axes
    torch.testing.assert_close(trajectory_points(poses, 5, 8, rate=10.0), points[1:16:2])
    with pytest.raises(ValueError, match="the path lasts 3.2 s, 64 points at 10 per second 6.4 s"):
        trajectory_points(poses, 5, 64, rate=10.0)
    with pytest.raises(ValueError, match="of at least 2 frames"):
        trajectory_points(poses[:1], 5)


def test_a_trajectory_has_its_spec(tmp_path):
    points = trajectory_points(joystick_path(np.tile([0.1, 0.0, 0.5, 0, 0, 0], (16, 1))), 5, 8)
    spec = trajectory_spec(rate=2.5).with_statistics([points], "range")
    vector = trajectory_vector(spec, points, 8)
    assert vector.shape == (1, 24) and vector.abs().max() == pytest.approx(1, abs=1e-5)
    spec.save(tmp_path)
    assert ActionSpec.load(tmp_path) == spec
    with pytest.raises(ValueError, match=r"a trajectory is 9 points \[9, 3\], 2.5 per second, got \(8, 3\)"):
        trajectory_vector(spec, points, 9)
    with pytest.raises(ValueError, match="the action 'right' goes from"):
        trajectory_vector(spec, 10 * points, 8)
    with pytest.raises(ValueError, match="kind must be one of delta, absolute, trajectory"):
        ActionSpec(("x",), ("m",), "here", "relative", 5)
