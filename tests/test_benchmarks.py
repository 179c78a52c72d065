"""A benchmark as a user runs it, on its smallest size: its figures are kept whatever becomes of the memory's measurement."""

import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from cosmos_hf.training.memory import GIB, estimate_posttraining

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A benchmark by its name: the names of its script; results go to `tmp_path`, processes of its own run the same script."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import measuring

    monkeypatch.setattr(measuring, "RESULTS", tmp_path)

    def load(name):
        script = str(BENCHMARKS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script])
        return runpy.run_path(script)

    return load


ONCE = ["--sizes", "tiny", "--rounds", "1", "--prompt", "24", "--dtype", "bfloat16"]


def test_autoregressive(benchmark, tmp_path):
    benchmark("autoregressive")["main"](ONCE)
    figures = json.loads((tmp_path / "autoregressive.json").read_text())["tiny"]
    assert {row["contestant"] for row in figures["rows"]} == {
        f"{who} {cache}" for who in ("ours", "llama") for cache in ("dynamic", "static")
    }
    assert figures["peak_mib_beyond_weights"].keys() == {"ours", "llama"}
    assert figures["made_by"]["command"].endswith(" ".join(ONCE))


def test_memory_is_measured_as_the_speed_was_and_loses_nothing(benchmark, tmp_path, monkeypatch):
    main, asked = benchmark("autoregressive")["main"], []
    names = inspect.unwrap(main).__globals__
    monkeypatch.setitem(names, "speed", lambda size, args: {"rows": ["timed"]})

    def fail(*arguments):
        asked.append(arguments)
        raise RuntimeError("no memory is measured here")

    monkeypatch.setitem(names, "in_new_process", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        main(ONCE)
    assert asked == [("ours", "tiny", "--prompt", "24", "--dtype", "bfloat16", "--device", "cpu")]
    assert json.loads((tmp_path / "autoregressive.json").read_text())["tiny"]["rows"] == ["timed"]


def test_memory_is_measured_of_what_a_run_trains(benchmark, capsys):
    names = benchmark("memory")
    transformer = names["build"]("tiny-video2world", "cpu")
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    base = transformer.transformer_blocks[0].attn1.to_q.base_layer.weight
    assert base.dtype == torch.bfloat16 and transformer.patch_embed.proj.weight.dtype == torch.float32
    told = estimate_posttraining("tiny-video2world", "lora bfloat16", (2, 8, 8), text_length=4, average=False)
    assert told["gradients"] * GIB == sum(p.nbytes for p in trained.values())
    assert told["weights"] * GIB == pytest.approx(sum(p.nbytes for p in transformer.parameters()))
    with pytest.raises(SystemExit):
        names["main"]([])
    assert "torch finds no CUDA GPU" in capsys.readouterr().err
