"""Every script of `pipelines/` as a user runs it, with the bundled model and few steps; and what it says of bad input."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_hf import CosmosVideoTokenizer, nano_path
from cosmos_hf.data.video import VideoWriter, read_metadata, read_video, write_video
from torchscript_files import fixture, save_torchscript

SCRIPTS = Path(__file__).parents[1] / "pipelines"
EXAMPLE = f"{nano_path('video2world')}/example.mp4"


def run(name, *arguments):
    runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"]([str(argument) for argument in arguments])


def test_demo(tmp_path, capsys):
    run("demo", "--output_dir", tmp_path, "--num_inference_steps", 2)
    assert read_video(tmp_path / "world.mp4").frames.shape == (3, 17, 96, 128)
    assert Image.open(tmp_path / "contact_sheet.png").size[0] > 1000
    said = capsys.readouterr().out
    assert "world.mp4" in said and "contact_sheet.png" in said and "took" in said


def test_video2world_of_a_phone_video(tmp_path):
    """A portrait video of another rate and size; the result carries what made it."""
    write_video(tmp_path / "phone.mp4", torch.randint(0, 255, (3, 90, 160, 90), dtype=torch.uint8), fps=30)
    output = tmp_path / "future.mp4"
    run(
        "video2world",
        "--input",
        tmp_path / "phone.mp4",
        "--prompt",
        "a cube",
        "--output",
        output,
        "--num_inference_steps",
        1,
    )
    assert read_video(output).frames.shape == (3, 17, 96, 128)
    made_by = read_metadata(output)
    assert made_by["settings"]["prompt"] == "a cube" and made_by["settings"]["seed"] == 0
    assert made_by["versions"]["torch"] == torch.__version__ and made_by["pipeline"] == "CosmosVideo2WorldPipeline"


def test_video2world_of_an_image(tmp_path):
    Image.new("RGB", (300, 200), "green").save(tmp_path / "image.jpg")
    output = tmp_path / "future.mp4"
    run("video2world", "--input", tmp_path / "image.jpg", "--output", output, "--num_inference_steps", 1)
    assert read_video(output).frames.shape[1] == 17


def test_text2world(tmp_path):
    output = tmp_path / "world.mp4"
    run("text2world", "--prompt", "A robot arm.", "--output", output, "--num_inference_steps", 1, "--num_frames", 9)
    assert read_video(output).frames.shape[1] == 9


def test_reconstruct_video(tmp_path, capsys):
    """Any number of frames, also one that fills no whole chunk; the same count comes out."""
    clip = read_video(EXAMPLE, num_frames=13).frames
    write_video(tmp_path / "in.mp4", torch.cat([clip, clip, clip[:, :8]], 1), fps=5)
    run("reconstruct_video", "--input", tmp_path / "in.mp4", "--output", tmp_path / "out.mp4", "--no_progress")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["num_frames"] == 34 == read_video(tmp_path / "out.mp4").frames.shape[1]
    assert (figures["height"], figures["width"]) == (96, 128) and figures["psnr"] > 18


def test_reconstruct_video_with_a_window_and_small_chunks(tmp_path, capsys):
    arguments = ("--input", EXAMPLE, "--height", 32, "--width", 32, "--no_progress", "--chunk", 4)
    for window, output in (((), "exact.mp4"), (("--window", 2), "window.mp4")):
        run("reconstruct_video", *arguments, *window, "--output", tmp_path / output)
    exact, windowed = (json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:])
    assert exact["num_frames"] == windowed["num_frames"] == read_video(EXAMPLE).frames.shape[1]
    # Keys and values of encoder and decoder: 2 x 2 x 96 channels x 4 bytes at 4 x 4 positions of each latent frame kept.
    latent_frames = -(-(exact["num_frames"] - 1) // 4) + 1
    assert (exact["attention_bytes"], windowed["attention_bytes"]) == (24576 * latent_frames, 24576 * 2)


def test_reconstruct_video_leaves_no_half_written_file(tmp_path, monkeypatch):
    """A failure in the middle, here of the writer's second chunk."""
    written = []

    def fails_later(self, frames):
        written.append(frames.shape[1])
        if len(written) == 2:
            raise OSError("disk full")
        return write(self, frames)

    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", fails_later)
    with pytest.raises(SystemExit):
        run("reconstruct_video", "--input", EXAMPLE, "--height", 32, "--width", 32, "--output", tmp_path / "out.mp4")
    assert written == [1, 16] and not list(tmp_path.iterdir())


def test_convert_tokenizer(tmp_path, capsys):
    """A folder as published -> a folder that `from_pretrained` reads, in both layouts."""
    model, state, config = fixture("cv8x8x8_p4")
    folder = tmp_path / "Cosmos-1.0-Tokenizer-CV8x8x8"
    folder.mkdir()
    for part in ("encoder", "decoder"):
        save_torchscript(folder / f"{part}.jit", model, state, part)
    torch.save((torch.randn(16 * 3), torch.rand(16 * 3) + 0.5), folder / "mean_std.pt")
    sizes = json.dumps({name: config[name] for name in ("channels", "channels_mult", "num_res_blocks")})
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    for layout in ("cosmos_hf", "diffusers"):
        output = tmp_path / layout
        run(
            "convert_tokenizer",
            "--input",
            folder,
            "--output",
            output,
            "--config",
            sizes,
            "--verify",
            "--layout",
            layout,
        )
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert figures["statistics"] and figures["verified"]["encoder"]["error"] < 1e-5
        loaded = CosmosVideoTokenizer.from_pretrained(output).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded.encode(video).latents, model.encode(video).latents)
        assert len(loaded.config.latents_mean[0]) == 3
    with pytest.raises(SystemExit):
        run(
            "convert_tokenizer",
            "--input",
            folder,
            "--output",
            tmp_path / "wrong",
            "--preset",
            "cv8x16x16",
            "--config",
            sizes,
        )
    assert "missing" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("video2world", ("--input", "no_such.mp4"), "no such file: no_such.mp4"),
        ("video2world", ("--input", __file__), "not a video"),
        ("video2world", ("--input", EXAMPLE, "--num_frames", 16), "num_frames must be 1 + k * 4, got 16"),
        ("text2world", (), "--prompt is needed"),
        ("reconstruct_video", ("--input", "no_such.mp4"), "no such file: no_such.mp4"),
        (
            "reconstruct_video",
            ("--input", EXAMPLE, "--height", 50, "--width", 50),
            "height must be a multiple of 8, got 50",
        ),
        (
            "reconstruct_video",
            ("--input", EXAMPLE, "--chunk", 6),
            "chunk must be a positive multiple of 4 frames, got 6",
        ),
        ("reconstruct_video", ("--input", EXAMPLE, "--window", 0), "window is a number of latent frames"),
        ("convert_tokenizer", ("--input", "none", "--output", "x"), "no such folder: none"),
        ("evaluate_model", ("--data", "no_such_folder"), "no_such_folder"),
    ],
)
def test_bad_input_is_a_message_and_not_a_stack_trace(script, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
