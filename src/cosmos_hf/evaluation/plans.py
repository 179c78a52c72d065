"""Different plans, different futures: from one first frame and one seed, do generated videos differ as the true ones do?

A model that ignores its actions, or its camera, gives the same video for every plan. Plans are whatever a call is given besides
the frame: actions, a trajectory or a camera.
"""

from collections.abc import Callable
from itertools import combinations

import torch

from ..data.video import to_float
from .metrics import mean_with_interval

LEAST = 1e-3  # rms, of the range [0, 1]: futures that differ by less do not differ


def shared_starts(samples: list[dict]) -> list[list[int]]:
    """Numbers of the clips, by groups, that begin in one scene and differ in their plan, as in the worlds' `val_counterfactual`."""
    groups: list[list[int]] = []
    for number, sample in enumerate(samples):
        record = sample["record"]
        if record.get("plan") is None or "scene" not in record:
            continue
        if groups and samples[groups[-1][0]]["record"]["scene"] == record["scene"]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [group for group in groups if len(group) > 1]


def evaluate_plans(
    generate: Callable[[dict, int, int], torch.Tensor], samples: list[dict], num_plans: int = 4
) -> dict:
    """Root mean square differences, of the range [0, 1], between futures of several plans from one first frame, over all pairs.

    Args:
        generate: (sample, number of the clip whose plan is followed, seed) -> video, float [3, T, H, W] in [-1, 1] that begins
            with one frame of the sample's.
        samples: with `video` uint8 [3, T, H, W] and `record`. Where some of them share their starts (`shared_starts`) those are
            taken; else every clip gets its own plan and those of the next ones, whose true futures from here nobody knows.
        num_plans: at most so many plans from each start.

    Returns {"starts": their number, "plans": of each, "generated", "true", "ratio", "own_future"}; all but the first two are
    {"mean", "low", "high", "count"} over starts. "true" is how much the true futures differ, and "ratio" generated over true.
    "own_future" is the share of true futures to which, of all generated ones, that of the same plan is nearest; chance is one
    over the number of plans. Without shared starts there is "true_motion" in place of "true", how much the true future differs
    from the still first frame, and no "own_future".
    """
    shared = [group[:num_plans] for group in shared_starts(samples)]
    count = min(num_plans, len(samples))
    groups = shared or [[(first + k) % len(samples) for k in range(count)] for first in range(len(samples))]
    if count < 2:
        raise ValueError(f"{count} plans from a start tell nothing: take at least two clips and two plans")
    rows = []
    for seed, group in enumerate(groups):
        first = samples[group[0]]
        made = [_future(generate(first, plan, seed)) for plan in group]
        row = {"generated": _mean_of_pairs(made)}
        if shared:
            true = [_future(to_float(samples[plan]["video"])) for plan in group]
            row |= {"true": _mean_of_pairs(true), "own_future": _own_future(made, true)}
        else:
            video = to_float(first["video"])
            row["true_motion"] = _rms(_future(video), video[:, :1] / 2)
        row["ratio"] = row["generated"] / max(LEAST, row.get("true", row.get("true_motion")))
        rows.append(row)
    told = {name: mean_with_interval(torch.tensor([row[name] for row in rows])) for name in rows[0]}
    return {"starts": len(groups), "plans": max(map(len, groups)), **told}


def _future(video: torch.Tensor) -> torch.Tensor:
    """The frames after the first, so that differences are of the range [0, 1]."""
    return video[:, 1:].float().clamp(-1, 1) / 2


def _rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def _mean_of_pairs(futures: list[torch.Tensor]) -> float:
    values = [_rms(a, b) for a, b in combinations(futures, 2)]
    return sum(values) / len(values)


def _own_future(made: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    """Ties, as where all videos are the same, are shared."""
    right = 0.0
    for own, truth in enumerate(true):
        errors = [_rms(video, truth) for video in made]
        nearest = [number for number, error in enumerate(errors) if error <= min(errors) + 1e-9]
        right += (own in nearest) / len(nearest)
    return right / len(true)
