"""Data sets: shards and folders, order and resumption, broken samples, batches, streams."""

import io
import itertools
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cosmos_hf.data.clips import ClipDataset, StreamedClips, collate_clips, data_names, open_clips
from cosmos_hf.data.sampling import ResumableSampler
from cosmos_hf.data.video import write_video

FRAMES = 6


def clip_files(folder, number, caption="a clip"):
    """{extension: bytes} of a clip whose frames are grey 10 * number + t."""
    frames = (torch.arange(FRAMES, dtype=torch.uint8) + 10 * number + 20).view(1, -1, 1, 1).expand(3, FRAMES, 16, 24)
    video = write_video(folder / "made.mp4", frames.contiguous(), 5).read_bytes()
    buffer = io.BytesIO()
    np.savez(buffer, actions=np.full((FRAMES - 1, 2), number, np.float32))
    record = {"caption": f"{caption} {number}", "fps": 5}
    return {"mp4": video, "json": json.dumps(record).encode(), "npz": buffer.getvalue()}


def write_shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Seven clips in two shards."""
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    clips = {f"clip{i}": clip_files(tmp_path, i) for i in range(7)}
    for number, keys in enumerate((range(4), range(4, 7))):
        write_shard(folder / f"train-{number:05d}.tar", {f"clip{i}": clips[f"clip{i}"] for i in keys})
    return folder


def order(dataset, sampler, count):
    return [dataset.key(index) for index, _ in itertools.islice(sampler, count)]


def test_shards_by_folder_file_and_pattern(shards):
    assert len(ClipDataset(shards)) == 7
    assert len(ClipDataset(shards / "train-00001.tar")) == 3
    assert len(ClipDataset(str(shards / "*-0000[0-1].tar"))) == 7
    assert len(ClipDataset([shards / "train-00000.tar", shards / "train-00001.tar"])) == 7
    sample = ClipDataset(shards)[5]
    assert sample["key"] == "clip5" and sample["caption"] == "a clip 5"
    assert sample["video"].float().mean() == pytest.approx(72.5, abs=2) and (sample["actions"] == 5).all()
    assert ClipDataset(shards).captions() == [f"a clip {i}" for i in range(7)]


def test_webdataset_reads_the_same_keys(shards):
    """The grouping of files into samples is the webdataset library's."""
    webdataset = pytest.importorskip("webdataset")
    stream = webdataset.WebDataset(str(shards / "train-{00000..00001}.tar"), shardshuffle=False)
    theirs = {sample["__key__"]: sample["json"] for sample in stream}
    ours = open_clips(shards)
    assert {key: ours.read(key)["json"] for key in ours.keys} == theirs


def test_shards_are_indexed_at_construction(shards, tmp_path):
    dataset = ClipDataset(shards)
    write_shard(shards / "train-00002.tar", {"clip9": clip_files(tmp_path, 9)})
    assert len(dataset) == 7 and len(ClipDataset(shards)) == 8


def test_folder_of_videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "deeper").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "b.mp4", "deeper/c.mp4")):
        (folder / name).write_bytes(clip_files(tmp_path, number)["mp4"])
    (folder / "a.txt").write_text("told in a text\n")
    (folder / "b.json").write_text(json.dumps({"caption": "told in a record"}))
    dataset = ClipDataset(folder)
    assert [dataset[i]["caption"] for i in range(3)] == ["told in a text", "told in a record", ""]
    assert [dataset.key(i) for i in range(3)] == ["a", "b", "deeper/c"]
    with pytest.raises(ValueError, match=r"sample 'deeper/c' is broken: no caption: deeper/c.txt"):
        ClipDataset(folder, need_caption=True)[2]
    (folder / "a.mov").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.mp4 and .*a\.mov would share"):
        ClipDataset(folder)


def test_nothing_to_read_is_said(tmp_path, shards):
    with pytest.raises(FileNotFoundError, match=r"name one of its splits: .*set/train"):
        ClipDataset(shards.parent)
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*absent"):
        ClipDataset(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must match .tar shards, it matches nothing"):
        ClipDataset(str(tmp_path / "absent*.tar"))
    with pytest.raises(ValueError, match="at least one folder"):
        ClipDataset([])
    with pytest.raises(ValueError, match="on_broken must be"):
        ClipDataset(shards, on_broken="ignore")
    with pytest.raises(TypeError, match="num_frame"):
        ClipDataset(shards, num_frame=5)


def test_cut_shards_and_double_keys_are_said(shards):
    whole = shards / "train-00000.tar"
    (shards / "cut.tar").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut.tar is not a complete tar file"):
        ClipDataset(shards / "cut.tar")
    (shards / "cut.tar").write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match="keys must be unique"):
        ClipDataset(shards)
    dataset = ClipDataset(whole)
    whole.write_bytes(b"")
    with pytest.raises(ValueError, match="was cut or replaced since it was indexed"):
        dataset[0]


def test_window_and_crop_depend_on_the_draw_alone(shards):
    kept = ClipDataset(shards, num_frames=3, crop=(8, 8), keep_decoded=True)
    plain = ClipDataset(shards, num_frames=3, crop=(8, 8))
    starts = set()
    for seed in range(12):
        one, other, again = kept[2, seed], plain[2, seed], plain[2, seed]
        assert torch.equal(one["video"], other["video"]) and torch.equal(other["video"], again["video"])
        starts.add(one["start"])
    assert len(starts) > 1 and torch.equal(plain[2]["video"], plain[2, 0]["video"])


def test_sampler_sees_all_once_an_epoch_and_differently_each_time(shards):
    dataset = ClipDataset(shards)
    keys = order(dataset, ResumableSampler(7, seed=1), 21)
    epochs = [keys[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert keys == order(dataset, ResumableSampler(7, seed=1), 21) != order(dataset, ResumableSampler(7, seed=2), 21)


def test_sampler_resumes_anywhere():
    full = list(itertools.islice(ResumableSampler(7, seed=3), 30))
    assert len(set(full)) == 30  # a sample that comes again comes with another draw
    for start in (0, 4, 7, 16):
        assert list(itertools.islice(ResumableSampler(7, seed=3, start=start), 10)) == full[start : start + 10]


def test_processes_share_the_order():
    full = list(itertools.islice(ResumableSampler(7, seed=3), 24))
    for start in (0, 6):
        ranks = [itertools.islice(ResumableSampler(7, 3, start, rank, 2), 9) for rank in range(2)]
        assert [item for pair in zip(*ranks, strict=True) for item in pair] == full[start : start + 18]
    with pytest.raises(ValueError, match="rank < world_size"):
        ResumableSampler(7, rank=2, world_size=2)
    with pytest.raises(ValueError, match="empty"):
        ResumableSampler(0)


def test_batches_are_of_one_kind():
    kinds = ["wide"] * 7 + ["high"] * 6
    share = dict(seed=3, kinds=kinds, batch_size=2, world_size=2)
    ranks = [[i for i, _ in itertools.islice(ResumableSampler(13, rank=rank, **share), 24)] for rank in range(2)]
    for batches in zip(*map(pairs, ranks), strict=True):
        assert len({kinds[i] for batch in batches for i in batch}) == 1
    epochs = [set(ranks[0][i : i + 4] + ranks[1][i : i + 4]) for i in range(0, 24, 4)]
    assert all(len(epoch) == 8 for epoch in epochs) and set().union(*epochs) == set(range(13))
    resumed = itertools.islice(ResumableSampler(13, rank=1, start=12, **share), 6)
    assert [i for i, _ in resumed] == ranks[1][6:12]
    with pytest.raises(ValueError, match="6 samples are of the kind high, and 7"):
        ResumableSampler(13, kinds=kinds, batch_size=7)
    alike = ResumableSampler(7, seed=3, kinds=["wide"] * 7, batch_size=2)
    assert list(itertools.islice(alike, 9)) == list(itertools.islice(ResumableSampler(7, seed=3), 9))


def pairs(items):
    return [items[i : i + 2] for i in range(0, len(items), 2)]


def test_names_tell_data_sets_apart():
    assert data_names(["a/val_iid", "a/val_view"]) == ["val_iid", "val_view"]
    assert data_names(["rooms/val_iid", "tabletop/val_iid", "x/rooms/val"]) == [
        "rooms/val_iid",
        "tabletop/val_iid",
        "rooms/val",
    ]
    assert data_names([]) == []
    with pytest.raises(ValueError, match="twice"):
        data_names(["rooms/val", "rooms/val"])


def test_batches_are_the_same_from_workers(shards):
    dataset = ClipDataset(shards, num_frames=3, crop=(8, 8))

    def batches(workers, start=0):
        loader = DataLoader(
            dataset, 2, sampler=ResumableSampler(7, 5, start), collate_fn=collate_clips, num_workers=workers
        )
        return list(itertools.islice(loader, 3))

    here, there = batches(0), batches(2)
    assert here[0]["video"].shape == (2, 3, 3, 8, 8) and here[0]["fps"].tolist() == [5, 5]
    assert here[0]["actions"].shape == (2, 2, 2) and len(here[0]["caption"]) == 2
    for a, b in zip(here, there, strict=True):
        assert a["key"] == b["key"] and torch.equal(a["video"], b["video"])
    assert torch.equal(batches(0, start=2)[0]["video"], here[1]["video"])


def test_broken_samples(shards, tmp_path, caplog):
    good = {f"g{i}": clip_files(tmp_path, i) for i in range(8)}
    path = write_shard(tmp_path / "mixed.tar", good | {"x0": {"mp4": b"torn"}, "x1": {"txt": b"no video"}})
    with pytest.raises(ValueError, match="sample 'x0' is broken: .*not a video"):
        ClipDataset(path)[8]
    dataset = ClipDataset(path, on_broken="skip", max_broken=0.2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # epochs: a sample counts once
            samples = [dataset[i] for i in range(10)]
    assert samples[8] is None and samples[9] is None and dataset.broken.keys == {"x0", "x1"}
    assert [record.args[0] for record in caplog.records] == ["x0", "x1"]
    assert collate_clips(samples)["video"].shape[0] == 8
    strict = ClipDataset(path, on_broken="skip", max_broken=0.1)
    with pytest.raises(ValueError, match=r"2 of 10 samples are broken, more than 10.0%; the last: no video"):
        [strict[i] for i in range(10)]
    with pytest.raises(ValueError, match="every sample of this batch"):
        collate_clips([None, None])


def test_collate_keeps_what_all_have(shards):
    a, b = (ClipDataset(shards)[i] for i in (0, 1))
    del a["actions"]
    b["masks"] = torch.zeros(6, 16, 24)
    batch = collate_clips([a, b])
    assert "actions" not in batch and "masks" not in batch and batch["record"][1]["caption"] == "a clip 1"
    a["states"], b["states"] = torch.zeros(6, 2), torch.zeros(6, 3)
    assert [s.shape[1] for s in collate_clips([a, b])["states"]] == [2, 3]
    b["video"] = b["video"][:, :3]
    with pytest.raises(ValueError, match="differ in shape"):
        collate_clips([a, b])


def test_stream(shards):
    pytest.importorskip("webdataset")
    pattern = str(shards / "train-{00000..00001}.tar")
    assert [s["key"] for s in StreamedClips(pattern, shuffle=0)] == [f"clip{i}" for i in range(7)]
    stream = StreamedClips(pattern, seed=1, shuffle=4, num_frames=3)
    first, again = list(stream), list(stream)
    assert [s["key"] for s in first] == [s["key"] for s in again] and len({s["key"] for s in first}) == 7
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(first, again, strict=True))
    stream.set_epoch(1)
    other = list(stream)
    assert [(s["key"], s["start"]) for s in other] != [(s["key"], s["start"]) for s in first]
    assert (first[0]["actions"] == int(first[0]["key"][-1])).all() and first[0]["actions"].shape == (2, 2)
    loaded = [s["key"] for s in DataLoader(StreamedClips(pattern, shuffle=0), batch_size=None, num_workers=2)]
    assert sorted(loaded) == [f"clip{i}" for i in range(7)]
