"""What a call of several views is given, from dicts by the views' names to what the network takes.

Axes: B videos, V views of the call, C channels, T pixel frames of a view, T' latent frames of a view, N text tokens of a view.
"""

import torch

from ..conditioning.camera import plucker_rays
from ..conditioning.frames import FrameCondition, condition_indicator
from ..conditioning.views import (
    FRAME_REPEAT_UNIT,
    PUBLISHED_FRAME_REPEAT,
    check_known_views,
    check_view_names,
    join_views,
    reference_view,
)
from ..data.video import to_float
from .conditions import action_vectors, as_path, check_needed
from .encode import read_conditioning, repeat_to_batch


def views_of_call(pipe, views) -> dict[str, int]:
    """The views to generate, by default all, and their places in the model.

    Raises ValueError for a model of one view, and for names that it does not know.
    """
    if pipe.transformer.config.num_views == 1:
        raise ValueError(
            "this pipeline's model has one view: load an adapter that was post-trained with views (load_lora_weights), or "
            "use CosmosVideo2WorldPipeline"
        )
    known = pipe.views
    names = known if views is None else check_view_names(views)
    check_known_views("views", names, known)
    return {name: known.index(name) for name in names}


def read_prompts(what: str, prompt, views) -> list[list[str]] | None:
    """A text for all views, a dict with one for each, or a list of such, one per video -> texts [B][V]; None stays None."""
    if prompt is None:
        return None
    rows = []
    for item in prompt if isinstance(prompt, (list, tuple)) else [prompt]:
        if isinstance(item, dict):
            check_known_views(what, item, views)
            if missing := [name for name in views if name not in item]:
                raise ValueError(f"{what} has no text for {', '.join(missing)}: give one for every view ('' is none)")
        elif not isinstance(item, str):
            raise ValueError(
                f"{what} must be a string, a dict of one for each view, or a list of such, got {type(item).__name__}"
            )
        rows.append([item[name] if isinstance(item, dict) else item for name in views])
        if not all(isinstance(text, str) for text in rows[-1]):
            raise ValueError(f"{what} must hold strings, got {rows[-1]}")
    return rows


def split_embeds(what: str, embeds: torch.Tensor | None, num_views: int) -> torch.Tensor | None:
    """[B, V * N, D] -> [B, V, N, D]."""
    if embeds is None:
        return None
    if embeds.ndim != 3 or embeds.shape[1] % num_views:
        raise ValueError(
            f"{what} must be [batch, {num_views} views * tokens, width], the views one after the other, got "
            f"{tuple(embeds.shape)}"
        )
    return embeds.unflatten(1, (num_views, -1))


def one_per_video(what: str, rows, items: int, repeats: int):
    """Texts [1 or items][V] or embeddings [1 or items, V, N, D] -> those of items * repeats videos, video and view in one axis."""
    if rows is None:
        return None
    if len(rows) not in (1, items):
        raise ValueError(f"{what} of {len(rows)} videos for {items}: give one, or one per video")
    chosen = [rows[i if len(rows) > 1 else 0] for i in range(items) for _ in range(repeats)]
    if isinstance(rows, torch.Tensor):
        return torch.cat(chosen)
    return [text for row in chosen for text in row]


def read_given_views(pipe, image, video, count, views, run: dict) -> dict[str, torch.Tensor]:
    """The frames that are given, uint8 [B or 1, 3, n, H, W] by view: of a video its first n, of an image itself.

    Raises ValueError for views that the call does not have, a view that is given twice, counts that are not legal, frames for a
    network that takes none, and where nothing is left to generate.
    """
    for name, given in (("image", image), ("video", video)):
        if given is not None and not isinstance(given, dict):
            raise ValueError(
                f"{name} must be a dict by the views' names ({', '.join(views)}), got {type(given).__name__}"
            )
        check_known_views(name, given or (), views)
    image, video = image or {}, video or {}
    if twice := sorted(image.keys() & video.keys()):
        raise ValueError(f"image and video are both given for {', '.join(twice)}")
    if (image or video) and not getattr(
        pipe.transformer, "takes_condition_mask", True
    ):  # autoregressive ones always do
        raise ValueError("this transformer is text-to-world and cannot be given frames: give prompts alone")
    if isinstance(count, dict):
        check_known_views("num_conditioning_frames", count, list(video))
    counts = count if isinstance(count, dict) else dict.fromkeys(video, count)
    factor, most = pipe.vae.config.temporal_compression, run["num_frames"]
    size = factor, run["height"], run["width"], run["fps"]
    given = {}
    for name in views:
        if name in image:
            given[name] = read_conditioning(image[name], None, None, most, *size)
        elif name in video:
            if (wanted := counts.get(name)) is not None and wanted > most:
                raise ValueError(f"num_conditioning_frames must be at most num_frames={most}, got {wanted} for {name}")
            given[name] = read_conditioning(None, video[name], wanted, most, *size, from_end=False)
    if len(given) == len(views) and all(frames.shape[2] == most for frames in given.values()):
        raise ValueError(f"all {most} frames of all views are given: nothing is left to generate")
    return given


def hold_views(
    pipe, given: dict[str, torch.Tensor], views, items: int, repeats: int, noise: torch.Tensor
) -> FrameCondition:
    """Frames by view -> what the sampler holds on to, of noise [B, C, V * T', H', W']."""
    frames, counts, latents = noise.shape[2] // len(views), [], torch.zeros_like(noise)
    for place, name in enumerate(views):
        if name not in given:
            counts.append(0)
            continue
        video = to_float(given[name]).to(noise.device, pipe.vae.dtype)
        known = torch.cat([pipe.vae.encode(item[None]).latents for item in video])  # item by item: bounded memory
        known = pipe.vae.normalize(known.float()) * pipe.scheduler.config.sigma_data
        counts.append(known.shape[2])
        latents[:, :, place * frames : place * frames + known.shape[2]] = repeat_to_batch(known, items, repeats)
    indicator = condition_indicator(noise.shape[2], torch.tensor([counts]), noise.device)
    return FrameCondition(latents, indicator, augment_sigma=pipe.augment_sigma, augment_noise=noise)


# ---- what the network is given besides ------------------------------------------------------------------------------


def read_view_conditions(
    pipe, run: dict, views: dict[str, int], actions, camera, frame_repeat
) -> dict[str, torch.Tensor]:
    """As `conditions.read_conditions`; actions are the same for all views, cameras and repetitions dicts by view."""
    check_needed(pipe, run, actions, camera)
    conditions = {}
    if actions is not None:
        vectors = action_vectors(pipe, actions, run["num_frames"], run["fps"])
        conditions["actions"] = vectors if vectors.shape[1] == 1 else vectors.repeat(1, len(views), 1)
    if camera is not None:
        cameras = camera if isinstance(camera, (list, tuple)) else [camera]
        conditions["camera"] = torch.stack([_view_rays(pipe, item, run, views) for item in cameras])
    if pipe.transformer.config.frame_repeat_embed:
        told = PUBLISHED_FRAME_REPEAT if frame_repeat is None else frame_repeat
        check_known_views("frame_repeat", frame_repeat or (), views)
        conditions["frame_repeat"] = torch.tensor([[told.get(name, 0.0) for name in views]]) / FRAME_REPEAT_UNIT
    elif frame_repeat is not None:
        raise ValueError("this pipeline's model takes no frame_repeat (frame_repeat_embed is off in its config)")
    return conditions


def _view_rays(pipe, cameras, run: dict, views: dict[str, int]) -> torch.Tensor:
    """Cameras by view -> rays [6, V * T', H', W'] in one world, that of `reference_view`'s first camera."""
    if not isinstance(cameras, dict) or set(cameras) != set(views):
        told = ", ".join(map(str, cameras)) if isinstance(cameras, dict) else type(cameras).__name__
        raise ValueError(f"camera must be a dict with a camera for each of the views {', '.join(views)}, got {told}")
    height, width, frames = run["height"], run["width"], run["num_frames"]
    paths = {name: as_path(cameras[name], height, width).fit(height, width) for name in views}
    if wrong := {name: len(path) for name, path in paths.items() if len(path) != frames}:
        raise ValueError(f"camera has {wrong} poses for {frames} frames")
    first = list(paths.values())[reference_view(list(views.values()))].extrinsics[0]
    compression = pipe.vae.config.spatial_compression, pipe.vae.config.temporal_compression
    rays = [
        plucker_rays(p.intrinsics, p.extrinsics, height, width, *compression, reference=first) for p in paths.values()
    ]
    return join_views(torch.stack(rays), dim=0)
