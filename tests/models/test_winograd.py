"""Convolutions in pairs against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from cosmos_hf.models import winograd
from cosmos_hf.models.video_layers import CausalConv3d


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])
def test_pairs_are_the_convolution(length):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, length + 2, 5, 4).double(), torch.randn(6, 4, 3).double(), torch.randn(6).double()
    taps = [tap[:, :, 0, 0] for tap in winograd.minimal_taps(weight[..., None])]
    y = winograd.convolve_pairs(x, taps, bias, F.linear)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight[..., None], bias).permute(0, 2, 3, 1)
    assert y.shape == (2, length, 5, 6)
    torch.testing.assert_close(y, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("kernel", "channels"), [((1, 3, 3), 64), ((3, 1, 1), 256)])
@pytest.mark.parametrize("size", [(4, 6, 5), (3, 7, 6), (1, 4, 4)])
def test_layers_are_no_less_exact(kernel, channels, size, monkeypatch):
    """Both ways in float32 against the one in float64; and the pairs are really taken, and only in inference."""
    torch.manual_seed(0)
    layer, x = CausalConv3d(channels, channels, kernel), torch.randn(2, *size, channels)
    calls, real = [], winograd.convolve_pairs
    monkeypatch.setattr("cosmos_hf.models.video_layers.convolve_pairs", lambda *a: calls.append(1) or real(*a))
    plain = layer(x)
    assert not calls and plain.requires_grad
    with torch.no_grad():
        pairs = layer(x)
        exact = layer.double()(x.double())
    assert bool(calls) == (kernel[0] == 1 or size[0] > 1)
    errors = [(y.double() - exact).abs().max().item() for y in (plain.detach(), pairs)]
    assert errors[1] < 5e-6 and errors[1] < 2 * errors[0]


def test_few_channels_stay_plain():
    x = torch.zeros(1, 2, 4, 4, 32)
    with torch.no_grad():
        assert not winograd.pays(x, torch.zeros(64, 32, 3, 3)) and winograd.pays(x, torch.zeros(64, 64, 3, 3))
        assert not winograd.pays(x, torch.zeros(64, 64, 3, 1)) and winograd.pays(x, torch.zeros(256, 256, 3, 1))
        half = torch.bfloat16
        assert not winograd.pays(x.to(half), torch.zeros(64, 64, 3, 3, dtype=half))
    assert not winograd.pays(x, torch.zeros(64, 64, 3, 3))
