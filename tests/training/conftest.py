"""A few tiny clips with captions, also such of several cameras."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.camera_paths import joystick_path
from cosmos_hf.data.video import write_video

CAMERAS = ["front", "left", "right"]
COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Six clips of 13 frames of 32x32 at 5 Hz: a square that moves, with its caption beside it."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        name, color = list(COLORS.items())[i % 3]
        frames = torch.full((3, 13, 32, 32), 90, dtype=torch.uint8)
        for t in range(13):
            x = t if i < 3 else 12 - t
            frames[:, t, 8 + i : 20 + i, 4 + x : 16 + x] = torch.tensor(color, dtype=torch.uint8)[:, None, None]
        write_video(folder / f"clip{i}.mp4", frames, 5, crf=10)
        (folder / f"clip{i}.txt").write_text(f"A {name} square moves to the {'right' if i < 3 else 'left'}.")
    return folder


@pytest.fixture(scope="session")
def clips_of_three_cameras(tmp_path_factory):
    """A shard of four clips of three cameras, 13 frames of 32x48: a bar at a height of its own in each clip, seen in all views."""
    folder = tmp_path_factory.mktemp("driving")
    with tarfile.open(folder / "train-00000.tar", "w") as archive:

        def add(name, content):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

        for i in range(4):
            for v, view in enumerate(CAMERAS):
                frames = torch.full((3, 13, 32, 48), 60 + 20 * v, dtype=torch.uint8)
                frames[0, :, 6 * i : 6 * i + 8, 8:40] = 220
                write_video(folder / "view.mp4", frames, 5, crf=10)
                add(f"clip-{i}.{view}.mp4", (folder / "view.mp4").read_bytes())
            way = joystick_path(np.tile([0.0, 0.0, 0.1 * (i + 1), 0, 0, 0], (12, 1))).numpy()
            packed = io.BytesIO()
            intrinsics = np.repeat([[[40.0, 0, 24], [0, 40, 16], [0, 0, 1]]], 3, axis=0)
            np.savez(
                packed, intrinsics=intrinsics, extrinsics=np.repeat(way[None], 3, axis=0), actions=np.ones((12, 2))
            )
            add(f"clip-{i}.npz", packed.getvalue())
            told = dict(caption="a robot arm", views=CAMERAS, view_captions={"front": "the red cube"}, fps=5)
            add(f"clip-{i}.json", json.dumps(told).encode())
        (folder / "view.mp4").unlink()
    return folder
