"""What the actions, or trajectories, of a run mean, and whether all of its data mean that: looked at before the first step."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..conditioning.action import BRIDGE, DRIVING, FILE_NAME, ActionSpec
from ..conditioning.trajectory import trajectory_points, trajectory_spec
from ..data.clips import open_lerobot
from .adaptation import AdapterSettings
from .cache import LatentDataset

logger = logging.getLogger(__name__)

SPECS = {"bridge": BRIDGE, "driving": DRIVING}


def find_action_spec(
    config: AdapterSettings, data: LatentDataset, validation: dict[str, LatentDataset] | None = None
) -> ActionSpec | None:
    """What the actions (or trajectories) of the run mean, with the normalisation and the range of its data; None without.

    Raises ValueError where nobody says it, a data set says something else, and for a clip whose actions do not fit. Held-out
    actions beyond the range of the training data are a warning.
    """
    if "trajectory" in config.conditions:
        fps = data[0]["fps"]
        spec = trajectory_spec(config.trajectory_points * fps / (config.num_frames - 1))
        if config.init_adapter:  # which has its own statistics
            known = ActionSpec.load(config.init_adapter)
            known.check_same(spec)
            spec = known
        else:
            points = [points for _, points in _points(config, spec, data)]
            spec = spec.with_statistics(points, config.action_normalisation)
        for name, dataset in (validation or {}).items():
            _warn_of_range(spec, name, _points(config, spec, dataset))
        return spec
    if "action" not in config.conditions:
        return None
    spec = _meaning(config)
    free = without_range(spec)
    _check_clips(free if spec.normalisation == "none" else spec, "the training data", data)
    actions = [arrays["actions"] for arrays in data.arrays]
    if spec.normalisation == "none":
        spec = spec.with_statistics(actions, config.action_normalisation)
    for name, dataset in (validation or {}).items():
        _check_clips(free, name, dataset)
        _warn_of_range(spec, name, zip(dataset.keys, (arrays["actions"] for arrays in dataset.arrays), strict=True))
    if config.accumulate_actions and not spec.accumulated_scale:
        spec = spec.with_accumulation(actions)
    return spec


def without_range(spec: ActionSpec) -> ActionSpec:
    """For data that were checked: a held-out action that goes further than those trained on is no reason to end a run."""
    return replace(spec, low=(), high=())


def reference_poses(camera: dict, window: slice = slice(None)) -> torch.Tensor:
    """Poses [T, 4, 4] of a clip's only camera, or of the first of its views."""
    extrinsics = camera["extrinsics"]
    return (extrinsics if extrinsics.ndim == 3 else extrinsics[0])[window]


def _meaning(config: AdapterSettings) -> ActionSpec:
    """Of the run's setting, else of its LeRobot data sets, which must not say anything else."""
    opened = {path: open_lerobot(path) for path in dict.fromkeys([*config.data, *config.val_data])}
    opened = {path: clips for path, clips in opened.items() if clips is not None}
    stated = {path: clips.stated_spec for path, clips in opened.items() if clips.stated_spec is not None}
    silent = [path for path in opened if path not in stated]
    training = [path for path in config.data if path in opened]
    if config.action_spec:
        spec = SPECS.get(config.action_spec) or ActionSpec.load(config.action_spec)
    elif training:
        spec = opened[next((path for path in training if path in stated), training[0])].action_spec()
    else:
        raise ValueError(
            f"say what the actions mean: action_spec must be {', '.join(SPECS)}, or a folder with an {FILE_NAME} "
            "(cosmos_hf.conditioning.action.ActionSpec(...).save(folder))"
        )
    for path, said in stated.items():
        try:
            spec.check_same(said)
        except ValueError as error:
            raise ValueError(
                f"{path} says in meta/{FILE_NAME} what its actions mean, and it is not what the run's action_spec "
                f"({config.action_spec or 'that of the first data set'}) says: {error}"
            ) from error
    for path in [] if config.action_spec else silent:
        logger.warning(
            "%s does not say what its actions mean (no meta/%s). Assumed: kind %r, frame %r, %s. If that is wrong, state it: "
            "cosmos_hf.conditioning.action.ActionSpec(...).save(FOLDER), then action_spec: FOLDER",
            *(path, FILE_NAME, spec.kind, spec.frame),
            "no gripper" if spec.gripper is None else f"{spec.gripper.name!r} the gripper",
        )
    return spec


def _check_clips(spec: ActionSpec, name: str, data: LatentDataset):
    for key, arrays, (_, fps) in zip(data.keys, data.arrays, data.kinds, strict=True):
        try:
            spec.check(arrays["actions"], fps)
        except ValueError as error:
            raise ValueError(f"clip {key!r} of {name}: {error}") from error


def _warn_of_range(spec: ActionSpec, name: str, clips: Iterator):
    for key, actions in clips:
        if told := spec.out_of_range(actions):
            logger.warning(
                "clip %r of %s: %s. Figures of that set are also of what was never trained on", key, name, told
            )


def _points(config: AdapterSettings, spec: ActionSpec, data: LatentDataset) -> Iterator[tuple[str, torch.Tensor]]:
    """(clip, points of its trajectory) for every window."""
    for key, windows, arrays, (_, fps) in zip(data.keys, data.windows, data.arrays, data.kinds, strict=True):
        for window in windows.values():
            poses = reference_poses(arrays["camera"], window)
            yield key, trajectory_points(poses, fps, config.trajectory_points, spec.rate)
