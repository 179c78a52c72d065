"""LeRobot data sets of both layouts, written here as LeRobot writes them, and what the writer makes of rollouts."""

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from cosmos_hf.conditioning.action import ActionSpec, Gripper
from cosmos_hf.data.clips import ClipDataset, open_clips
from cosmos_hf.data.lerobot import LeRobotClips
from cosmos_hf.data.lerobot_writer import LeRobotWriter
from cosmos_hf.data.samples import content_hash
from cosmos_hf.data.video import write_video

LENGTHS = (9, 6, 40)
TASKS = ("pick the cube", "push the ball", "pick the cube")
NAMES = ["shoulder", "elbow", "gripper"]


def pictures(episode, length, camera):
    """Grey pictures that tell episode, camera and frame."""
    levels = 40 + 60 * camera + 20 * episode + torch.arange(length) % 10
    return levels.to(torch.uint8).view(1, -1, 1, 1).repeat(3, 1, 32, 48)


def numbers(episode, length):
    steps = np.arange(length, dtype=np.float32)[:, None]
    return {"action": steps + [0, 0.25, 100 * episode], "observation.state": steps * [1, -1] + episode}


def info(version, cameras):
    features = {
        "action": {"dtype": "float32", "shape": [3], "names": {"motors": NAMES}},
        "observation.state": {"dtype": "float32", "shape": [2], "names": None},
        **{f"observation.images.{name}": {"dtype": "video", "shape": [32, 48, 3], "names": None} for name in cameras},
    }
    chunk = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    paths = {
        "v3.0": (f"data/{chunk}.parquet", "videos/{video_key}/" + f"{chunk}.mp4"),
        "v2.1": (
            "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        ),
    }[version]
    return dict(
        codebase_version=version, robot_type="so100", fps=5, chunks_size=1000, total_episodes=3,
        data_path=paths[0], video_path=paths[1], features=features,
    )  # fmt: skip


def rows(episode, length):
    found = numbers(episode, length)
    columns = {name: pyarrow.array(list(values.astype(np.float32))) for name, values in found.items()}
    return columns | {"episode_index": pyarrow.array([episode] * length), "frame_index": pyarrow.array(range(length))}


def statistics(values):
    found = dict(min=values.min(0), max=values.max(0), mean=values.mean(0), std=values.std(0))
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def write_v21(root, cameras):
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info("v2.1", cameras)))
    (root / "data/chunk-000").mkdir(parents=True)
    lines, stats = [], []
    for episode, length in enumerate(LENGTHS):
        parquet.write_table(
            pyarrow.table(rows(episode, length)), root / f"data/chunk-000/episode_{episode:06d}.parquet"
        )
        for c, name in enumerate(cameras):
            path = root / f"videos/chunk-000/observation.images.{name}/episode_{episode:06d}.mp4"
            write_video(path, pictures(episode, length, c), 5, crf=5)
        lines.append(json.dumps(dict(episode_index=episode, tasks=[TASKS[episode]], length=length)))
        parts = {name: statistics(values) for name, values in numbers(episode, length).items()}
        stats.append(json.dumps(dict(episode_index=episode, stats=parts)))
    (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    (root / "meta/episodes_stats.jsonl").write_text("\n".join(stats) + "\n")


def write_v30(root, cameras):
    """Episodes 0 and 1 share a table and a video; episode 2 has its own."""
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info("v3.0", cameras)))
    (root / "data/chunk-000").mkdir(parents=True)
    table = pyarrow.concat_tables([pyarrow.table(rows(e, LENGTHS[e])) for e in (0, 1)])
    parquet.write_table(table, root / "data/chunk-000/file-000.parquet")
    parquet.write_table(pyarrow.table(rows(2, LENGTHS[2])), root / "data/chunk-000/file-001.parquet")
    episodes = []
    for episode, length in enumerate(LENGTHS):
        start = LENGTHS[0] / 5 if episode == 1 else 0.0
        row = {"episode_index": episode, "tasks": [TASKS[episode]], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": episode // 2, "stats/action/mean": [0.0, 0, 0]}
        for name in cameras:
            key = f"videos/observation.images.{name}"
            row |= {f"{key}/chunk_index": 0, f"{key}/file_index": episode // 2}
            row |= {f"{key}/from_timestamp": start, f"{key}/to_timestamp": start + length / 5}
        episodes.append(row)
    parquet.write_table(pyarrow.Table.from_pylist(episodes[::-1]), root / "meta/episodes/chunk-000/file-000.parquet")
    for c, name in enumerate(cameras):
        folder = root / f"videos/observation.images.{name}/chunk-000"
        both = torch.cat([pictures(e, LENGTHS[e], c) for e in (0, 1)], dim=1)
        write_video(folder / "file-000.mp4", both, 5, crf=5)
        write_video(folder / "file-001.mp4", pictures(2, LENGTHS[2], c), 5, crf=5)
    everything = {k: np.concatenate([numbers(e, n)[k] for e, n in enumerate(LENGTHS)]) for k in numbers(0, 1)}
    (root / "meta/stats.json").write_text(json.dumps({k: statistics(v) for k, v in everything.items()}))


@pytest.fixture(params=[write_v21, write_v30], ids=["v2.1", "v3.0"])
def dataset(request, tmp_path):
    request.param(tmp_path / "set", ("top", "wrist"))
    return tmp_path / "set"


def assert_is(sample, episode, start, length, cameras=(0, 1)):
    expected = np.stack([pictures(episode, LENGTHS[episode], c)[0, start : start + length, 0, 0] for c in cameras])
    np.testing.assert_allclose(sample["video"].float().mean((-2, -1))[:, 0], expected, atol=2.5)
    found = numbers(episode, LENGTHS[episode])
    np.testing.assert_allclose(sample["states"], found["observation.state"][start : start + length])
    np.testing.assert_allclose(sample["actions"], found["action"][start : start + length - 1])


def test_episodes_of_several_cameras(dataset):
    clips = ClipDataset(dataset, views=("top", "wrist"), random=False)
    assert [clips.key(i) for i in range(len(clips))] == [f"episode_00000{i}" for i in range(3)]
    for episode, length in enumerate(LENGTHS):
        sample = clips[episode]
        assert sample["caption"] == TASKS[episode] and sample["fps"] == 5
        assert_is(sample, episode, 0, length)
    assert sample["record"]["action_names"] == NAMES and sample["record"]["state_names"] == ["0", "1"]


def test_windows_stay_within_their_episode(dataset):
    clips = ClipDataset(dataset, views=("top", "wrist"), num_frames=5)
    starts = set()
    for draw in range(12):
        sample = clips[(1, draw)]
        assert_is(sample, 1, sample["start"], 5)
        starts.add(sample["start"])
    assert starts == {0, 1}
    late = ClipDataset(dataset, views=("top", "wrist"), num_frames=9)[(2, 3)]  # beyond the first seconds of a file
    assert late["start"] > 0
    assert_is(late, 2, late["start"], 9)
    with pytest.raises(ValueError, match="the clip has 6 frames, 7 are needed"):
        ClipDataset(dataset, views="top", num_frames=7)[1]


@pytest.mark.parametrize("off", [-1e-2, -9e-5, 9e-5, 1e-2])
@pytest.mark.parametrize("first", [9, 40])  # the second episode begins early in its file, or behind what is searched
def test_a_rounded_start_is_the_nearest_frame(tmp_path, off, first):
    """LeRobot rounds the times at which episodes begin, and its files' time stamps drift from them."""
    root, lengths = tmp_path / "set", (first, 6)

    def steps(episode, length):
        levels = 40 + 10 * episode + 20 * (torch.arange(length) % 7)
        return levels.to(torch.uint8).view(1, -1, 1, 1).repeat(3, 1, 32, 48)

    with LeRobotWriter(root, 5, SPEC) as writer:
        for episode, length in enumerate(lengths):
            writer.add({"top": steps(episode, length)}, numbers(episode, length)["action"][:-1])
    both = torch.cat([steps(episode, length) for episode, length in enumerate(lengths)], dim=1)
    (path,) = (root / "meta/episodes").rglob("*.parquet")
    rows, key = parquet.read_table(path).to_pylist(), "videos/observation.images.top"
    write_video(root / "videos/observation.images.top/chunk-000/file-000.mp4", both, 5, crf=5)
    rows[1] |= {f"{key}/file_index": 0, f"{key}/from_timestamp": first / 5 + off}
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for reading, start in ((dict(), 0), (dict(num_frames=5), 1)):
        clips = ClipDataset(root, **reading)
        sample = next(sample for draw in range(20) if (sample := clips[1, draw])["start"] == start)
        levels = sample["video"].float().mean((0, 2, 3))
        np.testing.assert_allclose(levels, steps(1, 6)[0, start:, 0, 0][: len(levels)], atol=4)


def test_resampling_counts_an_episode_not_its_file(dataset):
    reader = ClipDataset(dataset, views="top", fps=10, random=False).reader
    files = {k: v for k, v in open_clips(dataset).read("episode_000000").items() if k.endswith("mp4")}
    assert reader.length(files) == (17, 10)
    assert reader.read_whole(files, "k")["video"].shape[1] == 17


def test_segments_of_one_file_are_told_apart(dataset):
    source = open_clips(dataset)
    hashes = {
        content_hash(source.read(key)[view]).hexdigest() for key in source.keys for view in ("top.mp4", "wrist.mp4")
    }
    assert len(hashes) == 6


def test_statistics_and_what_the_actions_mean(dataset):
    source = LeRobotClips(dataset)
    everything = np.concatenate([numbers(e, n)["action"] for e, n in enumerate(LENGTHS)])
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(source.statistics["action"][name], getattr(everything, name)(0), rtol=1e-5)
    spec = source.action_spec(units=("rad", "rad", "share"), gripper=Gripper("gripper", 250, 0))
    assert spec.names == tuple(NAMES) and spec.rate == 5 and spec.embodiment == "so100"
    assert spec.high == pytest.approx(tuple(everything.max(0)))


def test_a_single_camera_is_the_clips_video(tmp_path):
    write_v30(tmp_path / "set", ("top",))
    sample = ClipDataset(tmp_path / "set", random=False)[1]
    assert sample["video"].shape == (3, 6, 32, 48) and sample["actions"].shape == (5, 3)
    named = ClipDataset(tmp_path / "set", views="top", random=False)[1]  # as of a data set with several
    assert torch.equal(named["video"], sample["video"])
    with pytest.raises(ValueError, match="of the views top: no wrist"):
        ClipDataset(tmp_path / "set", views="wrist", random=False)[1]


def test_what_is_wrong_is_said(dataset):
    path = dataset / "meta/info.json"
    good = json.loads(path.read_text())

    def with_info(**changes):
        path.write_text(json.dumps(good | changes))

    with_info(codebase_version="v1.6")
    with pytest.raises(ValueError, match=r"LeRobot version v1.6; known are v2.0, v2.1, v3.0"):
        open_clips(dataset)
    features = {
        name: dict(f, dtype="image" if f["dtype"] == "video" else f["dtype"]) for name, f in good["features"].items()
    }
    with_info(features=features)
    with pytest.raises(ValueError, match="as pictures: convert them to videos"):
        open_clips(dataset)
    with_info(features={"action": good["features"]["action"]})
    with pytest.raises(ValueError, match="has no camera"):
        open_clips(dataset)
    with_info()
    with pytest.raises(ValueError, match="no feature 'torque'; there is action"):
        LeRobotClips(dataset, action="torque")
    for file in (dataset / "data/chunk-000").iterdir():
        parquet.write_table(parquet.read_table(file)[:-1], file)
    with pytest.raises(ValueError, match=r"has 38 rows for a length of 40 frames"):
        open_clips(dataset).read("episode_000002")
    with pytest.raises(FileNotFoundError, match="cannot be had from the Hub"):
        open_clips("hf://nobody/no-such-data-set")


def test_a_repository_of_the_hub_is_its_local_copy(dataset, monkeypatch):
    asked = []

    def snapshot(repository, repo_type, revision):
        asked.append((repository, repo_type, revision))
        return str(dataset)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert len(open_clips("hf://someone/arm").keys) == 3
    assert ClipDataset("hf://someone/arm@v1", views="top", random=False)[0]["caption"] == TASKS[0]
    assert asked == [("someone/arm", "dataset", None), ("someone/arm", "dataset", "v1")]


SPEC = ActionSpec(tuple(NAMES), ("rad",) * 3, "joints", "absolute", 5.0)


def test_rollouts_are_written_and_read_back(tmp_path):
    root = tmp_path / "rollouts"
    with LeRobotWriter(root, 5, SPEC, state_names=["a", "b"]) as writer:
        for episode, length in enumerate(LENGTHS):
            found = numbers(episode, length)
            videos = {"top": pictures(episode, length, 0), "wrist": pictures(episode, length, 1)}
            writer.add(videos, found["action"][:-1], found["observation.state"], TASKS[episode])
    clips = ClipDataset(root, views=("top", "wrist"), random=False)
    for episode, length in enumerate(LENGTHS):
        assert_is(clips[episode], episode, 0, length)
        assert clips[episode]["caption"] == TASKS[episode]
    source = LeRobotClips(root)
    assert source.names("observation.state") == ["a", "b"] and ActionSpec.load(root / "meta") == SPEC
    assert source.info["total_frames"] == sum(LENGTHS) and source.info["total_tasks"] == 2
    assert replace(source.action_spec(), low=(), high=()) == SPEC and len(source.action_spec().high) == 3
    assert source.action_spec(frame="base").frame == "base"
    tasks = parquet.read_table(root / "meta/tasks.parquet").to_pylist()
    assert tasks == [{"task_index": 0, "task": TASKS[0]}, {"task_index": 1, "task": TASKS[1]}]
    table = parquet.read_table(root / "data/chunk-000/file-001.parquet")
    assert table["index"].to_pylist() == list(range(9, 15)) and table["task_index"].to_pylist() == [1] * 6
    assert table["action"].to_pylist()[-1] == table["action"].to_pylist()[-2]
    np.testing.assert_allclose(source.statistics["observation.state"]["max"], [39 + 2, 2])


def test_what_the_writer_refuses(tmp_path):
    video = pictures(0, 9, 0)
    actions = np.zeros((8, 3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        LeRobotWriter(tmp_path / "full", 5)
    with pytest.raises(ValueError, match="whole number"):
        LeRobotWriter(tmp_path / "a", 7.5)
    with pytest.raises(ValueError, match="actions are given at 5 per second, the frames at 10"):
        LeRobotWriter(tmp_path / "a", 10, SPEC)
    writer = LeRobotWriter(tmp_path / "a", 5, SPEC)
    for arguments, message in (
        ((video, np.zeros((9, 3))), "9 actions for 9 frames, 8 are needed"),
        ((video, np.zeros((8, 2))), "actions have 2 numbers, 3 are needed"),
        ((video,), "go together"),
        ((video, actions, np.zeros((9, 2))), "states and state_names go together"),
        (({"a": video, "b": video[:, :4]}, actions), "same number of frames"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.add(*arguments)
    with pytest.raises(ValueError, match="at least one episode"):
        writer.close()
    writer.add(video, actions)
    with pytest.raises(ValueError, match="this episode has .* those before have"):
        writer.add({"other": video}, actions)
