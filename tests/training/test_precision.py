"""Mixed precision: what stays float32, how fp16 finds its loss scale, what is refused. As far as a processor can show it."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cosmos_hf.training import loop
from cosmos_hf.training.checkpoints import MOST_OVERFLOWS, TrainingError
from loop_problem import losses, plain_loss, run


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_bf16_keeps_weights_losses_and_the_average_in_float32(tmp_path):
    kinds = set()

    def watched(model, batch):
        loss, logs = plain_loss(model, batch)
        kinds.update({model(batch["x"]).dtype, loss.dtype})
        return loss, logs

    model = run(tmp_path / "bf16", loss=watched, mixed_precision="bf16", max_steps=20)
    AcceleratorState._reset_state()
    plain = run(tmp_path / "float32", loss=plain_loss, max_steps=20)
    assert kinds == {torch.float32} and model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, model.weight.bfloat16().float())
    exported = torch.load(tmp_path / "bf16" / "export" / "model.pt")
    assert exported["weight"].dtype == torch.float32
    torch.testing.assert_close(model.weight, plain.weight, rtol=0.02, atol=0.02)
    first = [losses(tmp_path / name)[0][1] for name in ("bf16", "float32")]
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.02)


@pytest.fixture
def fp16(monkeypatch):
    """fp16 under a loss scale of 2**26, at which every gradient overflows; on the processor, which `start_accelerator` refuses."""

    def start(config):
        accelerator = Accelerator(mixed_precision="fp16")
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**26)
        return accelerator

    monkeypatch.setattr(loop, "start_accelerator", start)


def test_fp16_overflows_are_skipped_until_the_scale_fits(tmp_path, fp16):
    run(tmp_path, loss=plain_loss, mixed_precision="fp16", max_steps=80, warmup_steps=0, ema_width=0, cooldown_steps=0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if "grad_norm" not in line]
    assert 5 < len(skipped) < MOST_OVERFLOWS
    assert skipped == lines[: len(skipped)]  # all at the beginning: then the scale is found
    history = [line["loss"] for line in lines]
    assert sum(history[-5:]) < 0.3 * sum(history[:5])


def test_skipped_steps_do_not_advance_the_schedule_nor_the_average(tmp_path, fp16):
    run(tmp_path, loss=plain_loss, mixed_precision="fp16", max_steps=4, warmup_steps=10)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(line["lr"] == pytest.approx(0.05 * 1e-6) for line in lines)
    exported = torch.load(tmp_path / "export" / "model.pt")
    torch.manual_seed(1)
    torch.testing.assert_close(exported["weight"], torch.nn.Linear(2, 1).weight.detach(), rtol=0, atol=0)


def test_fp16_that_never_fits_stops(tmp_path, fp16):
    def broken(model, batch):
        return (model(batch["x"]) * 0).abs().sqrt().sum(), {}  # 0, with a gradient that is no number

    with pytest.raises(TrainingError, match=f"at step {MOST_OVERFLOWS - 1} after {MOST_OVERFLOWS} overflows in a row"):
        run(tmp_path, loss=broken, mixed_precision="fp16", max_steps=100)


def test_a_gradient_that_is_no_number_stops_at_once_without_a_scale(tmp_path):
    def broken(model, batch):
        loss, logs = plain_loss(model, batch)
        return loss + (model(batch["x"]) * 0).abs().sqrt().sum(), logs

    with pytest.raises(TrainingError, match="gradient norm nan at step 0. There is no checkpoint yet"):
        run(tmp_path, loss=broken, max_steps=3)


def test_fp16_on_a_processor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU; on a processor take bf16 or no"):
        run(tmp_path, loss=plain_loss, mixed_precision="fp16", max_steps=1)


def test_fsdp_that_accelerate_makes_ddp_of_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="asks for FSDP, accelerate made NO of it"):
        run(tmp_path, loss=plain_loss, max_steps=1)
