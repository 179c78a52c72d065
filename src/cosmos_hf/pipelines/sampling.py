"""How a sampling run is done, beyond its number of steps: solver, noise levels, and when and how guidance acts."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Sampling:
    """Options of a pipeline's call, `sampling=Sampling(...)` or a dict of these fields.

    Attributes:
        solver, grid: of `CosmosEDMScheduler`; None takes its config's.
        guidance_interval: (low, high), the noise levels sigma between which guidance acts (arXiv 2404.07724); outside, only the
            prompt's branch is evaluated, which halves the cost there. None is everywhere.
        guidance_rescale: 0 to 1, how far the guided output is brought back to the spread of the prompt's own
            (arXiv 2305.08891, section 3.4), against the glare of large scales.
        drop_conditions: names of conditions ("actions", "camera") that the unconditional branch does not see, so that guidance
            strengthens them, too; for models that were trained with a `condition_dropout`.
        batch_guidance: evaluate both branches in one batch: fewer, larger calls with twice the activations. Same result.
    """

    solver: str | None = None
    grid: str | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    batch_guidance: bool = False
    drop_conditions: tuple[str, ...] = ()

    def __post_init__(self):
        interval = self.guidance_interval
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
            raise ValueError(f"guidance_interval must be (low, high) with 0 <= low < high, in sigma; got {interval}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be between 0 and 1, got {self.guidance_rescale}")

    def check_dropped(self, conditions, guided: bool):
        """ValueError where a condition is to be dropped that the call does not have, or without guidance."""
        if missing := [name for name in self.drop_conditions if name not in conditions]:
            there = ", ".join(conditions) or "none"
            raise ValueError(f"drop_conditions names {', '.join(missing)}; this call's conditions: {there}")
        if self.drop_conditions and not guided:
            raise ValueError("drop_conditions acts through guidance: give guidance_scale > 0")

    @classmethod
    def of(cls, options: "Sampling | dict | None") -> "Sampling":
        """Whatever a call was given. Raises ValueError for an unknown option, naming the known ones."""
        if options is None or isinstance(options, cls):
            return options or cls()
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"sampling has no option {', '.join(unknown)}; there is {', '.join(known)}")
        return cls(**options)


def guided(
    branch: Callable[[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], tuple[bool, ...]], torch.Tensor],
    hidden_states: torch.Tensor,
    c_noise: torch.Tensor,
    text: torch.Tensor,
    negative_text: torch.Tensor,
    scale: float,
    sampling: Sampling,
    generated: torch.Tensor | None = None,
) -> torch.Tensor:
    """The network's output under guidance, [B, C, T, H, W] float32: cond + scale (cond - uncond).

    Args:
        branch: (hidden_states, c_noise, texts, kept) -> output; `texts` and `kept` have an entry for each part of the batch: its
            text, and whether it is the branch with all conditions.
        generated: bool [B or 1, 1, T, 1, 1], the frames that are not given; the rescaling looks at these alone.
    """
    if sampling.guidance_interval is not None:
        low, high = sampling.guidance_interval
        sigma = (4 * c_noise.double()).exp()
        if not ((low <= sigma) & (sigma <= high)).all():
            return branch(hidden_states, c_noise, (text,), (True,))
    if sampling.batch_guidance:
        noise = c_noise if c_noise.ndim == 0 else torch.cat([c_noise, c_noise])
        with_text, without = branch(
            torch.cat([hidden_states, hidden_states]), noise, (text, negative_text), (True, False)
        ).chunk(2)
    else:
        with_text = branch(hidden_states, c_noise, (text,), (True,))
        without = branch(hidden_states, c_noise, (negative_text,), (False,))
    output = with_text + scale * (with_text - without)
    if sampling.guidance_rescale:
        ratio = _spread(with_text, generated) / _spread(output, generated)
        output = output * (1 + sampling.guidance_rescale * (ratio - 1))
    return output


def _spread(output: torch.Tensor, generated: torch.Tensor | None) -> torch.Tensor:
    """Standard deviation of each sample's generated frames, [B, 1, 1, 1, 1]."""
    share = torch.ones_like(output) if generated is None else generated.to(output).expand_as(output)
    count = share.sum((1, 2, 3, 4), keepdim=True)
    mean = (output * share).sum((1, 2, 3, 4), keepdim=True) / count
    return (((output - mean).square() * share).sum((1, 2, 3, 4), keepdim=True) / count).sqrt()
