"""Does a generated video show what its camera should have seen (arXiv 2501.03575, section 6.1)? Poses are recovered from its
frames and compared with those that were asked for.

It needs pycolmap: `pip install 'cosmos-hf[geometry]'`. Axes: T frames.
"""

import torch

from .geometry import RecoveredPath, load_pycolmap, path_errors, pose_errors, recover_poses, summarise_poses


def why_not_measurable(cameras: list[dict]) -> str | None:
    """What stands in the way of `recover_paths` for clips with these cameras, as in samples; None where nothing does."""
    try:
        load_pycolmap()
    except ImportError as error:
        return str(error)
    if any((camera["intrinsics"] != _lens(camera)).any() for camera in cameras):
        return "poses are recovered for a fixed lens: the intrinsics of a clip change from frame to frame"
    return None


def recover_paths(videos: list[torch.Tensor], cameras: list[dict]) -> list[RecoveredPath | None]:
    """Of videos uint8 [3, T, H, W], seen through the intrinsics of `cameras`; None where not every frame could be placed."""
    return [
        recover_poses(video.permute(1, 2, 3, 0).numpy(), _lens(camera))
        for video, camera in zip(videos, cameras, strict=True)
    ]


def score_paths(paths: list[RecoveredPath | None], cameras: list[dict], given: int = 1) -> dict:
    """`summarise_poses` of recovered paths against the poses [T, 4, 4] of `cameras`, from the last of the `given` frames on.

    Besides the figures of `pose_errors` it has those of `path_errors` that need no metres, which pictures do not know.
    """
    errors = []
    for path, camera in zip(paths, cameras, strict=True):
        if path is None:
            errors.append(None)
            continue
        ways = path.extrinsics[given - 1 :], camera["extrinsics"][given - 1 :]
        scaled = {name: value for name, value in path_errors(*ways).items() if name != "following"}
        errors.append(pose_errors(*ways) | scaled)
    return summarise_poses(errors)


def _lens(camera: dict) -> torch.Tensor:
    """Intrinsics [3, 3], the first frame's where there are those of every frame."""
    return camera["intrinsics"] if camera["intrinsics"].ndim == 2 else camera["intrinsics"][0]
