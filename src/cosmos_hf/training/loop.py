"""The training loop: one visible function. What is trained is a module and a `compute_loss(model, batch) -> (loss, logs)`.

A run can be cut at any time and goes on exactly: the data order is a function of the position (`ResumableSampler`), and
the random draws of a step are seeded by (seed, rank, micro-step). Traps of accelerate worth knowing here:
`accelerate launch --cpu --num_processes 2` starts one process (use torchrun with ACCELERATE_USE_CPU=true), and
`save_state` must be called by all processes.
"""

import json
import logging
import math
import resource
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.clips import ResumableSampler
from .config import RunConfig
from .ema import PowerEMA

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run must not go on: a loss that is no number, an exploding gradient, an export that does not reload."""


def fit(
    model: nn.Module,
    compute_loss: Callable[[nn.Module, dict], tuple[torch.Tensor, dict]],
    dataset: Dataset,
    config: RunConfig,
    collate: Callable[[list], dict],
    export: Callable[[nn.Module, Path], None],
    validate: Callable[[nn.Module], dict] | None = None,
) -> dict:
    """Train, log to `output_dir/log.jsonl`, keep checkpoints, and write `output_dir/export`, which `from_pretrained` reads.

    `export(model, folder)` saves the model and must raise where a reloaded copy does not agree; it is tried at the first
    checkpoint, so that a run cannot end with something that does not load. `validate(model)` returns figures to log.
    Both see the averaged weights where an EMA is kept. Returns the last logged figures.

    Raises TrainingError for a loss that is not finite or a gradient norm above `max_grad_norm_before_stop`; the message
    names the last good checkpoint.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=1,  # counted below, since accelerate also steps at the end of an epoch
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    world, folder = accelerator.num_processes, Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config))
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    bare, progress = accelerator.unwrap_model(model), Progress()
    ema = PowerEMA(bare, config.ema_width) if config.ema_width else None
    accelerator.register_for_checkpointing(scheduler, progress, *([ema] if ema else []))
    if config.resume and (newest := newest_checkpoint(folder)):
        accelerator.load_state(str(newest))
        logger.info("going on from %s at step %d", newest, progress.step)
    if config.report_to:
        settings = {k: v for k, v in vars(config).items() if not isinstance(v, list)}
        accelerator.init_trackers("cosmos_hf", config=settings)

    sampler = ResumableSampler(len(dataset), config.seed, progress.samples, accelerator.process_index, world)
    loader = DataLoader(
        dataset, config.batch_size, sampler=sampler, collate_fn=collate, num_workers=config.num_workers
    )
    batches, log, exported = iter(loader), Log(folder / "log.jsonl", accelerator), False
    per_step = config.batch_size * config.gradient_accumulation * world
    bar = tqdm(
        total=config.max_steps,
        initial=progress.step,
        unit="step",
        disable=not (config.progress and accelerator.is_main_process),
    )
    with bar, Stop(config.max_minutes) as stop:
        while progress.step < config.max_steps and not stop.wanted(accelerator):
            for micro in range(config.gradient_accumulation):
                batch = to_device(next(batches), accelerator.device)
                reseed(config.seed, accelerator.process_index, progress.step * config.gradient_accumulation + micro)
                last = micro == config.gradient_accumulation - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    loss, logs = compute_loss(model, batch)
                    check_finite(loss, progress, folder)
                    accelerator.backward(loss / config.gradient_accumulation)
                log.add(loss=loss.detach(), **logs)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            check_norm(norm, config, progress, folder)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.samples += per_step
            if ema:
                ema.update(bare)
            bar.update()
            log.add(grad_norm=norm.detach())

            if progress.step % config.log_every == 0:
                rate = per_step * log.steps_per_second(config.log_every)
                figures = dict(samples_per_second=rate, peak_gib=peak_memory_gib())
                log.write(progress.step, lr=scheduler.get_last_lr()[0], **figures)
                bar.set_postfix(loss=f"{log.last['loss']:.4f}")
            if validate and config.validate_every and progress.step % config.validate_every == 0:
                with evaluating(bare, ema):
                    log.write(progress.step, **_prefixed("val_", validate(bare)))
            if progress.step % config.checkpoint_every == 0:
                save_checkpoint(accelerator, folder, progress.step, config.keep_checkpoints)
                if not exported and accelerator.is_main_process:
                    with evaluating(bare, ema):
                        export(bare, folder / "export")
                    exported = True

        save_checkpoint(accelerator, folder, progress.step, config.keep_checkpoints)
        if accelerator.is_main_process:
            with evaluating(bare, ema):
                export(bare, folder / "export")
                if validate:
                    log.write(progress.step, **_prefixed("val_", validate(bare)))
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # not end_training, which would end the process group, too
        tracker.finish()
    logger.info("stopped at step %d of %d", progress.step, config.max_steps)
    return log.last


@contextmanager
def evaluating(model: nn.Module, ema: PowerEMA | None):
    """The averaged weights, where there are any, in evaluation mode."""
    model.eval()
    with ema.swapped_in(model) if ema else nullcontext():
        yield
    model.train()


def learning_rate_factor(config: RunConfig) -> Callable[[int], float]:
    """Linear warm-up from 1e-6, then constant with a linear cool-down before `max_steps`, or a cosine that ends there.

    The constant schedule does not depend on `max_steps` before its cool-down: a run whose length is not known goes on
    until there is no more time, and its last leg is resumed with `max_steps` set `cooldown_steps` further on.
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return 1e-6 + (1 - 1e-6) * step / config.warmup_steps
        if config.lr_schedule == "constant":
            left = (config.max_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
            return config.min_lr_ratio + (1 - config.min_lr_ratio) * min(1.0, max(0.0, left))
        done = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def reseed(seed: int, rank: int, micro_step: int):
    """Seed torch's draws for one micro-step; distinct for distinct arguments below 2**20 ranks."""
    torch.manual_seed((seed * 1_000_003 + micro_step) * 2**20 % 2**63 + rank)


def to_device(batch: dict, device) -> dict:
    """Tensors, and tuples of tensors, to a device; all else as it is."""

    def move(value):
        if isinstance(value, tuple):
            return tuple(move(item) for item in value)
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in batch.items()}


# ---- state -------------------------------------------------------------------------------------------------------


class Progress:
    """Optimizer steps done and samples consumed by all processes; saved with every checkpoint."""

    def __init__(self):
        self.step = self.samples = 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


class Stop:
    """A time budget, and SIGTERM and SIGINT: the run ends after the current step with a checkpoint."""

    def __init__(self, minutes: float):
        self._deadline = time.monotonic() + minutes * 60 if minutes else math.inf
        self._asked, self._handlers = False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there handlers can be set
            self._handlers = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_):
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("stopping after this step, with a checkpoint")

    def wanted(self, accelerator: Accelerator) -> bool:
        mine = self._asked or time.monotonic() > self._deadline
        if accelerator.num_processes == 1:
            return mine
        return bool(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "max"))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-????????"))


def newest_checkpoint(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int):
    """Everything a run needs to go on exactly; it gets its name when it is complete, then older ones go."""
    final, partial = folder / f"checkpoint-{step:08d}", folder / "checkpoint-partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def check_finite(loss: torch.Tensor, progress: Progress, folder: Path):
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss is {loss.item()} at step {progress.step}. {_advice(folder)}")


def check_norm(norm: torch.Tensor, config: RunConfig, progress: Progress, folder: Path):
    if not torch.isfinite(norm) or norm > config.max_grad_norm_before_stop:
        raise TrainingError(f"gradient norm {norm.item():.3g} at step {progress.step}. {_advice(folder)}")


def _advice(folder: Path) -> str:
    newest = newest_checkpoint(folder)
    last = f"The last good checkpoint is {newest}" if newest else "There is no checkpoint yet"
    return f"{last}; lower the learning rate, raise warmup_steps or look at the data before going on."


# ---- log ---------------------------------------------------------------------------------------------------------


class Log:
    """Means since the last line, one JSON object a line; also to accelerate's trackers."""

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
        """NaN stands for "none in this window" (a noise band that was not drawn) and is left out."""
        means = {}
        for name, items in self._sums.items():
            items = [item for item in items if not math.isnan(item)]
            if items:
                means[name] = sum(items) / len(items)
        self._sums.clear()
        means |= {name: float(value) for name, value in values.items()}
        self.last |= means
        if self._accelerator.is_main_process:
            rounded = {name: float(f"{value:.6g}") for name, value in means.items()}
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "time": round(time.time()), **rounded}) + "\n")
        self._accelerator.log(means, step=step)


def _prefixed(prefix: str, values: dict) -> dict:
    return {prefix + name: value for name, value in values.items()}


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
