"""PSNR, SSIM and flicker against values worked out by hand and against scikit-image's."""

import numpy as np
import pytest
import torch

from cosmos_hf.evaluation.metrics import bootstrap_interval, flicker, psnr, ssim


def video(*shape):
    return torch.rand(*shape) * 2 - 1


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 2, 8, 8)
    b = a.clone()
    b[0, :, 1] = 0.2  # a tenth of the range: 20 dB
    b[1] = 2 / 255  # one grey level: 48.13 dB
    torch.testing.assert_close(psnr(a, b), torch.tensor([[100, 20], [48.1308, 48.1308]]), rtol=0, atol=1e-3)
    assert psnr(a, b + 5)[0, 0] == psnr(a, torch.ones_like(a))[0, 0]  # clamped to the range first


def test_ssim_is_scikit_images():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a = video(1, 3, 2, 24, 32)
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    theirs = [
        structural_similarity(
            *((v[0, :, t].permute(1, 2, 0).double().numpy() + 1) / 2 for v in (a, b)),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2,
            data_range=1.0,
        )
        for t in range(2)
    ]
    np.testing.assert_allclose(ssim(a, b)[0].numpy(), theirs, atol=2e-5)


def test_ssim_ends():
    a = video(1, 3, 1, 16, 16)
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-5) and ssim(a, -a).item() < 0
    with pytest.raises(ValueError, match="smaller than the window"):
        ssim(a[..., :8], a[..., :8])


def test_flicker_sees_change_not_error():
    a = video(2, 3, 4, 8, 8)
    assert flicker(a, a + 0.5).max() < 1e-6  # a constant error does not flicker
    b = a.clone()
    b[1, :, ::2] += 0.25
    torch.testing.assert_close(flicker(b, a), torch.tensor([0.0, 0.25]))
    with pytest.raises(ValueError, match="at least 2 frames"):
        flicker(a[:, :, :1], a[:, :, :1])


@pytest.mark.parametrize("metric", [psnr, ssim, flicker])
def test_unfit_pairs_are_refused(metric):
    a = video(2, 3, 4, 16, 16)
    for b in (a[:1], a[0], (a * 100).to(torch.uint8)):
        with pytest.raises(ValueError, match="need two float videos"):
            metric(a, b)


def test_bootstrap_interval_covers_the_mean():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(100):
        low, high = bootstrap_interval(torch.randn(40, generator=generator) + 3, samples=400)
        hits += low < 3 < high
    assert 85 <= hits <= 100
    values = torch.randn(200, generator=generator)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 200**0.5, rel=0.15)
    assert bootstrap_interval(values) == (low, high)
    for bad in (torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="finite numbers"):
            bootstrap_interval(bad)
