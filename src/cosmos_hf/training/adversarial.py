"""The adversarial stage of the tokenizers (arXiv 2501.03575, section 3.2), whose code the reference never released.

A patch discriminator over space and time with hinge loss, as in VQGAN (arXiv 2012.09841) and MAGVIT: it learns alone first,
and its term is scaled by the ratio of the two gradients at the decoder's last layer (VQGAN, equation 7), so that it is as
strong as the reconstruction term times `adversarial_weight` whatever their scales. Two networks with two optimizers do not
fit `loop.fit`, so this stage has its own loop, of the same parts.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from ..models.tokenizer_kinds import Tokenizer, codes_images, reconstruct
from .config import TokenizerConfig
from .devices import is_sharded
from .loop import Run, build_optimizer, learning_rate_factor
from .losses import ReconstructionLoss


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
    model: Tokenizer,
    loss: ReconstructionLoss,
    dataset: Dataset,
    config: TokenizerConfig,
    collate: Callable[[list], dict],
    export: Callable[[nn.Module, Path], None],
    validate: Callable[[nn.Module], dict] | None = None,
) -> dict:
    """As `loop.fit`, with a discriminator: it learns alone for `discriminator_warmup` steps, then the two learn in turn.

    Start from a tokenizer of the earlier stages (`init_from`). Its encoder learns, too, unless `freeze_encoder`.
    Raises ValueError under FSDP and DeepSpeed, which would shard two networks as one: launch it with DDP.
    """
    run = Run(config, export, validate)
    accelerator, clip = run.accelerator, run.accelerator.clip_grad_norm_
    if is_sharded(accelerator):
        raise ValueError("the adversarial stage runs in one process or under DDP (training/launch/ddp.yaml)")
    judge_network = PatchDiscriminator(config.discriminator_channels)
    trained = [p for p in model.parameters() if p.requires_grad]
    own_steps = replace(config, max_steps=max(1, config.max_steps - config.discriminator_warmup))
    optimizer = build_optimizer(trained, config, config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(own_steps))
    judge = build_optimizer(list(judge_network.parameters()), config, config.discriminator_learning_rate)
    model, discriminator, optimizer, judge = run.prepare(model, judge_network, optimizer, judge, scheduler=scheduler)
    last_layer = list(run.bare.decoder.conv_out.parameters())[-2]  # the weight; the last is its bias

    with run.steps(dataset, collate) as batches:
        while run.wanted():
            video = loss.draw(next(batches), only_images=codes_images(model))
            warm = run.progress.step >= config.discriminator_warmup

            # 1. The tokenizer, once the discriminator knows something
            if warm:
                result = reconstruct(model, video, config.latent_noise)
                total, logs = loss.compare(result, video)
                judge_network.requires_grad_(False)  # bare: DDP would wait for its gradients
                fooling = -judge_network(result).mean()
                judge_network.requires_grad_(True)
                weight = config.adversarial_weight * adaptive_weight(total, fooling, last_layer)
                total = total + weight * fooling
                run.guard.check_loss(total)
                accelerator.backward(total)
                norm = clip(trained, config.clip_norm)
                run.guard.check_norm(norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                run.log.add(
                    loss=total.detach(), fooling=fooling.detach(), adaptive_weight=weight, grad_norm=norm, **logs
                )
                run.log.add(**loss.code_figures())
                result = result.detach()
            else:
                with torch.no_grad():
                    result = reconstruct(run.bare, video, config.latent_noise)

            # 2. The discriminator, on the same clips
            real, fake = discriminator(torch.cat([video, result])).chunk(2)
            judgement = hinge_loss(real, fake)
            run.guard.check_loss(judgement)
            accelerator.backward(judgement)
            clip(discriminator.parameters(), config.clip_norm)
            judge.step()
            judge.zero_grad(set_to_none=True)
            run.log.add(discriminator=judgement.detach(), real=real.detach().mean(), fake=fake.detach().mean())

            # 3. The tokenizer's schedule and average count its own steps only
            stepped = warm and not optimizer.step_was_skipped
            if stepped:
                scheduler.step()
            run.finish_step(stepped, lr=scheduler.get_last_lr()[0])
        return run.finish()
