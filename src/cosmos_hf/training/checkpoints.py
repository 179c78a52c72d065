"""Checkpoints of a run, its position, and the checks that stop it, naming the last good checkpoint."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from .config import RunConfig
from .devices import weights_are_sharded
from .ema import PowerEMA

# An fp16 run finds its loss scale by halving it at every overflow: 65536 is down to 2**-8 after so many in a row.
MOST_OVERFLOWS = 24


class TrainingError(RuntimeError):
    """The run must not go on: a loss that is no number, an exploding gradient, an export that does not reload."""


class Progress:
    """Optimizer steps done and samples consumed by all processes; saved with every checkpoint."""

    def __init__(self):
        self.step = self.samples = 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-????????"))


def newest_checkpoint(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int, ema: PowerEMA | None = None):
    """Everything a run needs to go on exactly; it gets its name when it is complete, then older ones go.

    ema: where the weights are sharded, since accelerate keeps registered objects of the main process only.
    """
    final, partial = folder / f"checkpoint-{step:08d}", folder / "checkpoint-partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if ema and weights_are_sharded(accelerator):
        ema.save_shards(partial / "ema")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


class Guard:
    """Stops a run that has gone wrong. An fp16 run may overflow: that is how its loss scale is found."""

    def __init__(self, config: RunConfig, progress: Progress):
        self.config, self.progress, self.folder = config, progress, Path(config.output_dir)
        self.overflows = 0  # in a row

    def check_loss(self, loss: torch.Tensor):
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {self.progress.step}. {self._advice()}")

    def check_norm(self, norm: torch.Tensor):
        """Raises TrainingError for a norm that is too large or no number; in fp16 only for `MOST_OVERFLOWS` in a row."""
        if not torch.isfinite(norm) and self.config.mixed_precision == "fp16":
            self.overflows += 1
            if self.overflows < MOST_OVERFLOWS:
                return
            advice = f"after {self.overflows} overflows in a row, so no loss scale helps: take mixed_precision: bf16"
            raise TrainingError(f"gradient norm {norm.item():.3g} at step {self.progress.step} {advice}")
        self.overflows = 0
        if not torch.isfinite(norm) or norm > self.config.max_grad_norm_before_stop:
            raise TrainingError(f"gradient norm {norm.item():.3g} at step {self.progress.step}. {self._advice()}")

    def _advice(self) -> str:
        newest = newest_checkpoint(self.folder)
        last = f"The last good checkpoint is {newest}" if newest else "There is no checkpoint yet"
        return f"{last}; lower the learning rate, raise warmup_steps or look at the data before going on."
