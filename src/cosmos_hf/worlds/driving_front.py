"""The driving world with its front camera alone, as plain single-view clips: what a single-view base is trained on."""

import numpy as np

from . import driving
from .driving import FPS, HEIGHT, NUM_FRAMES, SPLITS, VERSION, WIDTH, DrivingEpisode

__all__ = ["FPS", "HEIGHT", "NUM_FRAMES", "SPLITS", "VERSION", "WIDTH", "simulate"]


class FrontEpisode(DrivingEpisode):
    """One view: its arrays have no axis of views."""

    def videos(self) -> dict[str, np.ndarray]:
        return {"": self.frames["front"]}

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = super().arrays()
        return arrays | {name: arrays[name][0] for name in ("intrinsics", "extrinsics", "masks") if name in arrays}


def simulate(
    split: str, index: int, seed: int = 0, renderer: str | None = "filament", truth: bool = False
) -> FrontEpisode:
    """The same drive as `driving.simulate` with the same arguments."""
    episode = driving.simulate(split, index, seed, renderer, truth, views=("front",))
    return FrontEpisode(**vars(episode))
