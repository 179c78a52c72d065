"""The table-top world as a robot is told what to do there: it picks or pushes in every clip, and captions are instructions,
"Push the red cube to the left." Every clip has `alternatives`, what could have been told instead.

An instruction begins with what is asked for. In "A robot arm with a two-finger gripper pushes the red cube" the bundled text
encoder, which learned from captions of what is in the picture, hardly tells red from blue; in "Push the red cube" it does.

Four clips in a row are of one scene, in which every object has its turn. A model that sees a scene with one instruction alone
learns by heart what happens there, and has no need to read.
"""

from . import tabletop
from .captions import alternatives
from .tabletop import FPS, HEIGHT, NUM_FRAMES, WIDTH, Episode

__all__ = ["FPS", "HEIGHT", "NUM_FRAMES", "SPLITS", "VERSION", "WIDTH", "simulate"]

VERSION = 3
CLIPS_PER_SCENE = 4
SPLITS = tuple(split for split in tabletop.SPLITS if split != "val_counterfactual")  # whose plans nobody is told


class ToldEpisode(Episode):
    def record(self) -> dict:
        names = [thing.name for thing in self.scene.objects]
        return super().record() | {"alternatives": alternatives(self.caption, names[self.target], names)}


def simulate(
    split: str, index: int, seed: int = 0, renderer: str | None = "filament", masks: bool = False
) -> ToldEpisode:
    """Clip `index` of a split, with the arguments of `tabletop.simulate`."""
    return ToldEpisode(**vars(tabletop.simulate(split, index, seed, renderer, masks, turns=CLIPS_PER_SCENE)))
