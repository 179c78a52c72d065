"""A few tiny clips with captions, and the loop's tiny problem."""

import pytest
import torch

from cosmos_hf.data.video import write_video

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
