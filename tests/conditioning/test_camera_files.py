"""Camera files of every format, written here from one known path, read back into the one convention."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.camera import CameraPath, invert_pose
from cosmos_hf.conditioning.camera_files import read_cameras
from cosmos_hf.conditioning.camera_paths import joystick_path

K = np.array([[100.0, 0, 60], [0, 110, 50], [0, 0, 1]])
NAMES = tuple(f"{i:03d}.png" for i in range(5))


@pytest.fixture
def path():
    """Five cameras that turn, tilt and move, seen from a world that is not the first camera's."""
    extrinsics = joystick_path(np.random.default_rng(0).normal(0, [0.3, 0.2, 0.3, 20, 10, 10], (5, 6)))[1:]
    return CameraPath(K, extrinsics, 96, 128, NAMES)


def quaternion(rotation):
    """[w, x, y, z] of a rotation with a trace above -1."""
    w = np.sqrt(1 + np.trace(rotation)) / 2
    off = [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    return np.array([w, *(np.array(off) / (4 * w))])


def colmap_rows(path):
    for i in (3, 0, 4, 1, 2):  # a model lists pictures in any order
        pose = path.extrinsics[i].numpy()
        yield i + 1, [*quaternion(pose[:3, :3]), *pose[:3, 3]], path.names[i]


def write_colmap_text(folder, path, camera="1 PINHOLE 128 96 100 110 60 50"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(f"# cameras\n{camera}\n")
    lines = ["# images"]
    for key, pose, name in colmap_rows(path):
        lines += [" ".join(str(value) for value in (key, *pose, 1, name)), "" if key == 2 else "1.5 2.5 -1 3 4 7"]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")


def write_colmap_binary(folder, path):
    folder.mkdir(parents=True)
    (folder / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 1, 1, 128, 96, 100, 110, 60, 50))
    data = struct.pack("<Q", 5)
    for key, pose, name in colmap_rows(path):
        data += struct.pack("<i7di", key, *pose, 1) + name.encode() + b"\0"
        data += struct.pack("<Q", 2) + struct.pack("<ddqddq", 1.5, 2.5, -1, 3, 4, 7)
    (folder / "images.bin").write_bytes(data)


def write_nerfstudio(folder, path, **changes):
    frames = []
    for pose, name in zip(invert_pose(path.extrinsics).numpy(), path.names, strict=True):
        frames.append({"file_path": name, "transform_matrix": (pose @ np.diag([1, -1, -1, 1])).tolist()})
    record = dict(w=128, h=96, fl_x=100, fl_y=110, cx=60, cy=50, camera_model="OPENCV", frames=frames[::-1]) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transforms.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


def write_realestate(file, path, tail=""):
    lines = ["https://example.org/video"]
    for i, pose in enumerate(path.extrinsics[:, :3].numpy()):
        numbers = [100 / 128, 110 / 96, 60 / 128, 50 / 96, 0, 0, *pose.flatten()]
        lines.append(" ".join(str(value) for value in (33000 * i, *numbers)))
    file.write_text("\n".join(lines) + tail + "\n")


@pytest.mark.parametrize("where", ["", "sparse/0"])
@pytest.mark.parametrize("write", [write_colmap_text, write_colmap_binary])
def test_colmap(path, tmp_path, write, where):
    write(tmp_path / "scene" / where, path)
    assert_same(read_cameras(tmp_path / "scene"), path)


def test_nerfstudio(path, tmp_path):
    write_nerfstudio(tmp_path, path)
    assert_same(read_cameras(tmp_path), path)
    assert_same(read_cameras(tmp_path / "transforms.json"), path)
    write_nerfstudio(tmp_path, path, fl_x=None, fl_y=None, camera_angle_x=2 * np.arctan(64 / 100))
    assert read_cameras(tmp_path).intrinsics[0, :2, :2].diag().tolist() == pytest.approx([100, 100])


def test_realestate10k(path, tmp_path):
    write_realestate(tmp_path / "clip.txt", path)
    cameras = read_cameras(tmp_path / "clip.txt", height=96, width=128)
    assert cameras.names == tuple(str(33000 * i) for i in range(5))
    assert_same(cameras, path, names=False)
    larger = read_cameras(tmp_path / "clip.txt", height=192, width=256)
    torch.testing.assert_close(larger.fit(96, 128).intrinsics, path.intrinsics)
    with pytest.raises(ValueError, match="give its height and width"):
        read_cameras(tmp_path / "clip.txt")


@pytest.mark.parametrize("write", ["nerfstudio", "text", "binary"])
def test_frames_are_in_the_order_of_their_numbers(path, tmp_path, write):
    """2 before 10, whether zeros are written in front or not."""
    path = replace(path, names=tuple(f"images/frame_{i}.png" for i in (0, 1, 2, 10, 11)))
    writers = dict(nerfstudio=write_nerfstudio, text=write_colmap_text, binary=write_colmap_binary)
    writers[write](tmp_path / "scene", path)
    assert_same(read_cameras(tmp_path / "scene"), path)


@pytest.mark.parametrize("write", [write_colmap_text, write_colmap_binary])
def test_pictures_without_numbers_are_in_the_order_of_their_ids(path, tmp_path, write):
    path = replace(path, names=("left.png", "ahead.png", "right.png", "back.png", "above.png"))
    write(tmp_path / "scene", path)
    assert_same(read_cameras(tmp_path / "scene"), path)


def assert_same(cameras, path, names=True):
    assert (len(cameras), cameras.height, cameras.width) == (5, 96, 128)
    assert not names or cameras.names == path.names
    torch.testing.assert_close(cameras.intrinsics, path.intrinsics)
    torch.testing.assert_close(cameras.extrinsics, path.extrinsics)


def test_models_that_colmap_itself_writes(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="needs the extra cosmos-hf[geometry]")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_frames_per_rig, options.num_points3D = 1, 4, 10
    options.camera_model_id, options.camera_params = pycolmap.CameraModelId.PINHOLE, [1280.0, 1290, 512, 384]
    model = pycolmap.synthesize_dataset(options)
    (tmp_path / "text").mkdir()
    model.write_binary(str(tmp_path))
    model.write_text(str(tmp_path / "text"))
    images = sorted(model.images.values(), key=lambda image: image.name)
    for folder in (tmp_path, tmp_path / "text"):
        cameras = read_cameras(folder)
        assert cameras.names == tuple(image.name for image in images)
        for image, camera in zip(images, cameras.extrinsics, strict=True):
            np.testing.assert_allclose(camera[:3], image.cam_from_world().matrix(), atol=1e-9)
        assert cameras.intrinsics[0, 1, 1] == 1290
    image = images[0]  # our pixels are COLMAP's pixels
    observed = next(point for point in image.points2D if point.has_point3D())
    seen = cameras.project(model.points3D[observed.point3D_id].xyz[None])[0][0, 0]
    np.testing.assert_allclose(seen, observed.xy, atol=1e-6)


def test_distortion_is_refused_or_ignored_by_word(path, tmp_path):
    write_colmap_text(tmp_path / "colmap", path, "1 OPENCV 128 96 100 110 60 50 0.1 0 0 0")
    write_nerfstudio(tmp_path / "nerf", path, k1=0.1)
    for name in ("colmap", "nerf"):
        with pytest.raises(ValueError, match="undistort the pictures.*ignore_distortion"):
            read_cameras(tmp_path / name)
        assert_same(read_cameras(tmp_path / name, ignore_distortion=True), path)
    write_colmap_text(tmp_path / "fisheye", path, "1 OPENCV_FISHEYE 128 96 100 110 60 50 0 0 0 0")
    with pytest.raises(ValueError, match="camera model OPENCV_FISHEYE"):
        read_cameras(tmp_path / "fisheye", ignore_distortion=True)


def test_what_is_wrong_is_said(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for images.bin or images.txt .*transforms.json"):
        read_cameras(tmp_path)
    write_colmap_binary(tmp_path / "cut", path)
    images = tmp_path / "cut" / "images.bin"
    whole = images.read_bytes()
    for length in (len(whole) - 30, len(whole) - 60, 40, 3):
        images.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="ends early"):
            read_cameras(tmp_path / "cut")
    (tmp_path / "cut" / "cameras.bin").unlink()
    with pytest.raises(FileNotFoundError, match="cameras.bin"):
        read_cameras(tmp_path / "cut")
    write_colmap_text(tmp_path / "odd", path, "1 PINHOLE 128 96 100 110 60")
    with pytest.raises(ValueError, match="'PINHOLE' with 3 parameters"):
        read_cameras(tmp_path / "odd")
    write_colmap_text(tmp_path / "odd", path, "2 PINHOLE 128 96 100 110 60 50")
    with pytest.raises(ValueError, match=r"cameras that are not there: \[1\]"):
        read_cameras(tmp_path / "odd")
    write_realestate(tmp_path / "clip.txt", path, tail="\n165000 1 2 3")
    with pytest.raises(ValueError, match="line 7: 19 numbers are expected, there are 4"):
        read_cameras(tmp_path / "clip.txt", 96, 128)
    for changes, message in (
        (dict(fl_x=None), "no focal length"),
        (dict(w=None), "'h' and 'w' are missing"),
        (dict(camera_model="EQUIRECTANGULAR"), "'EQUIRECTANGULAR' is no pinhole camera"),
        (dict(frames=[]), "holds no 'frames'"),
    ):
        write_nerfstudio(tmp_path / "nerf", path, **changes)
        with pytest.raises(ValueError, match=message):
            read_cameras(tmp_path / "nerf")
