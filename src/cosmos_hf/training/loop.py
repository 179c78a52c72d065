"""The training loop: one visible function. What is trained is a module and a `compute_loss(model, batch) -> (loss, logs)`.

A run can be cut at any time and goes on exactly: the data order is a function of the position (`ResumableSampler`), and
the random draws of a step are seeded by (seed, rank, micro-step). It runs on one device, under DDP, FSDP2, ZeRO-2 and
ZeRO-3 (`training/launch/`); traps of accelerate worth knowing: `accelerate launch --cpu --num_processes 2` starts one process
(use torchrun with ACCELERATE_USE_CPU=true), and `save_state` must be called by all processes.
"""

import logging
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.sampling import ResumableSampler
from .checkpoints import Guard, Progress, TrainingError, checkpoints, newest_checkpoint, save_checkpoint
from .config import RunConfig
from .devices import (
    blueprint,
    compile_blocks,
    compute_in_16_bits,
    exact_products,
    full_copy,
    gradient_norm,
    is_sharded,
    loading_alone,
    plain_forward,
    reshard,
    start_accelerator,
    weights_are_sharded,
)
from .ema import PowerEMA
from .log import Log, peak_memory_gib

__all__ = ["Run", "TrainingError", "checkpoints", "fit", "learning_rate_factor", "newest_checkpoint", "to_device"]

logger = logging.getLogger(__name__)


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
    checkpoint, so that a run cannot end with something that does not load. Where the weights are sharded it gets a whole copy
    on the CPU. `validate(model)` returns figures to log and is called by all processes, which must go through the model's
    `forward`. Both see the averaged weights where an EMA is kept. Returns the last logged figures.

    Raises TrainingError for a loss that is not finite or a gradient norm above `max_grad_norm_before_stop`; the message
    names the last good checkpoint.
    """
    run = Run(config, export, validate)
    accelerator, micro_steps = run.accelerator, config.gradient_accumulation
    optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], config, config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config))
    model, optimizer = run.prepare(model, optimizer, scheduler=scheduler)
    with run.steps(dataset, collate) as batches:
        while run.wanted():
            for micro in range(micro_steps):
                batch = next(batches)
                with run.micro_step(model, last=micro == micro_steps - 1):
                    loss, logs = compute_loss(model, batch)
                    run.guard.check_loss(loss)
                    accelerator.backward(loss / micro_steps)
                run.log.add(loss=loss.detach(), **logs)
            norm = gradient_norm(accelerator, model.parameters(), config.clip_norm)
            run.guard.check_norm(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stepped = not accelerator.optimizer_step_was_skipped  # as at an overflow in fp16
            if stepped:
                scheduler.step()
                run.log.add(grad_norm=norm)
            run.finish_step(stepped, lr=scheduler.get_last_lr()[0])
        return run.finish()


class Run:
    """What every loop shares: devices, data order, position, average of the weights, log, checkpoints, export.

    In this order: `prepare`, then within `steps` for every step `wanted`, the batches and `finish_step`, and at last `finish`.
    """

    def __init__(self, config: RunConfig, export: Callable, validate: Callable | None):
        self.config, self.folder = config, Path(config.output_dir)
        self._export, self._validate, self._exported = export, validate, False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = start_accelerator(config)
        self.progress = Progress()
        self.guard = Guard(config, self.progress)
        self.log = Log(self.folder / "log.jsonl", self.accelerator)
        self._per_step = config.batch_size * config.gradient_accumulation * self.accelerator.num_processes

    def prepare(self, model: nn.Module, *others, scheduler) -> tuple:
        """`accelerator.prepare` of the model that is exported and of what trains with it; then the newest checkpoint."""
        accelerator, config = self.accelerator, self.config
        self._sharded = is_sharded(accelerator)
        self._plan = blueprint(model) if self._sharded else None
        compile_blocks(model, config.compile_backend)
        settings = chosen_settings(scheduler, *(part for part in others if isinstance(part, torch.optim.Optimizer)))
        prepared = accelerator.prepare(model.train(), *others)
        self._model, self.bare = prepared[0], accelerator.unwrap_model(prepared[0])
        compute_in_16_bits(accelerator, self.bare, config)
        self.ema = PowerEMA(self.bare, config.ema_width) if config.ema_width else None
        whole = not weights_are_sharded(accelerator)
        registered = [self.ema] if self.ema and whole else []
        accelerator.register_for_checkpointing(scheduler, self.progress, *registered)
        if config.resume and (newest := newest_checkpoint(self.folder)):
            accelerator.load_state(str(newest))
            if self.ema and not whole:
                self.ema.load_shards(newest / "ema")
            settings()
            logger.info("going on from %s at step %d", newest, self.progress.step)
        if config.report_to:
            settings = {k: v for k, v in vars(config).items() if not isinstance(v, list)}
            accelerator.init_trackers("cosmos_hf", config=settings)
        return prepared

    @contextmanager
    def steps(self, dataset: Dataset, collate: Callable[[list], dict]) -> Iterator[Iterator[dict]]:
        """The batches from the run's position on, each on the device and with its own seed set; a bar; signals caught."""
        config, accelerator = self.config, self.accelerator
        disable = not (config.progress and accelerator.is_main_process)
        self._bar = tqdm(total=config.max_steps, initial=self.progress.step, unit="step", disable=disable)
        with self._bar, Stop(config.max_minutes) as self._stop:
            yield self._batches(dataset, collate)

    def _batches(self, dataset, collate) -> Iterator[dict]:
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        kinds = getattr(dataset, "kinds", None)  # of data of several sizes and rates
        place = (config.seed, self.progress.samples, rank, world)
        sampler = ResumableSampler(len(dataset), *place, kinds=kinds, batch_size=config.batch_size)
        loader = DataLoader(
            dataset, config.batch_size, sampler=sampler, collate_fn=collate, num_workers=config.num_workers
        )
        micro = self.progress.step * config.gradient_accumulation
        for number, batch in enumerate(loader, micro):
            batch = to_device(batch, self.accelerator.device)
            reseed(config.seed, rank, number)
            yield batch

    def wanted(self) -> bool:
        return self.progress.step < self.config.max_steps and not self._stop.wanted(self.accelerator)

    @contextmanager
    def micro_step(self, model: nn.Module, last: bool):
        """Gradients are exchanged at the last micro-step of a step only."""
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.gradient_state._set_sync_gradients(last)  # its backward steps where this is set
        with nullcontext() if last else accelerator.no_sync(model):
            yield

    def finish_step(self, stepped: bool = True, **figures):
        """After the optimizer: count, average (where it stepped), log, validate, checkpoint."""
        config, progress = self.config, self.progress
        progress.step += 1
        progress.samples += self._per_step
        if self.ema and stepped:
            self.ema.update(self.bare)
        self._bar.update()
        if progress.step % config.log_every == 0:
            rate = self._per_step * self.log.steps_per_second(config.log_every)
            self.log.write(progress.step, **figures, samples_per_second=rate, peak_gib=peak_memory_gib())
            if "loss" in self.log.last:
                self._bar.set_postfix(loss=f"{self.log.last['loss']:.4f}")
        if self._validate and config.validate_every and progress.step % config.validate_every == 0:
            self._measure()
        if progress.step % config.checkpoint_every == 0:
            self._save()
            if not self._exported:
                self._write_export()

    def finish(self) -> dict:
        """Last checkpoint, export and validation; returns the last logged figures."""
        self._save()
        self._write_export()
        if self._validate:
            self._measure()
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # not end_training, which would end the process group, too
            tracker.finish()
        logger.info("stopped at step %d of %d", self.progress.step, self.config.max_steps)
        return self.log.last

    def _save(self):
        save_checkpoint(self.accelerator, self.folder, self.progress.step, self.config.keep_checkpoints, self.ema)

    def _measure(self):
        with evaluating(self.bare, self.ema):
            figures = self._validate(self.bare)
        self.log.write(self.progress.step, **{f"val_{name}": value for name, value in figures.items()})

    def _write_export(self):
        with evaluating(self.bare, self.ema):
            whole = full_copy(self.accelerator, self._model, self._plan) if self._sharded else self.bare
            if self.accelerator.is_main_process:
                with plain_forward(whole.eval()), loading_alone(self.accelerator), exact_products():
                    self._export(whole, self.folder / "export")
        self._exported = True


def build_optimizer(parameters: list[nn.Parameter], config: RunConfig, learning_rate: float) -> torch.optim.AdamW:
    """One group for each `learning_rate_scale` that parameters carry; without one it is 1."""
    betas, groups = (config.beta1, config.beta2), defaultdict(list)
    for parameter in parameters:
        groups[getattr(parameter, "learning_rate_scale", 1.0)].append(parameter)
    return torch.optim.AdamW(
        [dict(params=group, lr=learning_rate * scale) for scale, group in sorted(groups.items())],
        betas=betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def chosen_settings(
    scheduler: torch.optim.lr_scheduler.LambdaLR, *optimizers: torch.optim.Optimizer
) -> Callable[[], None]:
    """Note the learning rates, decay and so on that a run asks for; the result brings them back after a checkpoint was loaded,
    which has those of the run that it was cut from."""
    rates = list(scheduler.base_lrs)
    wanted = [
        [{k: v for k, v in group.items() if k != "params"} for group in part.param_groups] for part in optimizers
    ]

    def bring_back():
        for part, groups in zip(optimizers, wanted, strict=True):
            for group, chosen in zip(part.param_groups, groups, strict=True):
                group.update(chosen)
        if scheduler.base_lrs != rates:
            logger.info("the learning rate is now that of this run, %s; it was %s", rates, scheduler.base_lrs)
        scheduler.base_lrs = rates
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    return bring_back


@contextmanager
def evaluating(model: nn.Module, ema: PowerEMA | None):
    """The averaged weights, where there are any, in evaluation mode."""
    model.eval()
    with ema.swapped_in(model) if ema else nullcontext():
        yield
        reshard(model)
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


class Stop:
    """A time budget, and SIGTERM and SIGINT: the run ends after the current step with a checkpoint; asked again, at once.

    A launcher passes on a signal that the terminal sent to all processes, so that it comes twice: within `TWICE` seconds that is
    once.
    """

    TWICE = 5.0

    def __init__(self, minutes: float):
        self._deadline = time.monotonic() + minutes * 60 if minutes else math.inf
        self._asked, self._handlers = None, {}  # when it was asked

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there handlers can be set
            self._handlers = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_):
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            logger.warning("stopping after this step, with a checkpoint")
        elif now - self._asked > self.TWICE:
            raise KeyboardInterrupt

    def wanted(self, accelerator: Accelerator) -> bool:
        mine = self._asked is not None or time.monotonic() > self._deadline
        if accelerator.num_processes == 1:
            return mine
        return bool(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "max"))
