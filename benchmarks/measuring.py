"""What the benchmarks share: paired timing, peak memory, the machine's own limit, and how figures are kept.

Processors are shared and drift, so two candidates are timed in turn (A B A B ...) and compared by the median of the ratios of
neighbours. Memory is the high-water mark of a process of its own, less what it held before the call.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def machine(argv=None) -> dict:
    """Where and how a figure was made."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return dict(
        command=" ".join(
            ["python", f"benchmarks/{Path(sys.argv[0]).name}", *(sys.argv[1:] if argv is None else argv)]
        ),
        processor=f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("cosmos-hf", "torch", "diffusers", "transformers")}
        | {"python": platform.python_version()},
    )


def seconds(call) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(ours, theirs, repeats: int) -> dict:
    """Median seconds of each, and the median of theirs / ours over neighbouring pairs, after a warm-up of each."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ratios = [b / a for a, b in pairs]
    return dict(
        ours_s=statistics.median(a for a, _ in pairs),
        theirs_s=statistics.median(b for _, b in pairs),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )


def matmul_peak(size: int = 2048, repeats: int = 5) -> float:
    """The best GFLOP/s of a large float32 matrix product: the limit that the figures are set against."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


def gflop(call) -> float:
    """Multiplications and additions of a call's matrix products and convolutions, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def peak_of(call) -> float:
    """MiB that a call needs beyond what the process holds. Linux; the high-water mark is reset first."""
    call = torch.no_grad()(call)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return (_status("VmHWM") - before) / MIB


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def in_new_process(*arguments: str) -> float:
    """Run this script again with `--measure ...` and return the number that it prints last."""
    output = subprocess.run(
        [sys.executable, sys.argv[0], "--measure", *arguments], check=True, capture_output=True, text=True
    ).stdout
    return float(output.split()[-1])


def keep(name: str, figures: dict) -> Path:
    """Write figures to `results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return path


def show(rows: list[dict]):
    """A table of equal dicts."""
    columns = list(rows[0])
    cells = [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
