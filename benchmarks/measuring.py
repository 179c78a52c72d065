"""What the benchmarks share: paired timing, peak memory, the machine's own limit, and how figures are kept.

Processors are shared and drift, so two candidates are timed in turn (A B A B ...) and compared by the median of the ratios of
neighbours. Memory is the high-water mark of a process of its own, less what it held before the call.
"""

import ctypes
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
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
# A fixed threshold for every measured process: glibc's growing one keeps freed tensors, more or fewer of them from run to run.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}


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


def product_peak(sizes=(512, 1024), repeats: int = 5) -> float:
    """The best GFLOP/s of a float32 matrix product, as `torch.mm` and as a 1x1 convolution: the limit that figures are set against.

    Which of the two libraries behind them (MKL, oneDNN) is faster depends on the processor.
    """
    best = 0.0
    for size in sizes:
        a, b = torch.randn(size, size), torch.randn(size, size)
        # A batch of 16: with fewer samples and one thread PyTorch does not take oneDNN.
        pixels, kernel = a.view(16, -1, 1, size).permute(0, 3, 1, 2), b[:, :, None, None]
        for call in (lambda a=a, b=b: a @ b, lambda x=pixels, w=kernel: torch.conv2d(x, w)):
            call()
            best = max(best, 2 * size**3 / min(seconds(call) for _ in range(repeats)) / 1e9)
    return best


def gflop(call) -> float:
    """Multiplications and additions of a call's matrix products and convolutions, in units of 1e9."""
    return sum(gflop_by_operation(call).values())


def gflop_by_operation(call) -> dict[str, float]:
    """The same by operation, e.g. {"convolution": ..., "mm": ...}."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts().get("Global", {})
    return {str(operation).removeprefix("aten."): count / 1e9 for operation, count in counts.items()}


def convolution_seconds(call) -> float:
    """Time that a call spends in convolutions and in bringing their weights, or results, into another memory layout."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = profiler.events()
    times = [event.cpu_time_total for event in events if event.name == "aten::convolution"]
    # Those inside a convolution are counted with it.
    times += [
        event.cpu_time_total for event in events if event.name == "aten::contiguous" and event.cpu_parent is None
    ]
    return sum(times) / 1e6


def resident(*modules: torch.nn.Module):
    """Read every weight: what a mapped file has not given yet would count as the memory of the first call."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.sum()


def peak_of(call, device: str = "cpu") -> float:
    """MiB that a call needs beyond what the process holds, on a GPU in tensors. On processors Linux only; the high-water mark is
    reset first."""
    call = torch.no_grad()(call)
    if torch.device(device).type != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # so that nothing freed earlier serves the call uncounted
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return (_status("VmHWM") - before) / MIB


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def in_new_process(*arguments: str) -> list[float]:
    """Run this script again with `--measure ...` and return the numbers of the last line that it prints."""
    command = [sys.executable, sys.argv[0], "--measure", *arguments]
    env = {**os.environ, **ALLOCATOR}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    return [float(number) for number in output.splitlines()[-1].split()]


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
