"""Codes of a discrete tokenizer beside the latents of a continuous one: which code frame belongs to which latent frame.

Both tokenizers are causal: frame 0 of either codes pixel frame 0 alone, and frame k the pixel frames (k - 1) f + 1 to k f, where f
is the temporal compression. With equal compressions they correspond one to one; where a code frame spans r latent frames,
latent frame k belongs to code frame ceil(k / r).

Axes: B batch, T latent frames, H and W latent height and width; T', H', W' the same of the codes.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CodeGrid:
    """How many latent positions a code spans along (time, height and width)."""

    temporal: int
    spatial: int

    @classmethod
    def of(cls, codes: tuple[int, int], latents: tuple[int, int]) -> "CodeGrid":
        """From the (temporal, spatial) compressions of both tokenizers; ValueError where the codes are the finer ones."""
        for axis, coarse, fine in zip(("temporal", "spatial"), codes, latents, strict=True):
            if coarse < fine or coarse % fine:
                raise ValueError(
                    f"the codes have a {axis} compression of {coarse}, the latents of {fine}: a code must span a whole number "
                    f"of latents, so take a continuous tokenizer whose {axis} compression divides {coarse}"
                )
        return cls(codes[0] // latents[0], codes[1] // latents[1])

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') -> (T, H, W)."""
        return 1 + (frames - 1) * self.temporal, height * self.spatial, width * self.spatial

    def spread(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices [..., T', H', W'] -> [..., T, H', W'], each latent frame with the codes that it belongs to."""
        frames = torch.arange(1 + (indices.shape[-3] - 1) * self.temporal, device=indices.device)
        return indices.index_select(-3, -(-frames // self.temporal))


def mirror_frames(condition: torch.Tensor, frames: int) -> torch.Tensor:
    """[B, C, T, H, W] with at least `frames` frames: forwards and backwards in turn, a single frame repeated."""
    count = condition.shape[2]
    if count >= frames:
        return condition
    places = torch.arange(frames, device=condition.device) % max(1, 2 * (count - 1))
    return condition.index_select(2, torch.minimum(places, (2 * (count - 1) - places).abs()))
