"""A video file of any length passes through the tokenizer in the memory of one chunk."""

import resource

import pytest
import torch

from cosmos_hf.data.video import VideoWriter, read_video, to_float, to_uint8, write_video
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.pipelines.reconstruct import reconstruct_file


def peak_mib() -> float:
    """The most memory that this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def moving(num_frames: int, size: int):
    """Grey frames with a white square on its way, ten at a time."""
    for start in range(0, num_frames, 10):
        frames = torch.full((3, min(10, num_frames - start), size, size), 90, dtype=torch.uint8)
        for i in range(frames.shape[1]):
            x = (start + i) % (size - 16)
            frames[:, i, 40:56, x : x + 16] = 255
        yield frames


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return CosmosVideoTokenizer(**PRESETS["tiny"]).eval()


def test_memory_does_not_grow_with_the_length(tokenizer, tmp_path):
    """Eight times as many frames; had they lain in memory, as floats, the peak would have risen by 65 MiB."""
    peaks, figures = [], []
    for num_frames in (50, 400):
        path = tmp_path / f"{num_frames}.mp4"
        with VideoWriter(path, 25) as writer:
            for frames in moving(num_frames, 128):
                writer.write(frames)
        figures.append(reconstruct_file(tokenizer, path, tmp_path / "out.mp4", window=16, progress=False))
        peaks.append(peak_mib())
    assert [entry["num_frames"] for entry in figures] == [50, 400]
    assert figures[0]["attention_bytes"] >= figures[1]["attention_bytes"] / 1.3
    assert peaks[1] - peaks[0] < 30, peaks


def test_what_is_written_equals_coding_at_once(tokenizer, tmp_path, monkeypatch):
    write_video(tmp_path / "in.mp4", torch.cat(list(moving(23, 64)), 1), fps=25)
    written = []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (written.append(frames), write(self, frames)))
    reconstruct_file(tokenizer, tmp_path / "in.mp4", tmp_path / "out.mp4", chunk=8, progress=False)
    assert [part.shape[1] for part in written] == [1, 8, 8, 6]
    video = to_float(read_video(tmp_path / "in.mp4").frames)[None]
    with torch.no_grad():
        expected = tokenizer.decode(tokenizer.encode(video, pad_frames=True).latents, num_frames=23).sample
    assert (torch.cat(written, 1).int() - to_uint8(expected[0]).int()).abs().max() <= 1  # rounding


def test_other_precisions(tokenizer, tmp_path):
    write_video(tmp_path / "in.mp4", torch.cat(list(moving(5, 64)), 1), fps=25)
    model = CosmosVideoTokenizer(**PRESETS["tiny"]).to(torch.bfloat16).eval()
    assert reconstruct_file(model, tmp_path / "in.mp4", tmp_path / "out.mp4", progress=False)["num_frames"] == 5
