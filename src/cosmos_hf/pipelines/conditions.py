"""Actions and cameras of a call, from what a user has to what the network takes.

Axes: B videos, T pixel frames, T' latent frames, A width of an action, H' and W' latent height and width.
"""

from dataclasses import replace

import numpy as np
import torch

from ..conditioning.action import ActionSpec, group_actions
from ..conditioning.camera import CameraPath, plucker_rays
from ..conditioning.trajectory import trajectory_points, trajectory_vector

_HOW = {
    "actions": "the actions that lead from frame to frame",
    "camera": "a CameraPath, or a dict with intrinsics and extrinsics",
}


def read_conditions(pipe, run: dict, actions, camera) -> dict[str, torch.Tensor]:
    """What the network is given besides text and frames, by the names of its arguments; each [items, ...].

    Raises ValueError for a condition that the pipeline's model cannot use or lacks, and for one that does not fit the video.
    """
    check_needed(pipe, run, actions, camera)
    conditions = {}
    if actions is not None:
        conditions["actions"] = action_vectors(pipe, actions, run["num_frames"], run["fps"])
    if camera is not None:
        conditions["camera"] = camera_rays(pipe, camera, run["num_frames"], run["height"], run["width"])
    return conditions


def check_needed(pipe, run: dict, actions, camera):
    """ValueError for a condition that the model of the pipeline cannot use, or that it lacks."""
    views = pipe.transformer.config.num_views
    if views > 1 and not pipe.takes_views:
        raise ValueError(
            f"this pipeline's model has {views} views: call it through CosmosMultiViewPipeline, which "
            "also generates single ones (views=)"
        )
    needed = pipe.transformer.conditions
    for name, given in (("actions", actions), ("camera", camera)):
        if given is not None and name not in needed:
            raise ValueError(
                f"this pipeline's model takes no {name}: load an adapter that was post-trained with it (load_lora_weights), or "
                f"make it active (set_adapters)"
            )
        if given is None and name in needed:
            raise ValueError(
                f"this pipeline's model needs {name}=: {_HOW[name]} of the video's {run['num_frames']} frames"
            )


def spec_of(pipe) -> ActionSpec:
    if pipe.action_spec is None:
        raise ValueError(
            "nobody has said what this model's actions mean: make the pipeline with action_spec=ActionSpec(...) "
            "(cosmos_hf.conditioning.action)"
        )
    return pipe.action_spec


def action_vectors(pipe, actions, num_frames: int, fps: float) -> torch.Tensor:
    """[T - 1, A], [B, T - 1, A] or a list of [T - 1, A], in the units of the `ActionSpec` -> [B, T' or 1, action_dim].

    Of a trajectory it is the points, [N, 3] or such per video, that lead to [B, 1, action_dim]; of a model that predicts the next
    frame from one action (`takes_one_action`) that action, [1, A] or such per video.
    """
    spec, config = spec_of(pipe), pipe.transformer.config
    if spec.kind == "trajectory":
        return _trajectories(spec, _stacked(actions), config.action_dim // spec.width, (num_frames - 1) / fps)
    if takes_one_action(pipe):
        return _next_action(spec, config.action_dim, _stacked(actions), fps)
    return latent_actions(pipe, checked_actions(pipe, actions, num_frames, fps))


def takes_one_action(pipe) -> bool:
    """Whether the model is told only the action that leads on from what is given, as the paper's next-frame prediction."""
    # An autoregressive transformer has one form.
    one = getattr(pipe.transformer.config, "action_form", None) == "as_written"
    return one and "actions" in pipe.transformer.conditions and spec_of(pipe).kind != "trajectory"


def _next_action(spec: ActionSpec, action_dim: int, actions, fps: float) -> torch.Tensor:
    actions = spec.check(actions, fps)
    actions = actions[None] if actions.ndim == 2 else actions
    if actions.ndim != 3 or actions.shape[1] != 1:
        raise ValueError(
            f"this model predicts what follows from one action (action_form='as_written'): actions must be [1, {spec.width}], the "
            f"one that leads to the first generated frame, or one such per video, got {tuple(actions.shape[-2:])}. A model "
            "that takes one for every frame is post-trained with action_form: intended"
        )
    if action_dim != spec.num_inputs:
        raise ValueError(
            f"the transformer takes {action_dim} numbers (action_dim), one action has {spec.num_inputs}: the action_spec is "
            "another model's"
        )
    return spec.inputs(actions)


def checked_actions(pipe, actions, num_frames: int, fps: float) -> torch.Tensor:
    """What leads from frame to frame of `num_frames` frames, [B, T - 1, A] in its units."""
    spec, config = spec_of(pipe), pipe.transformer.config
    actions = spec.check(_stacked(actions), fps)
    actions = actions[None] if actions.ndim == 2 else actions
    if actions.ndim != 3 or actions.shape[1] != num_frames - 1:
        raise ValueError(
            f"actions must be [{num_frames - 1}, {spec.width}] for {num_frames} frames, or one such per video, got "
            f"{tuple(actions.shape[-2:] if len(actions) == 1 else actions.shape)}"
        )
    count = pipe.vae.config.temporal_compression
    if config.action_dim != count * spec.num_inputs:
        raise ValueError(
            f"the transformer takes {config.action_dim} numbers (action_dim), {count} actions of "
            f"{spec.num_inputs} numbers lead to each latent frame: the action_spec is another model's"
        )
    return actions


def latent_actions(pipe, actions: torch.Tensor) -> torch.Tensor:
    """Checked actions [B, T - 1, A] of a window -> the network's [B, T', action_dim]."""
    return group_actions(spec_of(pipe).inputs(actions), pipe.vae.config.temporal_compression)


def _stacked(actions):
    if isinstance(actions, (list, tuple)) and np.ndim(actions[0]) == 2:
        return np.stack([np.asarray(item, dtype=np.float32) for item in actions])
    return actions.cpu() if torch.is_tensor(actions) else np.asarray(actions, dtype=np.float32)


def _trajectories(spec: ActionSpec, points, num_points: int, duration: float) -> torch.Tensor:
    if duration > num_points / spec.rate * 1.01:
        raise ValueError(
            f"the video lasts {duration:g} s, the {num_points} points of the model's trajectories {num_points / spec.rate:g} s: "
            "give fewer frames"
        )
    points = torch.as_tensor(points).float().cpu()
    return trajectory_vector(spec, points if points.ndim > 2 else points[None], num_points)


def camera_rays(pipe, camera, num_frames: int, height: int, width: int) -> torch.Tensor:
    """A camera, or a list of them -> Plücker rays [B, 6, T', H', W'], relative to the first frame's camera."""
    compression = pipe.vae.config.spatial_compression, pipe.vae.config.temporal_compression
    rays = []
    for path in camera if isinstance(camera, (list, tuple)) else [camera]:
        path = as_path(path, height, width)
        if len(path) != num_frames:
            raise ValueError(f"camera has {len(path)} poses for {num_frames} frames")
        path = path.fit(height, width)
        rays.append(plucker_rays(path.intrinsics, path.extrinsics, height, width, *compression))
    return torch.stack(rays)


def as_path(camera, height: int, width: int) -> CameraPath:
    """A `CameraPath` as it is, or one from a dict whose "height" and "width", of its pictures, default to the video's.

    ValueError for a dict whose principal point lies outside these pictures: its intrinsics are of others.
    """
    if isinstance(camera, CameraPath):
        return camera
    if not isinstance(camera, dict) or not {"intrinsics", "extrinsics"} <= camera.keys():
        raise ValueError("camera must be a CameraPath or a dict with intrinsics and extrinsics (and height and width)")
    if unknown := sorted(camera.keys() - {"intrinsics", "extrinsics", "height", "width"}):
        raise ValueError(f"camera has unknown entries {', '.join(unknown)}")
    path = CameraPath(**{"height": height, "width": width, **camera})
    centres = path.intrinsics[:, :2, 2]
    if (centres < 0).any() or (centres > torch.tensor([path.width, path.height])).any():
        x, y = centres[0].tolist()
        raise ValueError(
            f"the camera's principal point (x {x:g}, y {y:g}) lies outside its pictures of {path.height}x{path.width} (height x "
            "width): its intrinsics are of another resolution. Scale them, or say height and width of their pictures in the dict; "
            "pictures that were cut so are a CameraPath"
        )
    return path


def expand_conditions(conditions: dict[str, torch.Tensor], items: int, num_videos_per_prompt: int) -> dict:
    """Of one item or of every one -> one per generated video."""
    expanded = {}
    for name, value in conditions.items():
        if len(value) not in (1, items):
            raise ValueError(f"{name} of {len(value)} videos for {items}: give one, or one per video")
        shape = (items, *[-1] * (value.ndim - 1))
        expanded[name] = value.expand(shape).repeat_interleave(num_videos_per_prompt, dim=0)
    return expanded


# ---- a clip as input -----------------------------------------------------------------------------------------------------


def conditions_of_clip(pipe, sample: dict) -> dict:
    """The `actions` and `camera` of a call, as far as the pipeline's model takes them, from a sample of one camera
    (`data.samples`). ValueError for one that lacks them."""
    given = {}
    if "actions" in pipe.transformer.conditions:
        given["actions"] = clip_actions(pipe, sample, sample.get("camera", {}).get("extrinsics"))
    if "camera" in pipe.transformer.conditions:
        given["camera"] = _of_clip(sample, "camera", sample.get("camera"))
    return given


def clip_actions(pipe, sample: dict, poses):
    """A sample's actions, or for a model of trajectories the points of the way of the camera with these poses [T, 4, 4]."""
    spec = spec_of(pipe)
    if spec.kind != "trajectory":
        return _of_clip(sample, "actions", sample.get("actions"))
    count = pipe.transformer.config.action_dim // spec.width
    return trajectory_points(_of_clip(sample, "camera", poses), sample["fps"], count, spec.rate)


def _of_clip(sample: dict, name: str, value):
    if value is None:
        raise ValueError(
            f"the model takes {name}, which the clip {sample['key']!r} does not have: intrinsics and extrinsics for a camera or a "
            "trajectory, actions for actions (npz, csv or json beside the video)"
        )
    return value


# ---- windows of a long video -------------------------------------------------------------------------------------------


def window_of_actions(spec: ActionSpec, actions, start: int, count: int) -> torch.Tensor:
    """`count` actions from `start` on. Past their end nothing moves: a gripper and absolute targets stay, deltas are zero."""
    actions = torch.as_tensor(actions).float()
    missing = start + count - len(actions)
    if missing > 0:
        rest = actions[-1:].clone()
        if spec.kind == "delta":
            held = [spec.gripper is not None and name == spec.gripper.name for name in spec.names]
            rest = torch.where(torch.tensor(held), rest, torch.zeros_like(rest))
        actions = torch.cat([actions, rest.expand(missing, -1)])
    return actions[start : start + count]


def window_of_camera(path: CameraPath, start: int, num_frames: int) -> CameraPath:
    """`num_frames` poses from `start` on. Past the path's end the camera stands still."""
    index = torch.arange(start, start + num_frames).clamp(max=len(path) - 1)
    return replace(path, intrinsics=path.intrinsics[index], extrinsics=path.extrinsics[index], names=())
