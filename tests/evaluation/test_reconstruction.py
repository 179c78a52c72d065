"""Figures of reconstructions: known damage, means with intervals, refusals."""

import json

import pytest
import torch

from cosmos_hf.data.video import to_float
from cosmos_hf.evaluation.metrics import psnr
from cosmos_hf.evaluation.perceptual import PerceptualDistance
from cosmos_hf.evaluation.reconstruction import as_stored, evaluate_reconstruction


@pytest.fixture
def clips():
    videos = (torch.rand(3, 3, 3, 32, 32) * 200 + 25).to(torch.uint8)
    return [{"video": video, "key": f"c{i}"} for i, video in enumerate(videos)]


def test_known_damage(clips):
    report = evaluate_reconstruction(lambda video: video + 0.1, clips)
    assert json.loads(json.dumps(report)) == report
    assert [row["key"] for row in report["clips"]] == ["c0", "c1", "c2"]
    for row in report["clips"]:
        assert row["psnr"] == pytest.approx(26.02, abs=0.2) and row["flicker"] < 1e-5 and "epd" not in row
    psnrs = report["summary"]["psnr"]
    assert psnrs["count"] == 3 and psnrs["low"] <= psnrs["mean"] <= psnrs["high"]
    assert psnrs["mean"] == pytest.approx(sum(row["psnr"] for row in report["clips"]) / 3)


def test_figures_are_those_of_the_file(clips):
    """A difference that 8 bits cannot hold is no difference."""
    report = evaluate_reconstruction(lambda video: video + 0.001, clips)
    assert report["summary"]["psnr"]["mean"] == pytest.approx(100) and report["summary"]["ssim"]["mean"] > 0.9999
    levels = to_float(torch.arange(256, dtype=torch.uint8))
    torch.testing.assert_close(as_stored(levels), levels)
    assert as_stored(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]


def test_perceptual_distance_under_its_own_name(clips):
    one = evaluate_reconstruction(lambda video: video, clips[:1], PerceptualDistance())
    other = evaluate_reconstruction(lambda video: video.mean() + 0 * video, clips[:1], PerceptualDistance())
    assert one["summary"]["epd"]["mean"] < 1e-5 < other["summary"]["epd"]["mean"]


def test_single_frames_have_no_flicker(clips):
    report = evaluate_reconstruction(lambda video: video, [{"video": clips[0]["video"][:, :1], "key": "still"}])
    assert "flicker" not in report["summary"]


def test_refusals(clips):
    with pytest.raises(ValueError, match=r"c0: the reconstruction is \(1, 3, 2, 32, 32\)"):
        evaluate_reconstruction(lambda video: video[:, :, :2], clips)
    with pytest.raises(ValueError, match="c0: the reconstruction holds NaN"):
        evaluate_reconstruction(lambda video: video * float("nan"), clips)
    with pytest.raises(ValueError, match="no clips"):
        evaluate_reconstruction(lambda video: video, [])


def test_gradients_are_off(clips):
    weight = torch.nn.Parameter(torch.ones(()))
    seen = []

    def reconstruct(video):
        seen.append((video * weight).requires_grad)
        return video * weight

    evaluate_reconstruction(reconstruct, clips[:1])
    assert seen == [False]
    assert psnr(torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8)) == 100
