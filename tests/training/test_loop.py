"""The training loop: exact resumption, guards, checkpoints, schedules; one process and two."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loop_problem
from cosmos_hf.training.config import RunConfig
from cosmos_hf.training.loop import Stop, TrainingError, checkpoints, learning_rate_factor, newest_checkpoint
from loop_problem import losses, plain_loss, run


def test_it_learns(tmp_path):
    run(tmp_path, max_steps=150)
    history = [loss for _, loss, _ in losses(tmp_path)]
    assert sum(history[-10:]) / 10 < 0.05 * history[0]


def test_resumed_run_repeats_every_loss_to_the_bit(tmp_path):
    straight = run(tmp_path / "straight", max_steps=7)
    run(tmp_path / "cut", max_steps=3)
    resumed = run(tmp_path / "cut", max_steps=7)
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
    assert torch.equal(straight.weight, resumed.weight)
    averages = [torch.load(tmp_path / name / "export" / "model.pt") for name in ("straight", "cut")]
    assert torch.equal(averages[0]["weight"], averages[1]["weight"])
    assert not torch.equal(averages[0]["weight"], straight.weight)  # the export is the averaged model


def test_a_resumed_run_has_the_settings_that_it_asks_for(tmp_path, caplog):
    """Those of the optimizer stand in its checkpoint, too."""
    more = dict(warmup_steps=0, log_every=1)
    run(tmp_path, max_steps=2, learning_rate=1e-3, weight_decay=0.0, **more)
    with caplog.at_level("INFO"):
        run(tmp_path, max_steps=3, learning_rate=1e-4, weight_decay=0.5, cooldown_steps=0, **more)
    assert "the learning rate is now that of this run, [0.0001]; it was [0.001]" in caplog.text
    logged = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == [1e-3, 1e-3, 1e-4]
    state = torch.load(newest_checkpoint(tmp_path) / "optimizer.bin", weights_only=True)
    assert state["param_groups"][0]["weight_decay"] == 0.5 and state["param_groups"][0]["lr"] == 1e-4


def test_exports_are_compared_without_tf32(tmp_path, monkeypatch):
    """In which two copies of one model differ by more than the comparison allows; training goes on with it."""
    seen, export = [], loop_problem.export
    monkeypatch.setattr(
        loop_problem, "export", lambda *args: seen.append(torch.get_float32_matmul_precision()) or export(*args)
    )
    torch.set_float32_matmul_precision("high")
    try:
        run(tmp_path, max_steps=1)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_resume_off_starts_anew(tmp_path):
    run(tmp_path, max_steps=2)
    run(tmp_path, max_steps=2, resume=False)
    history = losses(tmp_path)
    assert history[:2] == history[2:]


def test_another_seed_is_another_run(tmp_path):
    run(tmp_path / "a", max_steps=2)
    run(tmp_path / "b", max_steps=2, seed=1)
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_two_processes_resume_exactly_and_train_as_one(tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    program = Path(__file__).parents[1] / "loop_problem.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, str(program), str(tmp_path)], check=True, env=environment, timeout=120)
    assert len(losses(tmp_path / "straight")) == 6  # one process writes
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
    # Two processes with batches of 2 see the samples that one with batches of 4 sees, and average the gradients.
    run(tmp_path / "alone", loss=plain_loss, max_steps=3, batch_size=4)
    alone, together = (torch.load(tmp_path / name / "export" / "model.pt") for name in ("alone", "plain"))
    torch.testing.assert_close(alone, together)


def test_a_loss_that_is_no_number_stops_and_names_the_checkpoint(tmp_path):
    def broken(model, batch):
        loss, logs = plain_loss(model, batch)
        broken.calls += 1
        return loss * (math.nan if broken.calls > 10 else 1), logs

    broken.calls = 0
    with pytest.raises(TrainingError, match=r"loss is nan at step 5.*checkpoint-00000004"):
        run(tmp_path, loss=broken, max_steps=10, checkpoint_every=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000002", "checkpoint-00000004"]


def test_an_exploding_gradient_stops(tmp_path):
    def explode(model, batch):
        loss, logs = plain_loss(model, batch)
        return loss * 1e9, logs

    with pytest.raises(TrainingError, match="gradient norm .* at step 0. There is no checkpoint yet"):
        run(tmp_path, loss=explode, max_steps=3)


def test_old_checkpoints_go_and_partial_ones_do_not_count(tmp_path):
    run(tmp_path, max_steps=4, checkpoint_every=1, keep_checkpoints=2)
    (tmp_path / "checkpoint-partial").mkdir()  # as a killed process leaves it
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000003", "checkpoint-00000004"]
    run(tmp_path, max_steps=5, checkpoint_every=1)
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number):
    before = signal.getsignal(number)

    def asked(model, batch):
        asked.calls += 1
        if asked.calls == 4:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as torchrun passes on what the terminal sent to all
        return plain_loss(model, batch)

    asked.calls = 0
    run(tmp_path, loss=asked, max_steps=50)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000002"]
    assert (tmp_path / "export" / "model.pt").exists()
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Stop, "TWICE", -1.0)

    def asked(model, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return plain_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loss=asked, max_steps=50)
    assert not checkpoints(tmp_path)


def test_the_time_budget_saves_and_stops(tmp_path):
    run(tmp_path, max_steps=10**6, max_minutes=0.01)
    done = len(losses(tmp_path))
    assert 0 < done < 10**6
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{done:08d}"


def factor(step, **settings):
    return learning_rate_factor(RunConfig(output_dir="x", data=["x"], max_steps=100, **settings))(step)


def test_schedules():
    assert factor(0, warmup_steps=10) == 1e-6
    assert factor(5, warmup_steps=10) == pytest.approx(0.5, abs=1e-5)
    assert factor(99, warmup_steps=10) == 1
    cosine = dict(warmup_steps=10, lr_schedule="cosine", min_lr_ratio=0.1)
    assert [factor(s, **cosine) for s in (10, 55, 100)] == pytest.approx([1, 0.55, 0.1])
    cooldown = dict(warmup_steps=0, cooldown_steps=40)
    assert [factor(s, **cooldown) for s in (0, 60, 80, 100)] == pytest.approx([1, 1, 0.5, 0])
