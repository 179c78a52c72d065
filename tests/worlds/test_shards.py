"""Rendering into shards: layout, resuming, equal bytes, and refusals."""

import io
import json
import tarfile

import av
import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.worlds.render import choose_renderer
from cosmos_hf.worlds.shards import encode_mp4, render_split


def samples(path):
    found = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            key, kind = member.name.split(".", 1)
            found.setdefault(key, {})[kind] = archive.extractfile(member).read()
    return found


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    try:
        choose_renderer()
    except RuntimeError as error:
        pytest.skip(f"no renderer runs on this machine: {error}")
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
    with pytest.raises(ValueError, match="val_moon"):
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
