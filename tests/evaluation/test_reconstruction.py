"""Figures of reconstructions: known damage, means with intervals, refusals."""

import json
import re

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


@pytest.fixture
def moving():
    """Three clips of 9 frames: a texture that moves by two pixels a frame."""
    clips = []
    for i in range(3):
        texture = torch.rand(3, 1, 32, 48)
        frames = torch.cat([texture.roll(2 * t + i, 3) for t in range(9)], 1)
        clips.append({"video": (frames * 200 + 25).to(torch.uint8), "key": f"m{i}"})
    return clips


@pytest.mark.parametrize("shift", [1, -1, 2])
def test_a_shifted_reconstruction_is_noticed(moving, shift):
    """One that lags (roll by +1: frame t holds what was at t - 1), one that is early, one by two; also where it is noisy."""

    def shifted(video):
        return (video.roll(shift, 2) + 0.2 * torch.randn_like(video)).clamp(-1, 1)

    with pytest.raises(ValueError, match=re.escape(f"reconstruction fits frame t {-shift:+d} of the video")):
        evaluate_reconstruction(shifted, moving)
    report = evaluate_reconstruction(shifted, moving, allow_shift=True)
    assert [row["frame_offset"] for row in report["clips"]] == [-shift] * 3 and report["alignment"] == {str(-shift): 3}


def test_a_noisy_and_a_still_reconstruction_are_not_shifted(moving, clips):
    report = evaluate_reconstruction(lambda video: (video + 0.5 * torch.randn_like(video)).clamp(-1, 1), moving)
    assert report["alignment"] == {"0": 3}
    still = [{"video": clip["video"][:, :1].expand(-1, 5, -1, -1), "key": "still"} for clip in clips]
    assert evaluate_reconstruction(lambda video: video.roll(1, 2), still)["alignment"] == {"0": 3}


def test_frechet_distances_under_their_names(moving):
    class Colours:
        metric = "colours"

        def __call__(self, video):
            return video.mean((3, 4)).transpose(1, 2).flatten(0, 1)

    report = evaluate_reconstruction(lambda video: (video + 0.1).clamp(-1, 1), moving, extractors=[Colours()])
    assert report["frechet"]["colours"] == {"distance": pytest.approx(0.03, rel=0.2), "count": 27, "features": 3}


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
