"""The adversarial stage of the tokenizers (arXiv 2501.03575, section 3.2), whose code the reference never released.

A patch discriminator over space and time with hinge loss, as in VQGAN (arXiv 2012.09841) and MAGVIT: it learns alone first,
and its term is scaled by the ratio of the two gradients at the decoder's last layer (VQGAN, equation 7), so that it is as
strong as the reconstruction term times `adversarial_weight` whatever their scales. Two networks with two optimizers do not
fit `loop.fit`, so this stage has its own loop, of the same parts.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.clips import ResumableSampler
from ..data.video import to_float
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from .config import TokenizerConfig
from .ema import PowerEMA
from .loop import (
    Log,
    Progress,
    Stop,
    check_finite,
    check_norm,
    evaluating,
    learning_rate_factor,
    newest_checkpoint,
    peak_memory_gib,
    reseed,
    save_checkpoint,
    to_device,
)
from .losses import ReconstructionLoss

logger = logging.getLogger(__name__)


class PatchDiscriminator(nn.Module):
    """Says of every patch of a video whether it looks real: [B, 3, T, H, W] in [-1, 1] -> scores [B, 1, T, H / 8, W / 8].

    Each stage halves height and width and sees a frame's neighbours in time; images are clips of one frame.
    """

    def __init__(self, channels: int = 64):
        super().__init__()
        layers, width = [], 3
        for out in (channels, 2 * channels, 4 * channels):
            layers.append(nn.Conv3d(width, out, (3, 4, 4), (1, 2, 2), padding=1))
            if width > 3:
                layers.append(nn.GroupNorm(min(32, out // 4), out))
            layers.append(nn.LeakyReLU(0.2))
            width = out
        layers.append(nn.Conv3d(width, 1, (3, 3, 3), padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.layers(video)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Of the discriminator: scores of real patches above 1, of made ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: nn.Parameter) -> torch.Tensor:
    """|gradient of the reconstruction loss| / |gradient of the adversarial loss| at the decoder's last layer, at most 1e4."""
    wanted, given = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(max=1e4).detach()


def fit_adversarial(
    model: CosmosVideoTokenizer,
    loss: ReconstructionLoss,
    dataset: Dataset,
    config: TokenizerConfig,
    collate: Callable[[list], dict],
    export: Callable[[nn.Module, Path], None],
    validate: Callable[[nn.Module], dict] | None = None,
) -> dict:
    """As `loop.fit`, with a discriminator: it learns alone for `discriminator_warmup` steps, then the two learn in turn.

    Start from a tokenizer of the earlier stages (`init_from`). Its encoder learns, too, unless `freeze_encoder`.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=config.report_to or None, project_dir=config.output_dir
    )
    world, folder = accelerator.num_processes, Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.freeze_encoder:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    discriminator = PatchDiscriminator(config.discriminator_channels)
    settings = dict(betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=config.weight_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, **settings)
    judge = torch.optim.AdamW(discriminator.parameters(), lr=config.discriminator_learning_rate, **settings)
    own_steps = replace(config, max_steps=max(1, config.max_steps - config.discriminator_warmup))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(own_steps))
    model, discriminator, optimizer, judge = accelerator.prepare(model.train(), discriminator, optimizer, judge)
    bare, progress = accelerator.unwrap_model(model), Progress()
    last_layer = list(bare.decoder.conv_out.parameters())[-2]  # the weight; the last is its bias
    ema = PowerEMA(bare, config.ema_width) if config.ema_width else None
    accelerator.register_for_checkpointing(scheduler, progress, *([ema] if ema else []))
    if config.resume and (newest := newest_checkpoint(folder)):
        accelerator.load_state(str(newest))
        logger.info("going on from %s at step %d", newest, progress.step)
    if config.report_to:
        accelerator.init_trackers("cosmos_hf")

    sampler = ResumableSampler(len(dataset), config.seed, progress.samples, accelerator.process_index, world)
    loader = DataLoader(
        dataset, config.batch_size, sampler=sampler, collate_fn=collate, num_workers=config.num_workers
    )
    batches, log, per_step = iter(loader), Log(folder / "log.jsonl", accelerator), config.batch_size * world
    disable = not (config.progress and accelerator.is_main_process)
    bar = tqdm(total=config.max_steps, initial=progress.step, unit="step", disable=disable)
    with bar, Stop(config.max_minutes) as stop:
        while progress.step < config.max_steps and not stop.wanted(accelerator):
            reseed(config.seed, accelerator.process_index, progress.step)
            video = loss.draw(to_float(to_device(next(batches), accelerator.device)["video"]))
            warm = progress.step >= config.discriminator_warmup

            # 1. The tokenizer, once the discriminator knows something
            if warm:
                result = model(video).sample
                total, logs = loss.compare(result, video)
                discriminator.requires_grad_(False)
                fooling = -discriminator(result).mean()
                discriminator.requires_grad_(True)
                weight = config.adversarial_weight * adaptive_weight(total, fooling, last_layer)
                total = total + weight * fooling
                check_finite(total, progress, folder)
                accelerator.backward(total)
                norm = accelerator.clip_grad_norm_(trained, config.clip_norm)
                check_norm(norm, config, progress, folder)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                log.add(loss=total.detach(), fooling=fooling.detach(), adaptive_weight=weight, grad_norm=norm, **logs)
                result = result.detach()
            else:
                with torch.no_grad():
                    result = bare(video).sample

            # 2. The discriminator, on the same clips
            scores = discriminator(torch.cat([video, result]))
            real, fake = scores.chunk(2)
            judgement = hinge_loss(real, fake)
            check_finite(judgement, progress, folder)
            accelerator.backward(judgement)
            accelerator.clip_grad_norm_(discriminator.parameters(), config.clip_norm)
            judge.step()
            judge.zero_grad(set_to_none=True)
            log.add(discriminator=judgement.detach(), real=real.detach().mean(), fake=fake.detach().mean())

            # 3. State, log, checkpoint
            if warm:
                scheduler.step()
            progress.step += 1
            progress.samples += per_step
            if ema and warm:
                ema.update(bare)
            bar.update()
            if progress.step % config.log_every == 0:
                rate = per_step * log.steps_per_second(config.log_every)
                log.write(progress.step, samples_per_second=rate, peak_gib=peak_memory_gib())
            if validate and config.validate_every and progress.step % config.validate_every == 0:
                with evaluating(bare, ema):
                    log.write(progress.step, **{f"val_{name}": value for name, value in validate(bare).items()})
            if progress.step % config.checkpoint_every == 0:
                save_checkpoint(accelerator, folder, progress.step, config.keep_checkpoints)

        save_checkpoint(accelerator, folder, progress.step, config.keep_checkpoints)
        if accelerator.is_main_process:
            with evaluating(bare, ema):
                export(bare, folder / "export")
    accelerator.wait_for_everyone()
    return log.last
