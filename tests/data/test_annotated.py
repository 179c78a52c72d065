"""Bridge-style annotations, and tables beside the videos of a folder."""

import json

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.robot_states import actions_from_states
from cosmos_hf.data.clips import ClipDataset, open_clips
from cosmos_hf.data.video import write_video

STATES = np.random.default_rng(0).normal(0, 0.1, (9, 7)).round(4)


def clip(level=60, frames=9):
    levels = (level + 8 * torch.arange(frames)).to(torch.uint8)
    return levels.view(1, -1, 1, 1).repeat(3, 1, 32, 48)


def write_bridge(root, split="train", count=2, cameras=1, **changes):
    for number in range(count):
        videos = [{"video_path": f"videos/{split}/{number}/rgb{c}.mp4"} for c in range(cameras)]
        label = dict(
            videos=videos,
            state=STATES[:, :6].tolist(),
            continuous_gripper_state=STATES[:, 6].tolist(),
            texts=["put the cube down"],
            episode_id=str(number),
        )
        label = {key: value for key, value in (label | changes).items() if value is not None}
        folder = root / "annotation" / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.json").write_text(json.dumps(label))
        for c, video in enumerate(videos):
            write_video(root / video["video_path"], clip(40 + 50 * c), 5, crf=5)


def test_bridge_style(tmp_path):
    write_bridge(tmp_path)
    for path in (tmp_path, tmp_path / "annotation", tmp_path / "annotation" / "train"):
        sample = ClipDataset(path, random=False)[1]
        assert sample["caption"] == "put the cube down" and sample["record"]["episode_id"] == "1"
        np.testing.assert_allclose(sample["states"], STATES, atol=1e-6)
        np.testing.assert_allclose(sample["actions"], actions_from_states(STATES), atol=1e-5)
        assert sample["video"].shape == (3, 9, 32, 48) and sample["fps"] == 5


def test_bridge_style_of_several_cameras_and_splits(tmp_path):
    write_bridge(tmp_path, cameras=2)
    sample = ClipDataset(tmp_path, views=("view0", "view1"), random=False)[0]
    assert (sample["video"][1].float() - sample["video"][0].float()).mean() == pytest.approx(50, abs=2)
    write_bridge(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=r"several splits; name one: .*annotation/train, .*annotation/val"):
        open_clips(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(videos=[]), "names no 'videos'"),
        (dict(state=STATES[:, :5].tolist()), r"must be \[T, 6\] or \[T, 7\]"),
        (dict(continuous_gripper_state=[0.0]), "must have 9 entries"),
        (dict(state=STATES[:8, :6].tolist(), continuous_gripper_state=[0.0] * 8), "has 8 entries for 9 frames"),
        (dict(videos=[{"video_path": "videos/none.mp4"}]), "no such file"),
    ],
)
def test_what_is_wrong_with_an_annotation(tmp_path, change, message):
    write_bridge(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path)[0]


def write_csv(path, names, table):
    lines = [",".join(names)] + [",".join(str(value) for value in row) for row in table]
    path.write_text("\n".join(lines) + "\n")


def test_a_table_beside_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", clip(), 5)
    (tmp_path / "a.txt").write_text("a table")
    steps = np.arange(9.0)
    names = ["time", "action_x", "state_x", "action_y", "state_y"]
    write_csv(tmp_path / "a.csv", names, np.c_[steps / 5, steps, -steps, 2 * steps, 0 * steps])
    sample = ClipDataset(tmp_path, random=False)[0]
    np.testing.assert_array_equal(sample["actions"], np.c_[steps, 2 * steps][:-1])
    np.testing.assert_array_equal(sample["states"], np.c_[-steps, 0 * steps])
    for rows in (9, 8):  # actions alone: one for every frame, or for every step
        write_csv(tmp_path / "a.csv", ["action.0"], steps[:rows, None])
        assert ClipDataset(tmp_path)[0]["actions"].shape == (8, 1)
    write_csv(tmp_path / "a.csv", ["action.0"], steps[:5, None])
    with pytest.raises(ValueError, match="actions has 5 entries for 9 frames, 8 are needed"):
        ClipDataset(tmp_path)[0]


def test_lists_in_the_json_of_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", clip(), 5)
    record = dict(caption="lists", actions=[[1, 2]] * 8, intrinsics=[[50, 0, 24], [0, 50, 16], [0, 0, 1]])
    record["extrinsics"] = np.tile(np.eye(4), (9, 1, 1)).tolist()
    (tmp_path / "a.json").write_text(json.dumps(record))
    sample = ClipDataset(tmp_path, random=False, size=(64, 96))[0]
    assert sample["actions"].tolist() == [[1, 2]] * 8 and sample["camera"]["intrinsics"][0, 0] == 100


def test_a_byte_order_mark_hides_nothing(tmp_path):
    """Excel and some editors begin a file with one."""
    write_video(tmp_path / "a.mp4", clip(), 5)
    write_csv(tmp_path / "a.csv", ["action_x", "action_y"], [[1, 2]] * 8)
    (tmp_path / "a.txt").write_text("a table")
    for name in ("a.csv", "a.txt"):
        (tmp_path / name).write_text((tmp_path / name).read_text(), encoding="utf-8-sig")
    sample = ClipDataset(tmp_path, random=False)[0]
    assert sample["actions"].shape == (8, 2) and sample["caption"] == "a table"
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.json").write_text(json.dumps({"actions": [[1, 2]] * 8}), encoding="utf-8-sig")
    assert ClipDataset(tmp_path, random=False)[0]["actions"].shape == (8, 2)


def test_what_is_wrong_with_a_table(tmp_path):
    write_video(tmp_path / "a.mp4", clip(), 5)
    for names, table, message in (
        (["speed"], [[1]], "no column that begins with 'action' or 'state': speed"),
        (["action"], [["fast"]], "a row holds no number"),
        (["action"], [], "at least one row"),
    ):
        write_csv(tmp_path / "a.csv", names, table)
        with pytest.raises(ValueError, match=message):
            ClipDataset(tmp_path)[0]
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.json").write_text(json.dumps({"actions": [[1], [2, 3]]}))
    with pytest.raises(ValueError, match="'actions' in .* is no table of numbers"):
        ClipDataset(tmp_path)[0]
    write_csv(tmp_path / "a.csv", ["action"], [[1]] * 8)
    (tmp_path / "a.json").unlink()
    np.savez(tmp_path / "a.npz", actions=np.zeros((8, 1)))
    with pytest.raises(ValueError, match="keep one"):
        ClipDataset(tmp_path)[0]
