"""What the scripts share that steer a world from the shell: adapters, actions, cameras, and rollouts as a LeRobot data set."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..conditioning.camera import CameraPath
from ..conditioning.camera_files import read_cameras
from ..conditioning.camera_paths import ORBITS, TRAJECTORIES, named_trajectory
from ..data.annotated import read_actions
from ..data.video import read_video
from .scripting import file_checksum, folder_checksum

FOCAL = 0.86  # of a picture's width: it shows 60 degrees


def add_steering_arguments(parser: argparse.ArgumentParser, camera: bool = True):
    """`camera`: whether the script's models may be steered by a camera, and guided by what steers."""
    parser.add_argument(
        "--adapter", nargs="+", help="folders or Hub ids of adapters, as training/posttrain.py writes them"
    )
    parser.add_argument("--actions", help="npz, npy, csv or json of the video's actions [num_frames - 1, A]")
    if not camera:
        return
    parser.add_argument(
        "--camera",
        help=f"a way of the camera ({', '.join([*TRAJECTORIES, *ORBITS])}), or a file or folder of its poses: npz "
        "(intrinsics, extrinsics), transforms.json, COLMAP, RealEstate10K",
    )
    parser.add_argument(
        "--camera_distance", type=float, default=1.0, help="length of a named way, in the data's units"
    )
    parser.add_argument("--camera_angle", type=float, help="whole turn of a named way, in degrees; default 30")
    parser.add_argument("--camera_depth", type=float, help="distance of what an orbit goes around; default 2")
    parser.add_argument("--camera_focal", type=float, help=f"focal length of a named way, in widths; default {FOCAL}")
    parser.add_argument(
        "--drop_conditions", nargs="+", choices=("actions", "camera"), help="guide by these, too; needs guidance_scale"
    )


def steering_arguments(args: argparse.Namespace, pipe) -> dict:
    """`actions` and `camera` of a call, as far as they are asked for.

    Raises ValueError or OSError for what cannot be read.
    """
    num_frames = args.num_frames or pipe.call_default("num_frames")
    given = {}
    if args.actions:
        given["actions"] = read_actions(args.actions, num_frames)
    if getattr(args, "camera", None):
        if args.resolution:
            raise ValueError("--camera is of pictures of a size: give --height and --width in place of --resolution")
        size = (args.height or pipe.call_default("height"), args.width or pipe.call_default("width"))
        given["camera"] = _camera(args, num_frames, *size)
    return given


def steering_record(args: argparse.Namespace) -> dict:
    """Checksums of the files that steer, for a video's metadata."""
    record = {}
    if args.adapter:
        record["adapter_checksum"] = [folder_checksum(folder) for folder in args.adapter]
    for name in ("actions", "camera"):
        if (path := getattr(args, name, None)) and Path(path).is_file():
            record[f"{name}_sha256"] = file_checksum(path)
    return record


def _camera(args: argparse.Namespace, num_frames: int, height: int, width: int) -> CameraPath:
    if args.camera in TRAJECTORIES or args.camera in ORBITS:
        focal = (args.camera_focal or FOCAL) * width
        how = {name: getattr(args, f"camera_{name}") for name in ("distance", "angle", "depth")}
        told = {name: value for name, value in how.items() if value is not None}
        extrinsics = named_trajectory(args.camera, num_frames, **told)
        return CameraPath([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], extrinsics, height, width)
    path = Path(args.camera)
    if not path.exists():
        raise ValueError(f"--camera: {path} is no file, and no way; there is {', '.join([*TRAJECTORIES, *ORBITS])}")
    if path.suffix != ".npz":
        return read_cameras(path, height, width)
    with np.load(path) as archive:
        if missing := [name for name in ("intrinsics", "extrinsics") if name not in archive.files]:
            raise ValueError(f"{path} lacks {', '.join(missing)}; there is {', '.join(archive.files)}")
        return CameraPath(archive["intrinsics"], archive["extrinsics"], height, width)


# ---- rollouts as data ----------------------------------------------------------------------------------------------


def open_writer(folder: str, pipe, fps: float | None, has_actions: bool):
    """A `LeRobotWriter` for rollouts of the pipeline. ValueError for a folder in use, and a rate that is no whole number."""
    try:
        from ..data.lerobot_writer import LeRobotWriter
    except ImportError as error:
        raise ValueError(f"--lerobot: {error}") from error
    spec = None
    if has_actions and pipe.action_spec is not None:
        # A data set says what its numbers mean; range and scale are a model's.
        none = dict(offset=(), scale=(), low=(), high=(), accumulated_scale=())
        spec = replace(pipe.action_spec, normalisation="none", **none)
    return LeRobotWriter(folder, fps or pipe.call_default("fps"), spec)


def write_episode(writer, video: str | Path, actions, task: str) -> Path:
    """One rollout as the only episode of a data set; its frames are those of the mp4."""
    writer.add(read_video(video).frames, actions, task=task)
    return writer.close()
