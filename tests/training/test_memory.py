"""The memory of a run's state: against what a run really holds, and the rules of sharing."""

import pytest
import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from cosmos_hf.models import transformer_cosmos
from cosmos_hf.models.ar_cosmos import PRESETS as LANGUAGE
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.models.four_bit import four_bit_blocks
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.training.ema import PowerEMA
from cosmos_hf.training.memory import (
    GIB,
    LORA_TARGETS,
    METHODS,
    diffusion_step,
    estimate_memory,
    estimate_posttraining,
    language_step,
)


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


# ---- a step of post-training -----------------------------------------------------------------------------------------


def measured_peak(call) -> int:
    """Bytes that torch's own allocator gave out at the worst moment of a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    now = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def build(kind):
    torch.manual_seed(0)
    if kind == "diffusion":
        wide = dict(num_attention_heads=4, attention_head_dim=32, num_layers=4)
        model = CosmosWorldTransformer3D(**transformer_cosmos.PRESETS["tiny-video2world"] | wide)
        return model, diffusion_step, (3, 16, 16)
    wide = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, head_dim=48)
    return CosmosARForCausalLM(CosmosARConfig(**LANGUAGE["tiny"] | wide)), language_step, (3, 12, 16)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_step_holds_what_was_estimated(method, kind):
    """Weights and optimizer by their sizes, forward and backward by what the allocator says of a real step."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    model, run, shape = build(kind)
    if method == "qlora":
        four_bit_blocks(model)
    if method != "full":
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGETS[kind]))
    trained = [p for p in model.parameters() if p.requires_grad]
    held = measured_peak(lambda: run(model.train(), shape, 2, 8).backward())
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    with torch.device("meta"):
        blank = build(kind)[0]
    settings = dict(latent_shape=shape, batch_size=2, text_length=8, lora_rank=4, average=False)
    told = estimate_posttraining(blank, method, **settings, mixed_precision=False, gradient_checkpointing=False)
    assert (told["activations"] + told["gradients"]) * GIB == pytest.approx(held, rel=0.1)
    assert told["optimizer"] * GIB == pytest.approx(moments)
    if method != "qlora":  # whose small layers have a table each
        assert told["weights"] * GIB == pytest.approx(sum(p.nbytes for p in model.parameters()))


def test_methods_are_ordered_as_they_must_be():
    settings = dict(latent_shape=(4, 16, 16), text_length=32)
    totals = {method: estimate_posttraining("nano-video2world", method, **settings) for method in METHODS}
    sums = [totals[method]["total"] for method in ("full", "lora", "lora bfloat16", "qlora")]
    assert sums == sorted(sums, reverse=True)
    assert totals["lora"]["optimizer"] == totals["qlora"]["optimizer"] < 0.2 * totals["full"]["optimizer"]
    whole = estimate_posttraining("nano-video2world", "lora", **settings, gradient_checkpointing=False)
    assert whole["activations"] > 1.5 * totals["lora"]["activations"]
    twice = estimate_posttraining("nano-video2world", "lora", **settings, gradient_checkpointing=False, contrast=True)
    assert 1.5 < twice["activations"] / whole["activations"] <= 2
    shared = estimate_posttraining("nano-video2world", "lora", **settings, launch="fsdp2", processes=4)
    assert shared["weights"] == pytest.approx(totals["lora"]["weights"] / 4)
    for arguments, message in (
        (("70b",), "unknown model '70b'; there is 7b"),
        (("4b", "ptq"), "method must be one of full"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_posttraining(*arguments)
