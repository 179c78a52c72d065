"""Rendering into shards: layout, resuming, equal bytes, and refusals."""

import io
import json
import tarfile

import av
import numpy as np
import pytest
import webdataset

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.data.clips import ClipDataset, collate_clips
from cosmos_hf.worlds import driving
from cosmos_hf.worlds.render import choose_renderer
from cosmos_hf.worlds.shards import WORLDS, encode_mp4, render_split, sample_of


def samples(path):
    found = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            key, kind = member.name.split(".", 1)
            found.setdefault(key, {})[kind] = archive.extractfile(member).read()
    return found


@pytest.fixture(scope="module")
def rendered(tmp_path_factory, renderer):
    root = tmp_path_factory.mktemp("tabletop")
    render_split(root, "val_iid", 2, clips_per_shard=1, num_workers=1, progress=False)
    return root


def test_a_sample_holds_video_record_and_arrays(rendered):
    shard = samples(rendered / "val_iid" / "val_iid-00001.tar")
    assert sorted(shard) == ["tabletop-val_iid-000001"]
    sample = shard["tabletop-val_iid-000001"]
    record = json.loads(sample["json"])
    assert (record["fps"], record["split"], record["world"], record["seed"]) == (5, "val_iid", "tabletop", 0)
    assert record["caption"].endswith(".") and record["renderer"] == choose_renderer()
    with av.open(io.BytesIO(sample["mp4"])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 33 and frames[0].shape == (96, 128, 3)
    arrays = np.load(io.BytesIO(sample["npz"]))
    assert {name: arrays[name].shape for name in ("actions", "states", "commands", "masks")} == {
        "actions": (32, 7),
        "states": (33, 7),
        "commands": (32, 7),
        "masks": (33, 96, 128),
    }
    assert arrays["masks"].dtype == np.uint8 and arrays["states"].dtype == np.float32


def test_the_record_of_the_data_set(rendered):
    record = json.loads((rendered / "dataset.json").read_text())
    assert record["clips"] == {"val_iid": 2} and record["simulator"].startswith("mujoco")
    assert (record["height"], record["width"], record["num_frames"], record["fps"]) == (96, 128, 33, 5)


def test_resuming_keeps_complete_shards_and_gives_equal_bytes(rendered):
    """The lost shard was rendered after another one by the same process, and now alone: it comes out the same."""
    kept, lost = (rendered / "val_iid" / f"val_iid-0000{i}.tar" for i in (0, 1))
    bytes_before, time_before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    render_split(rendered, "val_iid", 2, clips_per_shard=1, num_workers=1, progress=False)
    assert lost.read_bytes() == bytes_before
    assert kept.stat().st_mtime_ns == time_before
    assert not list(rendered.rglob("*partial*"))


def test_refusals(rendered, tmp_path):
    with pytest.raises(ValueError, match="seed=0 there, 1 asked"):
        render_split(rendered, "train", 1, clips_per_shard=1, seed=1, progress=False)
    with pytest.raises(ValueError, match="has no split 'val_moon'; there is train, val_iid"):
        render_split(tmp_path, "val_moon", 1)
    with pytest.raises(ValueError, match="unknown world"):
        render_split(tmp_path, "train", 1, world="moon")
    with pytest.raises(ValueError, match="num_clips must be at least 1"):
        render_split(tmp_path, "train", 0)
    assert not list(tmp_path.iterdir())


def test_video_bytes_are_repeatable_and_close_to_the_frames():
    y, x = np.mgrid[0:96, 0:128]
    frames = np.stack([np.stack([x + t, y + 2 * t, x // 2 + y // 2], -1) for t in range(5)]).astype(np.uint8)
    data = encode_mp4(frames, 5)
    assert data == encode_mp4(frames, 5)
    with av.open(io.BytesIO(data)) as video:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    error = np.mean((decoded.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


def test_video_bytes_do_not_depend_on_what_was_in_memory():
    """Moving boxes in the driving world's size, which x264's AVX-512 code coded in 20 ways out of 20."""
    rng = np.random.default_rng(1)
    frames = np.full((17, 64, 96, 3), 120, np.uint8)
    for _ in range(40):
        corner, size, color = rng.integers(0, (64, 96)), rng.integers(4, (32, 48)), rng.integers(0, 255, 3)
        motion = rng.normal(0, 3, 2)
        for t in range(17):
            top, left = np.maximum(corner + (motion * t).astype(int), 0)
            frames[t, top : top + size[0], left : left + size[1]] = color
    results = set()
    for _ in range(10):
        litter = [rng.integers(0, 255, count, dtype=np.uint8) for count in rng.integers(1000, 200000, 50)]
        del litter
        results.add(encode_mp4(frames, 5))
    assert len(results) == 1


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_is_complete(world):
    module = WORLDS[world]
    assert module.SPLITS[0] == "train" and "val_iid" in module.SPLITS
    assert ("val_counterfactual" in module.SPLITS) == (
        world not in ("tabletop_instructions", "tabletop_objects", "tabletop_hand")
    )
    assert (module.NUM_FRAMES - 1) % 8 == 0 and module.HEIGHT % 16 == module.WIDTH % 16 == 0
    assert module.VERSION >= 1 and module.FPS > 0 and callable(module.simulate)


@pytest.fixture(scope="module")
def drives(tmp_path_factory):
    """Two drives as a shard, with pictures that tell view and frame."""
    folder = tmp_path_factory.mktemp("driving")
    with webdataset.TarWriter(str(folder / "train-00000.tar")) as writer:
        for index in range(2):
            episode = driving.simulate("train", index, renderer=None)
            for v, frames in enumerate(episode.frames.values()):
                frames[:] = (10 + 30 * v + 4 * np.arange(17)).reshape(17, 1, 1, 1)
            episode.masks = np.arange(6 * 17, dtype=np.uint8).reshape(6, 17, 1, 1).repeat(64, 2).repeat(96, 3)
            writer.write(sample_of(episode, "driving", "train", index, 0, "classic"))
    return folder


def test_views_are_read_together_or_alone(drives):
    views = ("back", "front", "left")
    clips = ClipDataset(drives, views=views, num_frames=9, crop=(32, 48))
    sample = clips[(0, 5)]
    start, order = sample["start"], [list(driving.VIEWS).index(view) for view in views]
    assert sample["video"].shape == (3, 3, 9, 32, 48) and sample["views"] == list(views)
    expected = np.array([[10 + 30 * v + 4 * (start + t) for t in range(9)] for v in order])
    np.testing.assert_allclose(sample["video"][:, 0, :, 0, 0], expected, atol=3)
    assert sample["masks"].shape == (3, 9, 32, 48)
    np.testing.assert_array_equal(sample["masks"][:, 0, 0, 0], [17 * v + start for v in order])
    episode = driving.simulate("train", 0, renderer=None)
    np.testing.assert_allclose(
        sample["camera"]["extrinsics"], episode.extrinsics[order, start : start + 9].astype(np.float32)
    )
    assert sample["camera"]["intrinsics"].shape == (3, 3, 3) and sample["actions"].shape == (8, 2)
    assert sample["view_captions"] == [episode.view_captions[view] for view in views]
    batch = collate_clips([sample, clips[(1, 5)]])
    assert batch["video"].shape == (2, 3, 3, 9, 32, 48) and batch["camera"]["extrinsics"].shape == (2, 3, 9, 4, 4)

    alone = ClipDataset(drives, views="left", random=False, keep_decoded=True)[0]
    assert alone["video"].shape == (3, 17, 64, 96) and "views" not in alone
    np.testing.assert_array_equal(alone["camera"]["extrinsics"], episode.extrinsics[1].astype(np.float32))
    assert alone["masks"][3, 0, 0] == 17 + 3
    smaller = ClipDataset(drives, views=views, size=(32, 32))[0]
    assert smaller["masks"].shape == (3, 17, 32, 32) and smaller["video"].shape == (3, 3, 17, 32, 32)
    assert smaller["camera"]["intrinsics"][:, 0, 2].tolist() == [16, 16, 16]


def test_views_must_be_chosen_and_exist(drives):
    with pytest.raises(ValueError, match="has the views back, .*name one as `camera` .*or one or several as `views`"):
        ClipDataset(drives)[0]
    with pytest.raises(ValueError, match="no view top: the clip has back"):
        ClipDataset(drives, views=("front", "top"))[0]
