"""Samples from files in memory: windows and crops move every array along, and what is wrong is said."""

import io
import json

import numpy as np
import pytest
import torch

from cosmos_hf.data.samples import SampleReader
from cosmos_hf.data.video import write_video

FRAMES, HEIGHT, WIDTH = 9, 32, 48


def draw(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def files(tmp_path):
    """A clip whose frame t is grey 20 t + 8, with arrays that hold t; a bright square is masked and seen by the camera."""
    frames = (torch.arange(FRAMES, dtype=torch.uint8) * 20 + 8).view(1, -1, 1, 1).repeat(3, 1, HEIGHT, WIDTH)
    masks = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    frames[:, :, 8:16, 32:40], masks[:, 8:16, 32:40] = 235, 2
    path = write_video(tmp_path / "clip.mp4", frames, 5, crf=5)
    count = np.arange(FRAMES, dtype=np.float64)
    extrinsics = np.tile(np.eye(4), (FRAMES, 1, 1))
    extrinsics[:, 0, 3] = count
    buffer = io.BytesIO()
    np.savez(
        buffer,
        actions=count[:-1, None],
        states=count[:, None],
        masks=masks,
        extrinsics=extrinsics,
        # The point (0, 0, 1) is seen at the square's centre, x 36 and y 12 from the picture's edge.
        intrinsics=np.array([[40.0, 0, 36], [0, 40, 12], [0, 0, 1]]),
    )
    record = {"caption": "a grey clip", "fps": 5, "kind": "pick"}
    return {"mp4": path.read_bytes(), "json": json.dumps(record).encode(), "npz": buffer.getvalue()}


def repacked(files, **changes):
    arrays = dict(np.load(io.BytesIO(files["npz"]))) | changes
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return files | {"npz": buffer.getvalue()}


def brightest(frame):
    """Centre (x, y), from the picture's edge, of the pixels near white."""
    y, x = torch.nonzero(frame.float().mean(0) > 210, as_tuple=True)
    return x.float().mean() + 0.5, y.float().mean() + 0.5


def test_whole_sample(files):
    sample = SampleReader().read(files, "k", draw(0))
    assert sample["video"].shape == (3, FRAMES, HEIGHT, WIDTH) and sample["video"].dtype == torch.uint8
    assert (sample["fps"], sample["caption"], sample["key"], sample["start"]) == (5.0, "a grey clip", "k", 0)
    assert sample["record"]["kind"] == "pick"
    assert sample["actions"].shape == (8, 1) and sample["actions"].dtype == torch.float32
    assert sample["camera"]["extrinsics"].shape == (FRAMES, 4, 4) and sample["masks"].dtype == torch.uint8


def test_window_moves_every_array_along(files):
    reader, starts = SampleReader(num_frames=5), set()
    for seed in range(30):
        sample = reader.read(files, "k", draw(seed))
        start = sample["start"]
        starts.add(start)
        grey = sample["video"][0, :, -1, 0].float()
        torch.testing.assert_close(grey, (torch.arange(start, start + 5) * 20 + 8).float(), atol=4, rtol=0)
        assert sample["states"][:, 0].tolist() == list(range(start, start + 5))
        assert sample["actions"][:, 0].tolist() == list(range(start, start + 4))
        assert sample["camera"]["extrinsics"][:, 0, 3].tolist() == list(range(start, start + 5))
        assert sample["masks"].shape[0] == 5
    assert starts == {0, 1, 2, 3, 4}
    assert {SampleReader(num_frames=5, random=False).read(files, "k", draw(s))["start"] for s in range(5)} == {0}


def test_intrinsics_of_every_frame_move_along(files):
    """Of a lens that zooms; one that stands in front of all frames is theirs."""
    still = np.array([[40.0, 0, 36], [0, 40, 12], [0, 0, 1]])
    zooming = np.tile(still, (FRAMES, 1, 1))
    zooming[:, 0, 0] += np.arange(FRAMES)
    reader = SampleReader(num_frames=5, size=(64, 96))
    for seed in range(4):
        sample = reader.read(repacked(files, intrinsics=zooming), "k", draw(seed))
        start = sample["start"]
        assert sample["camera"]["intrinsics"][:, 0, 0].tolist() == [2.0 * (40 + t) for t in range(start, start + 5)]
    assert reader.read(repacked(files, intrinsics=still[None]), "k", draw(0))["camera"]["intrinsics"].shape == (3, 3)
    with pytest.raises(ValueError, match="intrinsics has 8 entries for 9 frames, 9 are needed"):
        reader.read(repacked(files, intrinsics=zooming[1:]), "k", draw(0))
    with pytest.raises(ValueError, match="extrinsics hold no rotation"):
        reader.read_arrays(repacked(files, extrinsics=2 * np.tile(np.eye(4), (FRAMES, 1, 1))), "k", ("camera",))


@pytest.mark.parametrize(
    "reader",
    [
        SampleReader(num_frames=3),
        SampleReader(crop=(16, 24)),
        SampleReader(size=(16, 16)),
        SampleReader(num_frames=4, size=(48, 64), crop=(32, 32)),
    ],
)
def test_cut_of_the_whole_is_what_read_gives(files, reader):
    whole = reader.read_whole(files, "k")
    before = whole["camera"]["intrinsics"].clone()
    for seed in range(4):
        one, other = reader.read(files, "k", draw(seed)), reader.cut(whole, draw(seed))
        assert one.keys() == other.keys()
        for name in ("video", "actions", "states", "masks"):
            assert torch.equal(one[name], other[name]), name
        for name in ("intrinsics", "extrinsics"):
            torch.testing.assert_close(one["camera"][name], other["camera"][name])
    assert torch.equal(whole["camera"]["intrinsics"], before) and whole["video"].shape[1] == FRAMES


@pytest.mark.parametrize(
    "options", [{"size": (64, 96)}, {"size": (64, 64)}, {"crop": (24, 40), "random": False}, {"crop": (24, 24)}]
)
def test_camera_and_masks_follow_size_and_crop(files, options):
    """Where the camera projects its axis, the picture is bright and the mask is set."""
    sample = SampleReader(**options).read(files, "k", draw(3))
    x, y = sample["camera"]["intrinsics"][:2, 2].tolist()
    frame, mask = sample["video"][:, 0], sample["masks"][0]
    assert mask.shape == frame.shape[1:]
    inside = 4 <= x <= frame.shape[2] - 4 and 4 <= y <= frame.shape[1] - 4
    if inside:
        seen = brightest(frame)
        assert abs(seen[0] - x) < 0.8 and abs(seen[1] - y) < 0.8
        rows, columns = torch.nonzero(mask == 2, as_tuple=True)
        assert abs(columns.float().mean() + 0.5 - x) < 0.8 and abs(rows.float().mean() + 0.5 - y) < 0.8
    assert inside or options.get("crop") == (24, 24)


def test_captions(files):
    reader = SampleReader(need_caption=True)
    assert reader.text({"txt": b" told \n", "json": files["json"]}, "k")[0] == "told"
    for lacking in ({}, {"json": b"{}"}, {"txt": b"  "}, {"json": b'{"caption": null}'}):
        with pytest.raises(ValueError, match=r"no caption: k\.txt, or 'caption' in k\.json"):
            reader.text(lacking, "k")
        assert SampleReader().text(lacking, "k")[0] == ""
    with pytest.raises(ValueError, match=r"k\.json is not JSON"):
        reader.text({"json": b"{"}, "k")
    with pytest.raises(ValueError, match="must be a string, got list"):
        reader.text({"json": b'{"caption": ["a"]}'}, "k")
    with pytest.raises(ValueError, match="must hold an object"):
        reader.text({"json": b"[]"}, "k")


def test_what_is_wrong_is_said(files):
    record = json.loads(files["json"])
    cases = [
        ({k: v for k, v in files.items() if k != "mp4"}, {}, "no video"),
        (files | {"json": json.dumps(record | {"fps": 10}).encode()}, {}, "runs at 5 fps, its record says 10"),
        (repacked(files, states=np.zeros((7, 1))), {}, "states has 7 entries for 9 frames, 9 are needed"),
        (repacked(files, actions=np.zeros((9, 1))), {}, "actions has 9 entries for 9 frames, 8 are needed"),
        (repacked(files, states=np.array(1.0)), {}, "states has no entries"),
        (repacked(files, actions=np.full((8, 1), np.nan)), {}, "actions holds NaN"),
        (repacked(files, masks=np.zeros((9, 8, 8), np.uint8)), {"size": (16, 16)}, "masks of"),
        (repacked(files, extrinsics=None), {}, "go together"),
        (files, {"num_frames": 17}, "the clip has 9 frames, 17 are needed"),
        (files, {"crop": (64, 64)}, "smaller than the crop"),
        (files, {"fps": 10}, "tear them from the frames"),
        (files | {"mp4": b"no video"}, {}, "not a video"),
    ]
    for bad, options, message in cases:
        with pytest.raises(ValueError, match=message):
            SampleReader(**options).read(bad, "k", draw(0))


def test_resampling_without_arrays(files):
    sample = SampleReader(fps=10, num_frames=6, random=False).read({"mp4": files["mp4"]}, "k", draw(0))
    assert sample["fps"] == 10 and sample["video"].shape[1] == 6
