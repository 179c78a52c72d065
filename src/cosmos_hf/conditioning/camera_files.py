"""Cameras from files: COLMAP and GLOMAP models, RealEstate10K texts, nerfstudio's `transforms.json`.

What each format means, and what is done to reach the convention of `camera.py`:
    COLMAP, GLOMAP    world to camera, OpenCV axes, pixels from the edge: nothing.
    RealEstate10K     world to camera, OpenCV axes; intrinsics are shares of width and height: multiplied.
    nerfstudio        camera to world, OpenGL axes (x right, y up, z back): inverted, y and z turned round.

Only pinhole cameras can be rays of straight lines: a lens distortion is refused, unless `ignore_distortion` says that the
pictures were undistorted or that the error is accepted.
"""

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import torch

from .camera import CameraPath, invert_pose

# COLMAP's camera models: id -> (name, how many parameters). The first are f or fx, fy, then cx, cy, then the distortion.
COLMAP_MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    6: ("FULL_OPENCV", 12),
    7: ("FOV", 5),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
    10: ("THIN_PRISM_FISHEYE", 12),
}
_ONE_FOCAL = {"SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE"}
_NOT_PINHOLE = {"FOV", "OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE"}
_DISTORTIONS = ("k1", "k2", "k3", "k4", "p1", "p2")


def read_cameras(
    path: str | Path, height: int | None = None, width: int | None = None, ignore_distortion: bool = False
) -> CameraPath:
    """The cameras of a folder or file, by what lies there; frames in the order of their names (2 before 10) or times.

    path: a COLMAP or GLOMAP folder (also one that holds it under `sparse/0`), a `transforms.json` or its folder, or a
        RealEstate10K `.txt`, which needs the pictures' `height` and `width`.

    Raises FileNotFoundError naming what was looked for, ValueError for what the files say wrong.
    """
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        return read_nerfstudio(path, ignore_distortion)
    if path.suffix == ".txt" and path.is_file():
        if height is None or width is None:
            raise ValueError(f"{path} holds intrinsics as shares of the picture: give its height and width")
        return read_realestate10k(path, height, width)
    for folder in (path, path / "sparse" / "0", path / "sparse", path / "0"):
        if any((folder / f"images.{kind}").exists() for kind in ("bin", "txt")):
            return read_colmap(folder, ignore_distortion)
    if (path / "transforms.json").exists():
        return read_nerfstudio(path / "transforms.json", ignore_distortion)
    raise FileNotFoundError(
        f"no cameras in {path}: looked for images.bin or images.txt (COLMAP, GLOMAP; also in sparse/0), transforms.json "
        "(nerfstudio) and a .txt file (RealEstate10K)"
    )


def read_realestate10k(path: str | Path, height: int, width: int) -> CameraPath:
    """A RealEstate10K file: a line with the address, then per frame its time, fx fy cx cy, two zeros, and 3 x 4 numbers."""
    rows, times = [], []
    for number, line in enumerate(Path(path).read_text().splitlines()[1:], 2):
        words = line.split()
        if not words:
            continue
        if len(words) != 19:
            raise ValueError(f"{path}, line {number}: 19 numbers are expected, there are {len(words)}")
        times.append(words[0])
        rows.append(_numbers(words[1:], f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"{path} holds no frame")
    table = np.array(rows)
    distorted = np.abs(table[:, 4:6]).max()
    if distorted > 0:
        raise ValueError(f"{path}: columns 6 and 7 are a distortion of {distorted:g}; undistort the pictures first")
    order = np.argsort([int(time) for time in times], kind="stable")
    table = table[order]
    intrinsics = np.zeros((len(table), 3, 3))
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = table[:, 0] * width, table[:, 1] * height
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = table[:, 2] * width, table[:, 3] * height, 1
    extrinsics = table[:, 6:].reshape(-1, 3, 4)
    return _checked(path, intrinsics, extrinsics, height, width, tuple(times[i] for i in order))


def read_nerfstudio(path: str | Path, ignore_distortion: bool = False) -> CameraPath:
    """nerfstudio's `transforms.json`; intrinsics for all frames or for each, frames in the order of `file_path`."""
    record = json.loads(Path(path).read_text())
    frames = sorted(record.get("frames", []), key=lambda frame: _natural(frame.get("file_path", "")))
    if not frames:
        raise ValueError(f"{path} holds no 'frames'")
    intrinsics, extrinsics, sizes = [], [], set()
    for frame in frames:
        values = {**record, **frame}
        model = values.get("camera_model", "OPENCV")
        if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
            raise ValueError(f"{path}: camera_model {model!r} is no pinhole camera; undistort the pictures first")
        bent = {name: values[name] for name in _DISTORTIONS if values.get(name)}
        if bent and not ignore_distortion:
            raise ValueError(f"{path} has a lens distortion {bent}: undistort the pictures, or pass ignore_distortion")
        size = values.get("h"), values.get("w")
        if None in size:
            raise ValueError(f"{path} does not say the pictures' size: 'h' and 'w' are missing")
        sizes.add((int(size[0]), int(size[1])))
        intrinsics.append(_nerfstudio_intrinsics(values, *size, path))
        pose = np.array(frame.get("transform_matrix", []), dtype=float)
        if pose.shape != (4, 4):
            raise ValueError(f"{path}: transform_matrix of {frame.get('file_path')} must be 4 x 4, got {pose.shape}")
        pose[:3, 1:3] *= -1  # OpenGL's axes y up, z back
        extrinsics.append(pose)
    if len(sizes) > 1:
        raise ValueError(f"{path}: pictures differ in size: {sorted(sizes)}")
    names = tuple(str(frame.get("file_path", i)) for i, frame in enumerate(frames))
    to_camera = invert_pose(torch.from_numpy(np.stack(extrinsics)))
    return _checked(path, np.stack(intrinsics), to_camera, *sizes.pop(), names)


def _nerfstudio_intrinsics(values: dict, height: float, width: float, path) -> np.ndarray:
    focal_x = values.get("fl_x")
    if focal_x is None and "camera_angle_x" in values:
        focal_x = width / 2 / math.tan(values["camera_angle_x"] / 2)
    if focal_x is None:
        raise ValueError(f"{path} gives no focal length: 'fl_x' or 'camera_angle_x' is missing")
    focal_y = values.get("fl_y", focal_x)
    return np.array([[focal_x, 0, values.get("cx", width / 2)], [0, focal_y, values.get("cy", height / 2)], [0, 0, 1]])


def read_colmap(folder: str | Path, ignore_distortion: bool = False) -> CameraPath:
    """A COLMAP or GLOMAP model, binary or text.

    Frames are in the order of the pictures' names, or of their ids where the names have no numbers. Those that the
    reconstruction has not registered are not there: compare `names` with the video.
    """
    folder = Path(folder)
    kind = "bin" if (folder / "images.bin").exists() else "txt"
    files = [folder / f"{name}.{kind}" for name in ("cameras", "images")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"no such file: {file}")
    try:
        read_camera_file, read_image_file = (
            (_cameras_bin, _images_bin) if kind == "bin" else (_cameras_txt, _images_txt)
        )
        cameras, images = read_camera_file(files[0]), read_image_file(files[1])
    except (struct.error, IndexError) as error:
        raise ValueError(f"{folder} holds a COLMAP model that ends early or is damaged: {error}") from error
    if not images:
        raise ValueError(f"{folder} holds no registered picture")
    counted = all(re.search(r"\d", name) for name, *_ in images)
    images = [image[:3] for image in sorted(images, key=lambda im: (_natural(im[0]) if counted else [], im[3]))]
    sizes = {cameras[camera][1:3] for _, camera, _ in images if camera in cameras}
    missing = {camera for _, camera, _ in images} - set(cameras)
    if missing:
        raise ValueError(f"{folder}: pictures name cameras that are not there: {sorted(missing)}")
    if len(sizes) > 1:
        raise ValueError(f"{folder}: pictures differ in size (height, width): {sorted(sizes)}")
    intrinsics = [_colmap_intrinsics(*cameras[camera], ignore_distortion, folder) for _, camera, _ in images]
    extrinsics = np.stack([pose for _, _, pose in images])
    return _checked(folder, np.stack(intrinsics), extrinsics, *sizes.pop(), tuple(name for name, _, _ in images))


def _colmap_intrinsics(model: str, height: int, width: int, values, ignore_distortion: bool, folder) -> np.ndarray:
    one = model in _ONE_FOCAL
    focal_x, focal_y = (values[0], values[0]) if one else values[:2]
    centre, distortion = (values[1:3], values[3:]) if one else (values[2:4], values[4:])
    if model in _NOT_PINHOLE or (np.any(np.array(distortion)) and not ignore_distortion):
        way = "" if model in _NOT_PINHOLE else ", or pass ignore_distortion"
        raise ValueError(
            f"{folder}: camera model {model} with distortion {list(distortion)}: undistort the pictures "
            f"(colmap image_undistorter){way}"
        )
    return np.array([[focal_x, 0, centre[0]], [0, focal_y, centre[1]], [0, 0, 1]])


def _cameras_txt(path: Path) -> dict[int, tuple]:
    """Camera id -> (model, height, width, parameters)."""
    counts = dict(COLMAP_MODELS.values())
    cameras = {}
    for words in _lines(path):
        model, numbers = words[1], _numbers(words[2:], str(path))
        if counts.get(model) != len(numbers) - 2:
            raise ValueError(f"{path}: camera model {model!r} with {len(numbers) - 2} parameters is not known")
        cameras[int(words[0])] = (model, int(numbers[1]), int(numbers[0]), numbers[2:])
    return cameras


def _images_txt(path: Path) -> list[tuple]:
    """(name, camera id, pose [3, 4], image id) of each picture; every second line lists its points and may be empty."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    images = []
    for line in lines[::2]:
        words = line.split(maxsplit=9)
        if words:
            images.append((words[9], int(words[8]), _pose(_numbers(words[1:8], str(path))), int(words[0])))
    return images


def _cameras_bin(path: Path) -> dict[int, tuple]:
    data, cameras = path.read_bytes(), {}
    (count,), place = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        key, model, width, height = struct.unpack_from("<iiQQ", data, place)
        if model not in COLMAP_MODELS:
            raise ValueError(f"{path}: camera model {model} is not known")
        name, number = COLMAP_MODELS[model]
        cameras[key] = (name, height, width, struct.unpack_from(f"<{number}d", data, place + 24))
        place += 24 + 8 * number
    return cameras


def _images_bin(path: Path) -> list[tuple]:
    data, images = path.read_bytes(), []
    (count,), place = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        values = struct.unpack_from("<i7di", data, place)
        place += struct.calcsize("<i7di")
        end = data.find(b"\0", place)
        if end < 0:
            raise ValueError(f"{path} ends early: it was cut")
        name = data[place:end].decode()
        (points,) = struct.unpack_from("<Q", data, end + 1)
        place = end + 9 + 24 * points
        if place > len(data):
            raise ValueError(f"{path} ends early: it was cut")
        images.append((name, values[8], _pose(values[1:8]), values[0]))
    return images


def _pose(values) -> np.ndarray:
    """COLMAP's qw qx qy qz tx ty tz -> world to camera [3, 4]."""
    w, x, y, z = np.array(values[:4]) / np.linalg.norm(values[:4])
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    return np.concatenate([rotation, np.array(values[4:7])[:, None]], axis=1)


def _natural(name) -> list:
    """A key that sorts names as people number them: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(name))]


def _lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def _numbers(words: list[str], where: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _checked(path, intrinsics, extrinsics, height: int, width: int, names) -> CameraPath:
    """A `CameraPath` whose errors name the file."""
    try:
        return CameraPath(intrinsics, extrinsics, height, width, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
