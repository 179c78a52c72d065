"""The training loss of the autoregressive models (arXiv 2501.03575, section 5.2.3), in chunks.

At 64 000 codes the logits are by far the largest tensor of a step: 12 800 tokens make 3.3 GB in float32, several times over.
Here they exist for one chunk of positions at a time, forward and backward.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


class ARLoss(NamedTuple):
    """`total` = `cross_entropy` + weight * `z_loss`, and how many tokens were `targets`; scalars."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    z_loss: torch.Tensor
    targets: torch.Tensor


def chunked_loss(
    head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor, z_loss_weight: float, chunk: int = 512,
    shift: int = 1,
) -> ARLoss:  # fmt: skip
    """Hidden states [B, S, D] and the tokens themselves [B, S] -> loss of predicting each token `shift` places earlier.

    Cross-entropy is the mean over labels that are not -100, the z loss the mean of squared log-denominators over all positions
    that have a next token. The output layer is called as a module, so that adapters and sharded weights work.
    """
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(f"labels must be {list(hidden_states.shape[:2])} as input_ids, got {list(labels.shape)}")
    states = hidden_states[:, :-shift].flatten(0, 1)
    targets = labels[:, shift:].flatten().to(states.device)
    count = (targets != IGNORED).sum()
    # values cannot be looked at where a memory estimate has none
    if not (targets.is_meta or isinstance(targets, FakeTensor)) and targets.numel():
        if count == 0:
            raise ValueError("labels are all ignored (-100): there is nothing to learn")
        kept = targets[targets != IGNORED]
        if kept.min() < 0 or kept.max() >= head.out_features:
            raise ValueError(
                f"labels must be codes 0..{head.out_features - 1} or {IGNORED}, "
                f"got {int(kept.min())}..{int(kept.max())}"
            )
    sums = []
    for part, target in zip(states.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            sums.append(checkpoint(_sums, head, part, target, use_reentrant=False))
        else:
            sums.append(_sums(head, part, target))
    cross_entropy, z_loss = torch.stack(sums).sum(0).unbind()
    cross_entropy, z_loss = cross_entropy / count, z_loss / len(targets)
    return ARLoss(cross_entropy + z_loss_weight * z_loss, cross_entropy, z_loss, count)


def _sums(head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[cross-entropy summed over targets, squared log-denominator summed over positions] of one chunk."""
    logits = head(states).float()
    denominator = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    cross_entropy = torch.where(targets != IGNORED, denominator - chosen, 0.0).sum()
    return torch.stack([cross_entropy, denominator.square().sum()])


def chunked_divergence(
    head: nn.Module, hidden_states: torch.Tensor, base_head: nn.Module, base_states: torch.Tensor, chunk: int = 512
) -> torch.Tensor:
    """Mean over positions of KL(base || model) in nats: how far a model has gone from the one that it started as.

    Hidden states [B, S, D] of both. Gradients go to `head` and `hidden_states` alone; logits exist for a chunk at a time.
    """
    pairs = zip(hidden_states.flatten(0, 1).split(chunk), base_states.flatten(0, 1).split(chunk), strict=True)
    parts = [checkpoint(_divergence, head, states, base_head, base, use_reentrant=False) for states, base in pairs]
    return torch.stack(parts).sum() / hidden_states[..., 0].numel()


def _divergence(
    head: nn.Module, states: torch.Tensor, base_head: nn.Module, base_states: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        expected = base_head(base_states).float().log_softmax(-1)
    return nn.functional.kl_div(head(states).float().log_softmax(-1), expected, reduction="sum", log_target=True)


def ignored_tokens(config, latent_shape, condition_frames: int, as_reference: bool = False) -> int:
    """How many tokens at a video's start are given and no target: `<bov>` and the conditioning latent frames.

    The reference forgets `<bov>`, so that there the last token of the conditioning frames is a target (`as_reference`).
    """
    _, height, width = latent_shape
    bov = config.bov_token_id is not None and not (as_reference and condition_frames)
    return condition_frames * height * width + bov
