"""Several cameras at once (arXiv 2501.03575, section 6.3): their names, and which frames of which view are given.

The network's time axis holds the views one after the other, each with its own positions and its own text.

Axes: B batch, V views, C channels, T latent frames of a view, H and W latent height and width.
"""

from collections.abc import Sequence

import torch

# Of the published six-view models, in their order.
PUBLISHED_VIEWS = ("front", "left", "right", "back", "back_left", "back_right")
# How often a view's frame repeats, as the published inference tells these models for every clip.
PUBLISHED_FRAME_REPEAT = {"back_left": 10.0, "back_right": 10.0}
FRAME_REPEAT_UNIT = 10.0  # the network is told tenths


def check_view_names(names: Sequence[str], num_views: int | None = None) -> tuple[str, ...]:
    """Names of a model's views as a tuple. ValueError where they repeat, are no words, or are not `num_views`."""
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"views must be a list of names, got {names!r}")
    names = tuple(names)
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"views must be one or several different names, got {list(names)}")
    if num_views is not None and len(names) != num_views:
        raise ValueError(f"{len(names)} names ({', '.join(names)}) for a model of {num_views} views")
    return names


def check_known_views(what: str, given: Sequence[str], known: Sequence[str]):
    """ValueError for a view in `given` that is not among `known`."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{what} names {', '.join(map(str, unknown))}: the views are {', '.join(known)}")


def join_views(tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """[B, V, C, T, ...] -> [B, C, V * T, ...], where `dim` is the axis of the views."""
    return tensor.transpose(dim, dim + 1).flatten(dim + 1, dim + 2)


def pick_views(tensor: torch.Tensor, indices: Sequence[int], num_views: int, dim: int) -> torch.Tensor:
    """Of an axis `dim` that holds `num_views` views one after the other those at `indices`, in that order."""
    parts = tensor.chunk(num_views, dim=dim)
    return torch.cat([parts[index] for index in indices], dim=dim)


def reference_view(places: Sequence[int]) -> int:
    """Which of the views that take part, told by their places in the model, gives the coordinates of all their rays.

    It is the first one in the model's order, in whatever order they come; its first camera is the one that they are relative to.
    """
    return min(range(len(places)), key=places.__getitem__)


def draw_given_frames(
    batch: int, views: int, latent_frames: int, most: int, whole_views: float, device=None, least: int = 0
) -> torch.Tensor:
    """How many latent frames of each view a training sample is given, [B, V]; from torch's global generator.

    As the published models were trained, the first n frames of every view, n uniform in `least`..`most`; but for half of the
    samples of a random half of the views only. And in a share `whole_views` of the samples a random subset of the views,
    neither none nor all, is given whole.
    """
    first = torch.randint(least, most + 1, (batch, 1), device=device).expand(batch, views)
    every = torch.rand(batch, 1, device=device) < 0.5
    counts = torch.where(every | (torch.rand(batch, views, device=device) < 0.5), first, torch.zeros_like(first))
    if views == 1:
        return counts
    # A random order of the views, of which the first `number` are given whole.
    order = torch.rand(batch, views, device=device).argsort(1)
    number = torch.randint(1, views, (batch, 1), device=device)
    chosen = (order < number) & (torch.rand(batch, 1, device=device) < whole_views)
    return torch.where(chosen, torch.full_like(counts, latent_frames), counts)
