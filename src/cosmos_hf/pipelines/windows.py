"""Clips that are longer than a network's window: evaluated window by window, as one.

At every step of the sampler all windows see the same noisy clip, and their outputs are blended where they overlap (as in arXiv
2302.08113, along time). So there is one noise and one result, and what a window decides the next one finds in the sample:
windows that are sampled one by one and blended afterwards decide for themselves, and the video jumps from one to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Windows:
    """Windows of `size` latent frames over a clip of `frames`, at least `overlap` of them shared by neighbours.

    The first frame of a later window counts nothing: there the network expects a latent frame that codes a single pixel frame.
    """

    frames: int
    size: int
    overlap: int

    def __post_init__(self):
        if not 1 <= self.overlap < self.size:
            raise ValueError(
                f"overlap_latent_frames must be at least 1 and less than the window of {self.size}, got {self.overlap}"
            )
        if self.frames < self.size:
            raise ValueError(f"a clip of {self.frames} latent frames does not fill a window of {self.size}")

    @property
    def starts(self) -> list[int]:
        """First frames, evenly spread."""
        room = self.frames - self.size
        count = -(-room // (self.size - self.overlap))
        return [0, *(i * room // count for i in range(1, count + 1))]

    @property
    def weights(self) -> list[torch.Tensor]:
        """How much each window counts at each of its frames, [size]; they sum to 1 at every frame of the clip."""
        starts, places = self.starts, torch.arange(self.size)
        weights = [torch.ones(self.size) for _ in starts]
        for i, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            shared = self.size - (b - a)
            weights[i] = torch.minimum(weights[i], (self.size - places) / shared)
            weights[i + 1] = torch.minimum(weights[i + 1], places / shared)
        total = torch.zeros(self.frames)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + self.size] += weight
        return [weight / total[start : start + self.size] for start, weight in zip(starts, weights, strict=True)]

    def evaluate(
        self, network: Callable[[torch.Tensor, dict], torch.Tensor], hidden_states: torch.Tensor, inputs: dict
    ) -> torch.Tensor:
        """The blended output of network(hidden_states, inputs), [B, C, frames, H, W].

        Inputs with a time axis, [B, C, frames, H, W], are cut like the hidden states, all others are passed on.
        """
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for start, weight in zip(self.starts, self.weights, strict=True):
            cut = slice(start, start + self.size)
            given = {name: value[:, :, cut] if value.ndim == 5 else value for name, value in inputs.items()}
            output[:, :, cut] += weight.to(output).view(-1, 1, 1) * network(hidden_states[:, :, cut], given)
        return output
