"""Every script of `pipelines/` as a user runs it, with the bundled model and few steps; and what it says of bad input."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_hf import nano_path
from cosmos_hf.convert.checkpoints import Checkpoint
from cosmos_hf.data.video import read_metadata, read_video, write_video

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
    ],
)
def test_bad_input_is_a_message_and_not_a_stack_trace(script, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_convert_diffusion_there_and_back(tmp_path, capsys):
    """The bundled network as a checkpoint of the reference, to our layout with a base, and back; then to diffusers'."""
    run("convert_diffusion", nano_path(), "--to", "original", "--output", tmp_path / "model.pt")
    before = torch.load(tmp_path / "model.pt", weights_only=True)
    assert "net.blocks.block0.blocks.0.block.attn.to_q.0.weight" in before
    base = Path(nano_path())
    config = base / "transformer" / "config.json"
    run("convert_diffusion", tmp_path / "model.pt", "--config", config, "--base", base, "--output", tmp_path / "ours")
    assert "transformer: CosmosWorldTransformer3D" in capsys.readouterr().out
    assert (tmp_path / "ours" / "preflight.json").exists()
    shards = tmp_path / "shards"
    run(
        *("convert_diffusion", tmp_path / "ours", "--to", "original"),
        *("--output", shards, "--max_shard_size", "2MB"),
    )
    after = Checkpoint(shards)
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert set(after.keys()) == set(before) and all(torch.equal(after[key], before[key]) for key in before)
    run("convert_diffusion", tmp_path / "ours", "--to", "diffusers", "--output", tmp_path / "theirs")
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "CosmosTransformer3DModel"]


def test_convert_diffusion_says_what_is_missing(tmp_path, capsys):
    torch.save({"net.stray": torch.zeros(1)}, tmp_path / "model.pt")
    for arguments, message in (
        ((), "give --preset or --config"),
        (("--preset", "tiny"), "unknown keys ['net.stray']"),
        (("--preset", "tiny", "--max_shard_size", "5"), "like 500MB or 5GB"),
        (("--to", "diffusers", "--dtype", "float32"), "convert with --dtype first"),
    ):
        with pytest.raises(SystemExit):
            run("convert_diffusion", tmp_path / "model.pt", "--output", tmp_path / "out", *arguments)
        assert message in capsys.readouterr().err
