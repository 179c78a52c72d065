"""The things of `tabletop_objects`, with the robot's hand at them: in three frames it gets to what is named, and goes
along with it.

Between that world and `tabletop_instructions`: a hand that leaps to its object and hides a part of it, and no way there to be
planned. Places are set, not simulated.
"""

from . import tabletop_objects
from .tabletop_instructions import ToldEpisode
from .tabletop_objects import FPS, HEIGHT, NUM_FRAMES, SPLITS, WIDTH

__all__ = ["FPS", "HEIGHT", "NUM_FRAMES", "SPLITS", "VERSION", "WIDTH", "simulate"]

VERSION = 1


def simulate(
    split: str, index: int, seed: int = 0, renderer: str | None = "filament", masks: bool = False
) -> ToldEpisode:
    """Clip `index` of a split, of the same scene and text as that of `tabletop_objects.simulate`, whose arguments these are."""
    return tabletop_objects.simulate(split, index, seed, renderer, masks, hand=True)
