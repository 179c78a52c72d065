"""The memory of a run's state: against what a run really holds, and the rules of sharing."""

import pytest
import torch

from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.training.ema import PowerEMA
from cosmos_hf.training.memory import GIB, estimate_memory


def test_against_a_run_on_one_device():
    model = CosmosVideoTokenizer(**PRESETS["tiny"])
    optimizer, ema = torch.optim.AdamW(model.parameters()), PowerEMA(model)
    model(torch.zeros(1, 3, 5, 16, 16)).sample.square().mean().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    held = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimizer": sum(t.nbytes for t in moments),
        "average": sum(t.nbytes for t in ema.average.values()),
    }
    told = estimate_memory(sum(p.numel() for p in model.parameters()))
    for name, size in held.items():
        assert told[name] * GIB == pytest.approx(size), name
    assert told["total"] * GIB == pytest.approx(sum(held.values()))


def test_sharing_and_frozen_bases():
    whole = estimate_memory(7.24e9, "ddp", 8)
    assert whole["total"] == pytest.approx(20 * 7.24e9 / GIB)
    assert estimate_memory(7.24e9, "fsdp2", 8)["total"] == pytest.approx(whole["total"] / 8)
    half = estimate_memory(7.24e9, "zero2", 8)
    assert half["weights"] == whole["weights"] and half["optimizer"] == whole["optimizer"] / 8
    lora = estimate_memory(7.24e9 + 5e7, trained=5e7, base="bfloat16", mixed_precision=True)
    assert lora["weights"] == pytest.approx((2 * 7.24e9 + 4 * 5e7) / GIB) and lora["total"] < 0.1 * whole["total"] + 5
    qlora = estimate_memory(7.24e9 + 5e7, trained=5e7, base="nf4")
    assert qlora["weights"] < 0.3 * lora["weights"] and qlora["optimizer"] == lora["optimizer"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(launch="tpu"), "launch must be one of one, ddp"),
        (dict(base="int3"), "base one of float32"),
        (dict(base="nf4"), "set trained"),
        (dict(trained=20.0), "trained <= num_parameters"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(10.0, **settings)
