"""`pipelines/evaluate_tokenizer.py` and `evaluate_model.py` as a user runs them; what they say of bad input."""

import importlib.util
import json
import runpy
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_hf import CosmosAutoregressivePipeline, nano_path
from cosmos_hf.data.real_media import MEDIA
from cosmos_hf.data.video import read_video, write_video
from cosmos_hf.models.ar_cosmos import PRESETS as AR_PRESETS
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.models.autoencoder_cosmos_image import PRESETS as IMAGE_PRESETS
from cosmos_hf.models.autoencoder_cosmos_image import CosmosImageTokenizer

SCRIPT = Path(__file__).parents[1] / "pipelines" / "evaluate_tokenizer.py"
WORLD_SCRIPT = SCRIPT.with_name("evaluate_model.py")


def run(*arguments):
    runpy.run_path(str(SCRIPT))["main"]([str(argument) for argument in arguments])


def test_clips_and_pictures(tmp_path, capsys):
    """The bundled tokenizer on a clip whose size it cannot take, and on pictures; everything about it in the file."""
    clip = read_video(f"{nano_path('video2world')}/example.mp4").frames
    write_video(tmp_path / "clips" / "a.mp4", clip[:, :, :90, :100].contiguous(), fps=5)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(clip[:, 0].permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / "a.png")
    Image.fromarray(clip[:, 8].permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / "b.png")
    output = tmp_path / "figures.json"
    run("--data", tmp_path / "clips", tmp_path / "pictures", "--output", output, "--num_frames", 9, "--no_progress")
    figures = json.loads(output.read_text())
    assert set(figures) == {"made_by", "clips", "pictures"}
    summary = figures["clips"]["summary"]
    assert set(summary) == {"psnr", "ssim", "epd", "flicker"} and summary["psnr"]["mean"] > 18
    assert figures["clips"]["alignment"] == {"0": 1} and figures["clips"]["frechet"]["efd"]["count"] == 9
    assert figures["pictures"]["summary"]["psnr"]["count"] == 2 and figures["pictures"]["alignment"] == {}
    assert "clips: " in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="pip install scikit-image")
def test_image_tokenizer_on_real_footage(tmp_path, monkeypatch):
    for name in set(MEDIA) - {"coffee"}:
        monkeypatch.delitem(MEDIA, name)
    tokenizer = CosmosImageTokenizer(**IMAGE_PRESETS["tiny"] | dict(quantizer="fsq", latent_channels=6))
    tokenizer.save_pretrained(tmp_path / "model")
    options = ("--height", 48, "--width", 64, "--num_frames", 3, "--num_clips", 1, "--no_perceptual", "--no_progress")
    run("--model", tmp_path / "model", "--real", "--output", tmp_path / "out.json", *options)
    figures = json.loads((tmp_path / "out.json").read_text())["real"]
    assert [row["key"] for row in figures["clips"]] == ["coffee-000"]
    assert 0 < figures["codes"]["code_usage"] <= 3 * 48 / 64000 and "frechet" not in figures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data folders, --real, or both"),
        (("--data", "no_such_folder", "--no_perceptual"), "no such file or folder: no_such_folder"),
        (("--real", "--height", 96), "give --height and --width together"),
        (("--real", "--i3d", "no_such.pt", "--no_perceptual"), "FVD needs i3d_torchscript.pt"),
    ],
)
def test_bad_input_is_a_message_and_not_a_stack_trace(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- world models ------------------------------------------------------------------------------------------------------


def test_an_autoregressive_model_beside_still_pictures(tmp_path):
    """Figures of an untrained model: a perplexity near the number of codes, a time, and what still pictures reach."""
    torch.manual_seed(0)
    vae = CosmosVideoTokenizer(**PRESETS["tiny-discrete"]).eval()
    transformer = CosmosARForCausalLM(CosmosARConfig(**AR_PRESETS["tiny"])).eval()
    pipe = CosmosAutoregressivePipeline(vae, transformer, num_frames=9, height=32, width=32, fps=5)
    pipe.save_pretrained(tmp_path / "model")
    for i in range(2):
        clip = read_video(f"{nano_path('video2world')}/example.mp4").frames[:, i : i + 9, :32, 32:64]
        write_video(tmp_path / "clips" / f"{i}.mp4", clip.contiguous(), fps=5)
    options = ("--conditioning_frames", "1", "--no_perceptual", "--top_p", "0.5")
    given = ("--model", tmp_path / "model", "--data", tmp_path / "clips", "--output", tmp_path / "out.json", *options)
    runpy.run_path(str(WORLD_SCRIPT))["main"]([str(value) for value in given])
    figures = json.loads((tmp_path / "out.json").read_text())["clips"]["from_1_frames"]
    assert 500 < figures["perplexity"] < 2000 and figures["seconds_per_generated_second"] > 0
    assert figures["model"]["psnr"]["mean"]["count"] == 2 and figures["copy_last_frame"]["psnr"]["mean"]["mean"] > 15
    assert (tmp_path / "out" / "clips-1.png").exists()
    for i in range(2):  # the same clips, as a camera of clips that have another one, too
        (tmp_path / "clips" / f"{i}.mp4").rename(tmp_path / "clips" / f"{i}.front.mp4")
        write_video(tmp_path / "clips" / f"{i}.left.mp4", clip.contiguous().flip(3), fps=5)
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        for path in (tmp_path / "clips").iterdir():
            archive.add(path, path.name)
    given = (
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "clips.tar",
        "--output",
        tmp_path / "out.json",
        *options,
    )
    runpy.run_path(str(WORLD_SCRIPT))["main"]([str(value) for value in (*given, "--camera", "front")])
    again = json.loads((tmp_path / "out.json").read_text())["clips.tar"]["from_1_frames"]
    assert again["copy_last_frame"] == figures["copy_last_frame"] and again["perplexity"] == figures["perplexity"]
