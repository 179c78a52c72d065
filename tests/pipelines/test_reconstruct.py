"""A video file of any length passes through the tokenizer in the memory of one chunk."""

import resource

import pytest
import torch

from cosmos_hf.data.video import VideoWriter, read_video, write_video
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
    """Sixteen times as many frames; had they lain in memory, as floats, the peak would have risen by 150 MiB."""
    peaks, figures = [], []
    for num_frames in (50, 800):
        path = tmp_path / f"{num_frames}.mp4"
        with VideoWriter(path, 25) as writer:
            for frames in moving(num_frames, 128):
                writer.write(frames)
        figures.append(reconstruct_file(tokenizer, path, tmp_path / "out.mp4", window=16, progress=False))
        peaks.append(peak_mib())
    assert [entry["num_frames"] for entry in figures] == [50, 800]
    assert figures[0]["attention_bytes"] >= figures[1]["attention_bytes"] / 1.3
    assert peaks[1] - peaks[0] < 40, peaks


def test_the_file_equals_coding_at_once(tokenizer, tmp_path):
    write_video(tmp_path / "in.mp4", torch.cat(list(moving(21, 64)), 1), fps=25)
    reconstruct_file(tokenizer, tmp_path / "in.mp4", tmp_path / "out.mp4", chunk=8, progress=False)
    video = read_video(tmp_path / "in.mp4").frames[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = ((tokenizer(video).sample[0].clamp(-1, 1) + 1) * 127.5).round()
    written = read_video(tmp_path / "out.mp4").frames.float()
    assert (written - expected).abs().mean() < 3  # what the codec loses


def test_other_precisions(tokenizer, tmp_path):
    write_video(tmp_path / "in.mp4", torch.cat(list(moving(5, 64)), 1), fps=25)
    model = CosmosVideoTokenizer(**PRESETS["tiny"]).to(torch.bfloat16).eval()
    assert reconstruct_file(model, tmp_path / "in.mp4", tmp_path / "out.mp4", progress=False)["num_frames"] == 5
