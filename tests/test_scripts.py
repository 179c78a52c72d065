"""Every script of `pipelines/` as a user runs it, with the bundled model and few steps; and what it says of bad input."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_hf import nano_path
from cosmos_hf.data.real_media import MEDIA
from cosmos_hf.data.video import read_metadata, read_video, write_video
from cosmos_hf.models.autoencoder_cosmos_image import PRESETS as IMAGE_PRESETS
from cosmos_hf.models.autoencoder_cosmos_image import CosmosImageTokenizer

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


def test_evaluate_tokenizer(tmp_path, capsys):
    """The bundled tokenizer on a clip whose size it cannot take, and on pictures; everything about it in the file."""
    clip = read_video(EXAMPLE).frames
    write_video(tmp_path / "clips" / "a.mp4", clip[:, :, :90, :100].contiguous(), fps=5)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(clip[:, 0].permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / "a.png")
    Image.fromarray(clip[:, 8].permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / "b.png")
    output = tmp_path / "figures.json"
    sets = [tmp_path / "clips", tmp_path / "pictures"]
    run("evaluate_tokenizer", "--data", *sets, "--output", output, "--num_frames", 9, "--no_progress")
    figures = json.loads(output.read_text())
    assert set(figures) == {"made_by", "clips", "pictures"}
    summary = figures["clips"]["summary"]
    assert set(summary) == {"psnr", "ssim", "epd", "flicker"} and summary["psnr"]["mean"] > 18
    assert figures["clips"]["alignment"] == {"0": 1} and figures["clips"]["frechet"]["efd"]["count"] == 9
    assert figures["pictures"]["summary"]["psnr"]["count"] == 2 and figures["pictures"]["alignment"] == {}
    assert "clips: " in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="pip install scikit-image")
def test_evaluate_image_tokenizer_on_real_footage(tmp_path, monkeypatch):
    for name in set(MEDIA) - {"coffee"}:
        monkeypatch.delitem(MEDIA, name)
    tokenizer = CosmosImageTokenizer(**IMAGE_PRESETS["tiny"] | dict(quantizer="fsq", latent_channels=6))
    tokenizer.save_pretrained(tmp_path / "model")
    options = ("--height", 48, "--width", 64, "--num_frames", 3, "--num_clips", 1, "--no_perceptual", "--no_progress")
    run("evaluate_tokenizer", "--model", tmp_path / "model", "--real", "--output", tmp_path / "out.json", *options)
    figures = json.loads((tmp_path / "out.json").read_text())["real"]
    assert [row["key"] for row in figures["clips"]] == ["coffee-000"]
    assert 0 < figures["codes"]["code_usage"] <= 3 * 48 / 64000 and "frechet" not in figures


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
        ("evaluate_model", ("--data", "no_such_folder"), "no_such_folder"),
        ("evaluate_tokenizer", (), "give --data folders, --real, or both"),
        (
            "evaluate_tokenizer",
            ("--data", "no_such_folder", "--no_perceptual"),
            "no such file or folder: no_such_folder",
        ),
        ("evaluate_tokenizer", ("--real", "--height", 96), "give --height and --width together"),
        ("evaluate_tokenizer", ("--real", "--i3d", "no_such.pt", "--no_perceptual"), "FVD needs i3d_torchscript.pt"),
    ],
)
def test_bad_input_is_a_message_and_not_a_stack_trace(script, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
