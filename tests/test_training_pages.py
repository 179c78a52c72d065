"""The pages on training: every block of them, python and bash, as a reader would run them one after the other."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_hf.data.video import write_video
from cosmos_hf.training.config import read_yaml
from cosmos_hf.training.diffusion import DiffusionConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "training.md", ROOT / "docs" / "posttraining.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_in_order(page, tmp_path, monkeypatch):
    """As a reader would run them one after the other, on a few tiny clips and with few steps."""
    for name in ("training", "pipelines", "setup.cfg"):
        (tmp_path / name).symlink_to(ROOT / name)
    for split in ("train", "val_iid"):
        write_clips(tmp_path / "datasets" / "tabletop" / split)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page.read_text(), flags=re.S)
    assert blocks
    for language, code in blocks:
        if language == "python":
            exec(compile(code, page.name, "exec"), {})
        else:
            for line in code.strip().splitlines():
                run_command(shlex.split(line))


def write_clips(folder):
    for i in range(3):
        frames = torch.full((3, 13, 48, 64), 60 + 40 * i, dtype=torch.uint8)
        for t in range(13):
            frames[0, t, 10:30, 2 * t : 2 * t + 20] = 200
        write_video(folder / f"{i}.mp4", frames, 5, crf=12)
        (folder / f"{i}.txt").write_text(f"A red square moves over grey {i}.")
        actions = np.full((12, 7), 0.1 * i)
        actions[:, 6] = np.arange(12) % 2
        camera = dict(intrinsics=[[50, 0, 32], [0, 50, 24], [0, 0, 1.0]], extrinsics=np.tile(np.eye(4), (13, 1, 1)))
        np.savez(folder / f"{i}.npz", actions=actions, **camera)


def run_command(words):
    """A line of a bash block, in this process: training for two steps; what needs several GPUs is only read."""
    if words[:2] == ["pip", "install"]:
        setup = Path("setup.cfg").read_text()
        assert all(extra in setup for extra in re.findall(r"\w+", " ".join(re.findall(r"\[(.*?)\]", words[-1]))))
        return
    several = "--config_file" in words
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert not several or Path(words[words.index("--config_file") + 1]).exists()
    arguments = words[script + 1 :]
    if several:
        read_yaml(DiffusionConfig, arguments[arguments.index("--config") + 1])
        return
    if words[script].startswith(("training/train", "training/pretrain", "training/posttrain")):
        arguments += ["--max_steps", "2", "--log_every", "1", "--progress", "false"]
    runpy.run_path(words[script])["main"](arguments)
