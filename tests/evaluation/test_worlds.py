"""Scores of predicted futures, on a made world: a red square that crosses a textured floor and casts a shadow."""

import json

import pytest
import torch

from cosmos_hf.evaluation.worlds import (
    background_plate,
    estimate_foreground,
    latent_l2,
    overlap,
    score_future,
    summarise_futures,
)
from tiny_tokenizers import tiny_video

FRAMES, HEIGHT, WIDTH, SIDE = 12, 32, 64, 8


@pytest.fixture
def world():
    """(video [1, 3, T, H, W], masks [1, T, H, W]): the square moves 4 pixels a frame, its shadow below it."""
    floor = 0.4 + 0.2 * torch.rand(3, 1, HEIGHT, WIDTH)
    video, masks = floor.repeat(1, FRAMES, 1, 1), torch.zeros(1, FRAMES, HEIGHT, WIDTH, dtype=torch.uint8)
    for t in range(FRAMES):
        columns = slice(4 * t, 4 * t + SIDE)
        video[:, t, 20:26, columns] *= 0.75  # the shadow
        video[:, t, 8 : 8 + SIDE, columns] = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
        masks[:, t, 8 : 8 + SIDE, columns] = 2
    return video[None] * 2 - 1, masks


def test_plate_is_the_floor_alone(world):
    video, masks = world
    plate, known = background_plate(video, masks)
    assert known.all() and plate.shape == (1, 3, 1, HEIGHT, WIDTH)
    assert plate[0, 0].max() < 0.3  # no red of the square
    rest = masks.clone()
    rest[:, :, :4, :4] = 3  # something that never moves: what is behind it is not known
    assert not background_plate(video, rest)[1][0, 0, :4, :4].any()
    with pytest.raises(ValueError, match="do not fit"):
        background_plate(video, masks[:, 1:])


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.06])
def test_estimate_finds_the_square_and_not_its_shadow(world, with_masks, noise):
    video, masks = world
    plate, known = background_plate(video, masks if with_masks else None)
    estimate = estimate_foreground(video + noise * torch.randn_like(video), plate, known)
    found = overlap(estimate, masks > 0)
    assert found.mean() > 0.6
    assert not estimate[:, :, 22:24].float().mean() > 0.05  # the shadow


def test_overlap_by_hand():
    a, b = torch.zeros(2, 1, 3, 2, 4, dtype=torch.bool)
    a[0, 0, 0, :2] = b[0, 0, 0, 1:4] = True
    a[0, 1] = b[0, 1] = True
    iou = overlap(a, b)[0]
    assert iou[0] == 0.25 and iou[1] == 1 and torch.isnan(iou[2])


def test_rows_are_ordered_as_they_must_be(world):
    """A right prediction reaches the ceiling; one that runs the wrong way does not; stills have no motion."""
    truth, masks = world
    good = (truth + 0.02 * torch.randn_like(truth)).clamp(-1, 1)
    scores = score_future(good, truth, 2, masks)
    assert scores.keys() == {"model", "copy_last_frame", "mean_frame", "truth"}
    assert scores["model"]["psnr"].shape == (1, FRAMES - 2)
    mean = {row: {m: float(v.nanmean()) for m, v in values.items()} for row, values in scores.items()}
    assert mean["truth"]["psnr"] == pytest.approx(100) and mean["truth"]["motion"] == pytest.approx(1)
    assert mean["truth"]["iou"] > 0.6 and abs(mean["model"]["iou"] - mean["truth"]["iou"]) < 0.1
    assert mean["model"]["psnr"] > mean["mean_frame"]["psnr"] > mean["copy_last_frame"]["psnr"]
    assert mean["copy_last_frame"]["iou"] < 0.2 and mean["copy_last_frame"]["motion"] == 0
    wrong = torch.cat([truth[:, :, :2], truth[:, :, :2].flip(2).repeat(1, 1, 5, 1, 1)], dim=2)
    assert score_future(wrong, truth, 2, masks)["model"]["iou"].nanmean() < 0.3


def test_without_masks_the_truth_is_the_reference(world):
    truth, _ = world
    scores = score_future(truth, truth, 1)
    assert (scores["truth"]["iou"] == 1).all() and (scores["model"]["iou"] == 1).all()
    assert "copy_last_frame" not in score_future(truth, truth, 0)


def test_summary(world):
    truth, masks = world
    scores = [
        score_future((truth + s * torch.randn_like(truth)).clamp(-1, 1), truth, 1, masks) for s in (0.02, 0.05, 0.1)
    ]
    report = summarise_futures(scores, horizons=(8, 16))
    assert json.loads(json.dumps(report)) == report
    psnrs = report["model"]["psnr"]
    assert psnrs.keys() == {"mean", "frame_8"}  # eleven predicted frames have no sixteenth
    expected = sum(float(s["model"]["psnr"][0, 7]) for s in scores) / 3
    assert psnrs["frame_8"]["mean"] == pytest.approx(expected) and psnrs["frame_8"]["count"] == 3
    gain = report["model"]["gain"]["mean"]["mean"]
    assert gain == pytest.approx(psnrs["mean"]["mean"] - report["copy_last_frame"]["psnr"]["mean"]["mean"], abs=1e-4)
    empty = summarise_futures([score_future(truth, truth, 1, torch.zeros_like(masks))])
    assert empty["truth"]["psnr"]["mean"]["count"] == 1
    with pytest.raises(ValueError, match="no scores"):
        summarise_futures([])


def test_refusals(world):
    truth, masks = world
    with pytest.raises(ValueError, match="differ in shape"):
        score_future(truth[:, :, 1:], truth, 1, masks)
    for count in (-1, FRAMES):
        with pytest.raises(ValueError, match=r"must be in 0\.\.11"):
            score_future(truth, truth, count, masks)
    with pytest.raises(ValueError, match="NaN"):
        score_future(truth * float("nan"), truth, 1, masks)


def test_latent_l2_is_of_the_predicted_frames():
    torch.manual_seed(0)
    vae = tiny_video(latents_mean=[0.0] * 16, latents_std=[0.5] * 16)
    truth = [torch.rand(3, 9, 32, 32) * 2 - 1 for _ in range(2)]
    assert latent_l2(vae, truth, truth, 1)["mean"] == 0
    other = [torch.cat([-video[:, :1], video[:, 1:]], 1) for video in truth]  # the given frame alone
    whole, predicted = (latent_l2(vae, other, truth, count)["mean"] for count in (0, 1))
    assert whole > predicted
    a, b = (vae.normalize(vae.encode(torch.stack(clips)).latents)[:, :, 1:] for clips in (truth, truth[::-1]))
    assert latent_l2(vae, truth, truth[::-1], 1)["mean"] == pytest.approx((a - b).square().mean().item(), rel=1e-5)
