"""What a run says of itself: means over the steps since the last line, as JSON lines and to accelerate's trackers."""

import json
import math
import resource
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class Log:
    """Means since the last line over all processes, one JSON object a line; also to accelerate's trackers."""

    def __init__(self, path: Path, accelerator: Accelerator):
        self._path, self._accelerator, self._sums = path, accelerator, defaultdict(list)
        self._clock, self.last = time.monotonic(), {}

    def add(self, **values):
        for name, value in values.items():
            self._sums[name].append(float(value))

    def steps_per_second(self, steps: int) -> float:
        now = time.monotonic()
        spent, self._clock = now - self._clock, now
        return steps / spent

    def write(self, step: int, **values):
        """All processes call it. NaN stands for "none in this window" (a noise band that was not drawn) and is left out."""
        means = self._means()
        means |= {name: float(value) for name, value in values.items()}
        self.last |= means
        if self._accelerator.is_main_process:
            rounded = {name: float(f"{value:.6g}") for name, value in means.items()}
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "time": round(time.time()), **rounded}) + "\n")
        self._accelerator.log(means, step=step)

    def _means(self) -> dict[str, float]:
        """Over the steps since the last line and over all processes."""
        parts = [dict(self._sums)]
        self._sums.clear()
        if self._accelerator.num_processes > 1:
            parts = gather_object(parts)
        means = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            items = [item for part in parts for item in part.get(name, []) if not math.isnan(item)]
            if items:
                means[name] = sum(items) / len(items)
        return means


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
