"""Optical flow: a known shift is found, warping undoes it, and the warp error sees shimmer but no error that moves along."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cosmos_hf.evaluation.optical_flow import DISFlow, load_estimator, visible, warp, warp_error


@pytest.fixture
def texture():
    """Smooth noise [1, 3, 64, 96] in [-1, 1]."""
    grey = F.interpolate(torch.rand(1, 1, 12, 18) * 2 - 1, (64, 96), mode="bicubic").clamp(-1, 1)
    return grey.expand(-1, 3, -1, -1).contiguous()


def no_flow(first, second):
    return torch.zeros(len(first), 2, *first.shape[2:])


def test_a_known_shift_is_found(texture):
    """What is at (x, y) is seen at (x + 3, y + 2) in the second frame."""
    second = texture.roll((2, 3), (2, 3))
    flow = DISFlow()(texture, second)
    assert flow.shape == (1, 2, 64, 96)
    middle = flow[0, :, 16:-16, 16:-16].mean((1, 2))
    torch.testing.assert_close(middle, torch.tensor([3.0, 2.0]), atol=0.2, rtol=0)
    seen, inside = warp(second, flow)
    inner = (..., slice(12, -12), slice(12, -12))
    assert (seen - texture)[inner].abs().mean() < 0.25 * (second - texture)[inner].abs().mean()
    assert inside[0, 0, 10:-10, 10:-10].all()


def test_warp_by_hand():
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[:, 0] = 1.5
    seen, inside = warp(ramp, flow)
    assert seen[0, 0, 0].tolist() == [1.5, 2.5, 3.5, 4, 4]
    assert inside[0, 0, 0].tolist() == [True, True, True, False, False]
    assert not visible(flow, flow).any() and visible(flow, -flow)[0, 0, :, :3].all()


def test_an_error_that_moves_along_costs_less_than_one_that_stays(texture):
    video = torch.stack([texture[0].roll(3 * t, 2) for t in range(4)], 1)[None]
    stain = 0.3 * F.interpolate(torch.randn(1, 1, 16, 24), (64, 96), mode="bicubic").expand(-1, 3, -1, -1)
    moving = torch.stack([stain[0].roll(3 * t, 2) for t in range(4)], 1)[None]
    staying = stain[:, :, None].expand(-1, -1, 4, -1, -1)
    shimmer = staying * torch.tensor([1.0, -1, 1, -1]).view(1, 1, 4, 1, 1)
    costs = [float(warp_error(error, video, DISFlow())) for error in (0 * moving, moving, staying, shimmer)]
    assert costs[0] == 0 and costs[1] < 0.4 * costs[2] < 0.4 * costs[3]


def test_gradient_reaches_the_reconstruction_only(texture):
    video = torch.stack([texture[0], texture[0].roll(2, 2)], 1)[None]
    error = torch.randn_like(video).requires_grad_()
    warp_error(error, video, DISFlow()).backward()
    assert error.grad.abs().sum((1, 3, 4)).min() > 0


def test_estimators_can_be_exchanged(texture, monkeypatch):
    monkeypatch.setitem(sys.modules, "flow_of_ones_own", SimpleNamespace(Still=lambda: no_flow))
    still = load_estimator("flow_of_ones_own:Still")
    assert isinstance(load_estimator("dis"), DISFlow)
    error = torch.randn(1, 3, 3, 64, 96)
    video = texture[:, :, None].expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(warp_error(error, video, still), error.diff(dim=2).abs().mean())


@pytest.mark.parametrize("name", ["raft", "no_such_module:raft", "torch:no_such_name"])
def test_unknown_estimators_are_refused(name):
    with pytest.raises(ValueError, match="flow_estimator"):
        load_estimator(name)


def test_missing_opencv_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        DISFlow()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="preset must be one of ultrafast"):
        DISFlow("slow")
