"""The power-function average: its exponents, its weights against the closed form, swapping, saving."""

import pytest
import torch

from cosmos_hf.training.ema import PowerEMA, gamma_from_width


@pytest.mark.parametrize("s, gamma", [(0.10, 6.937), (0.05, 16.972), (0.025, 36.987)])
def test_exponents_of_the_reference(s, gamma):
    assert gamma_from_width(s) == pytest.approx(gamma, abs=1e-3)
    # the definition that the polynomial comes from
    gamma = gamma_from_width(s)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(s)


def followed(steps, s=0.1):
    """A module whose weight at step i is i, and its average."""
    module = torch.nn.Linear(1, 1, bias=False)
    ema = PowerEMA(module, s)
    for i in range(steps):
        torch.nn.init.constant_(module.weight, float(i))
        ema.update(module)
    return module, ema


def test_average_is_the_power_profile():
    steps, gamma = 200, gamma_from_width(0.1)
    _, ema = followed(steps)
    average = 0.0  # beta_i = (1 - 1 / (i + 1))^(gamma + 1): the first update takes the weights as they are
    for i in range(steps):
        beta = (i / (i + 1)) ** (gamma + 1)
        average = beta * average + (1 - beta) * i
    assert ema.average["weight"].item() == pytest.approx(average, rel=1e-5)
    # mean of t^gamma on [0, 1]
    assert average / steps == pytest.approx((gamma + 1) / (gamma + 2), abs=0.01)
    _, wide = followed(steps, s=0.25)
    assert wide.average["weight"] < ema.average["weight"]


def test_swapping_restores_the_weights_also_after_an_error():
    module, ema = followed(10)
    with ema.swapped_in(module) as averaged:
        assert averaged is module and module.weight.item() == pytest.approx(ema.average["weight"].item())
    assert module.weight.item() == 9
    with pytest.raises(RuntimeError), ema.swapped_in(module):
        raise RuntimeError
    assert module.weight.item() == 9 and ema.average["weight"].item() < 9


def test_frozen_parameters_are_left_out_and_half_weights_averaged_in_float32():
    module = torch.nn.Linear(2, 2).bfloat16()
    module.bias.requires_grad_(False)
    ema = PowerEMA(module)
    ema.update(module)
    assert set(ema.average) == {"weight"} and ema.average["weight"].dtype == torch.float32


def test_saved_state_continues_to_the_bit():
    module, ema = followed(10)
    other = PowerEMA(torch.nn.Linear(1, 1, bias=False), s=0.1)
    other.load_state_dict({**ema.state_dict(), "average": {"weight": ema.average["weight"].clone()}})
    torch.nn.init.constant_(module.weight, 50.0)
    ema.update(module)
    other.update(module)
    assert torch.equal(ema.average["weight"], other.average["weight"]) and other.step == 11
    with pytest.raises(ValueError, match="of other parameters"):
        PowerEMA(torch.nn.Linear(1, 1)).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="between 0 and 0.28"):
        PowerEMA(module, s=0.3)
