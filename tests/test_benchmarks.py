"""A benchmark as a user runs it, on its smallest size: its figures are kept whatever becomes of the memory's measurement."""

import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest

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
