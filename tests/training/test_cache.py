"""Latents and text embeddings on disk: what they are, and when they are made again."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.training import devices
from cosmos_hf.training.cache import cache_latents, cache_text, covering_starts, load_text, model_hash
from cosmos_hf.training.text import build_text_encoder, embed_tokens, tokenize, train_vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return CosmosVideoTokenizer(**PRESETS["tiny"]).eval()


def cached(clips, tokenizer, folder, starts=(0, 4), **more):
    return cache_latents(ClipDataset(clips, random=False), tokenizer, folder, 9, list(starts), progress=False, **more)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_latents_are_those_of_each_window(clips, tokenizer, tmp_path):
    dataset = cached(clips, tokenizer, tmp_path)
    whole = ClipDataset(clips, random=False)[2]
    seen = set()
    for draw in range(8):
        sample = dataset[2, draw]
        start = next(
            s for s in (0, 4) if f"-{s}-9" in str(dataset.windows[2]) and matches(sample, whole, s, tokenizer)
        )
        seen.add(start)
    assert seen == {0, 4}
    assert sample["caption"] == whole["caption"] and sample["key"] == "clip2" and sample["fps"] == 5


def matches(sample, whole, start, tokenizer):
    video = whole["video"][None, :, start : start + 9] / 127.5 - 1
    with torch.no_grad():
        wanted = tokenizer.encode(video).latents[0]
    return torch.allclose(sample["latents"], wanted, atol=2e-3)


def test_only_what_changed_is_coded_again(clips, tokenizer, tmp_path):
    copy = tmp_path / "clips"
    shutil.copytree(clips, copy)
    first = cached(copy, tokenizer, tmp_path / "cache")
    before = times(tmp_path / "cache")
    assert len(before) == 12 and len(first) == 6
    (copy / "clip0.mp4").rename(copy / "renamed.mp4")
    (copy / "clip0.txt").write_text("Another caption.")
    (copy / "clip0.txt").rename(copy / "renamed.txt")
    again = cached(copy, tokenizer, tmp_path / "cache")
    assert times(tmp_path / "cache") == before  # a name and a caption do not matter
    assert "Another caption." in again.captions
    shutil.copy(copy / "clip1.mp4", copy / "clip2.mp4")  # now equal
    assert cached(copy, tokenizer, tmp_path / "cache").windows[1] == again.windows[0]
    cached(copy, tokenizer, tmp_path / "cache", starts=(0, 2))
    assert len(times(tmp_path / "cache")) == 12 + 5


def test_another_tokenizer_is_another_cache(clips, tokenizer, tmp_path):
    hash_before = model_hash(tokenizer)
    with torch.no_grad():
        tokenizer.quant_conv.bias[0] += 1
    changed = model_hash(tokenizer)
    with torch.no_grad():
        tokenizer.quant_conv.bias[0] -= 1
    assert hash_before != changed
    stats = CosmosVideoTokenizer(**PRESETS["tiny"], latents_mean=[0.0] * 16, latents_std=[2.0] * 16)
    stats.load_state_dict(tokenizer.state_dict())
    assert model_hash(stats) != model_hash(tokenizer)


def test_two_processes_share_the_work(clips, tokenizer, tmp_path):
    cached(clips, tokenizer, tmp_path, rank=0, world_size=2)
    assert len(times(tmp_path)) == 6
    other = cached(clips, tokenizer, tmp_path, rank=1, world_size=2)
    assert len(times(tmp_path)) == 12
    assert all(path.exists() for windows in other.windows for (path,) in windows)


def test_windows_that_do_not_fit(clips, tokenizer, tmp_path):
    assert all(len(windows) == 1 for windows in cached(clips, tokenizer, tmp_path, starts=(0, 5)).windows)
    with pytest.raises(ValueError, match="'clip0' is broken: it has 13 frames: too few for 9 from any of the starts"):
        cached(clips, tokenizer, tmp_path, starts=(5,))
    with pytest.raises(ValueError, match="caching needs whole clips"):
        cache_latents(ClipDataset(clips), tokenizer, tmp_path, 9, [0])


@pytest.mark.parametrize("num_frames", [1, 9, 17])
@pytest.mark.parametrize("length", [1, 9, 10, 17, 26, 33, 100, 121])
def test_windows_that_cover_a_clip(length, num_frames):
    starts = covering_starts(length, num_frames)
    seen = {frame for start in starts for frame in range(start, start + num_frames)}
    assert seen == (set(range(length)) if length >= num_frames else set())
    assert len(starts) == (-(-length // num_frames) if length >= num_frames else 0)  # none more than needed
    assert starts == sorted(starts) and starts[:1] in ([], [0])


def test_without_starts_every_frame_lies_in_a_window(clips, tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    dataset = cached(clips, tokenizer, tmp_path, starts=())
    assert [list(windows.values()) for windows in dataset.windows] == 6 * [[slice(0, 9), slice(4, 13)]]
    assert f"{clips}: 78 of 78 frames lie in a window of 9 frames" in caplog.text
    before = times(tmp_path)
    assert list(cached(clips, tokenizer, tmp_path, starts=(4,)).windows[0].values()) == [slice(4, 13)]
    assert f"{clips}: 54 of 78 frames lie in a window" in caplog.text
    assert times(tmp_path) == before  # a window is one file, whatever chose its start
    one, other = (cached(clips, tokenizer, tmp_path, starts=starts).first(2)[1] for starts in ((), (0,)))
    assert torch.equal(one["latents"], other["latents"])


def test_text_embeddings(tmp_path):
    captions = ["A red square.", "A green square moves to the left."]
    vocabulary = train_vocabulary(captions, 300)
    encoder = build_text_encoder("tiny", 300).eval()
    paths = cache_text(captions, vocabulary, encoder, tmp_path, 24, progress=False)
    for caption in captions:
        ids, mask = tokenize(vocabulary, [caption], 24)
        loaded = load_text(paths[caption], 24)
        torch.testing.assert_close(loaded, embed_tokens(encoder, ids, mask)[0].detach(), atol=1e-5, rtol=1e-4)
        assert loaded[int(mask.sum()) :].abs().max() == 0
    before = times(tmp_path)
    cache_text(captions, vocabulary, encoder, tmp_path, 24, progress=False)
    assert times(tmp_path) == before


class Moved(torch.nn.Linear):
    """Tells where it was sent, and stays: there is no GPU where tests run."""

    def __init__(self, room: bool):
        super().__init__(1, 1)
        self.room, self.moves = room, []

    def to(self, device):
        self.moves.append(str(device))
        if not self.room and device.type == "cuda":
            raise torch.OutOfMemoryError("no room")
        return self


@pytest.mark.parametrize("room", [True, False])
def test_clips_are_coded_on_the_gpu_where_it_has_room(room, monkeypatch, caplog):
    monkeypatch.setattr(devices, "process_state", lambda: SimpleNamespace(device=torch.device("cuda", 1)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = Moved(room)
    with pytest.raises(KeyError), devices.at_work(model):
        assert model.moves == (["cuda:1"] if room else ["cuda:1", "cpu"])
        raise KeyError("whatever happens, the room is free for training afterwards")
    assert model.moves[-1] == "cpu"
    assert ("Moved does not fit on cuda:1" in caplog.text) is not room
