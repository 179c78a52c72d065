"""Every script of `pipelines/` as a user runs it, with the bundled model and few steps; and what it says of bad input."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from cosmos_hf import CosmosDiffusionDecoderPipeline, CosmosVideo2WorldPipeline, CosmosVideoTokenizer, nano_path
from cosmos_hf.conditioning.action import BRIDGE, ActionSpec
from cosmos_hf.conditioning.camera_paths import named_trajectory
from cosmos_hf.convert import load_original
from cosmos_hf.convert.checkpoints import Checkpoint
from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.video import VideoWriter, read_metadata, read_video, write_video
from cosmos_hf.models.condition_adapters import added_weights
from cosmos_hf.models.dit_conditions import extend_conditions
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.training.adaptation import save_adapter
from golden_files import golden, weights
from tiny_pipelines import SETTINGS, components
from tiny_tokenizers import tiny_video
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


def run_lines(script, tmp_path, lines, *arguments):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    quick = ("--num_inference_steps", 1, "--num_frames", 5)
    run(script, "--batch", jobs, "--output", tmp_path / "out", *quick, *arguments)


def test_a_batch_goes_on_where_it_was_cut(tmp_path, capsys):
    """Seeds count up, what is there is not made again, an item that fails is told and leaves the others alone."""
    lines = [
        {"prompt": "A cube."},
        "",
        {"prompt": "A cube.", "output": "named.mp4"},
        {"prompt": "A ball.", "num_frames": 6},
    ]
    with pytest.raises(SystemExit):
        run_lines("text2world", tmp_path, lines)
    told = capsys.readouterr()
    assert "1 of 3 videos failed" in told.err and "num_frames must be 1 + k * 4, got 6: use 5 or 9" in told.err
    first, second = tmp_path / "out" / "0000.mp4", tmp_path / "out" / "named.mp4"
    assert [read_metadata(path)["settings"]["seed"] for path in (first, second)] == [0, 1]
    assert read_metadata(first)["frames_sha256"] != read_metadata(second)["frames_sha256"]
    written, kept = first.stat().st_mtime_ns, read_metadata(second)["frames_sha256"]
    second.unlink()
    lines[3]["num_frames"] = 5
    run_lines("text2world", tmp_path, lines)
    assert "3 videos, 1 are there already" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written and read_metadata(second)["frames_sha256"] == kept
    # alone, the same seed gives the same video
    run(
        "text2world",
        "--prompt",
        "A cube.",
        "--seed",
        1,
        "--num_inference_steps",
        1,
        "--num_frames",
        5,
        "--output",
        tmp_path / "a.mp4",
    )
    assert read_metadata(tmp_path / "a.mp4")["frames_sha256"] == kept
    with pytest.raises(SystemExit):
        run_lines("text2world", tmp_path, lines, "--guidance_scale", 3)
    assert "made with other settings (guidance_scale)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 must be an object with keys from"),
        ({"promt": "a"}, "got ['promt']"),
        ({"model": "a"}, "got ['model']"),
        ({"seed": "one"}, "line 1: seed cannot be 'one'"),
        ({"solver": "ddim"}, "line 1: solver must be one of unipc, res_2ab, euler, got 'ddim'"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_lines("video2world", tmp_path, [line])
    assert message in capsys.readouterr().err


def test_a_batch_that_writes_a_file_twice_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_lines("text2world", tmp_path, [{"prompt": "a", "output": "x.mp4"}] * 2)
    assert "x.mp4 more than once" in capsys.readouterr().err


def test_reproduce(tmp_path, capsys):
    """The same frames again; other frames and another input are told with what is not the same."""
    clip, output = tmp_path / "in.mp4", tmp_path / "future.mp4"
    write_video(clip, read_video(EXAMPLE, num_frames=9).frames, fps=5)
    options = (
        "--num_inference_steps",
        2,
        "--guidance_interval",
        0.1,
        5,
        "--batch_guidance",
        "--prompt",
        "-a cube",
        "--fit",
        "pad",
    )
    run(
        "video2world",
        "--input",
        clip,
        "--output",
        output,
        "--resolution",
        "1:1",
        *options[:6],
        f"--prompt={options[7]}",
        *options[8:],
    )
    run("reproduce", output, "--output", tmp_path / "again.mp4")
    assert "has the same frames as" in capsys.readouterr().out
    settings = [read_metadata(path)["settings"] for path in (output, tmp_path / "again.mp4")]
    assert settings[0] | {"output": 0} == settings[1] | {"output": 0}
    write_video(clip, read_video(EXAMPLE, num_frames=9).frames.flip(3), fps=5)
    with pytest.raises(SystemExit) as stopped:
        run("reproduce", output, "--output", tmp_path / "again.mp4")
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "differs from" in said and "- the input file is another" in said
    with pytest.raises(SystemExit):
        run("reproduce", clip, "--output", tmp_path / "again.mp4")
    assert "does not tell how it was made" in capsys.readouterr().err


def test_rollout_world(tmp_path, capsys):
    """A world of two chunks, what is told about it, and the same again."""
    output = tmp_path / "long.mp4"
    quick = ("--num_inference_steps", 1, "--num_frames", 21, "--seed", 3, "--then", "It stops.")
    run(
        "rollout_world", "--input", EXAMPLE, "--prompt", "A robot arm.", "--truth", EXAMPLE, "--output", output, *quick
    )
    drift = json.loads((tmp_path / "long.drift.json").read_text())
    assert read_video(output).frames.shape == (3, 21, 96, 128) and [entry["frames"] for entry in drift] == [
        [0, 17],
        [17, 21],
    ]
    assert "psnr" in drift[0] and "seam" in drift[1]
    run("reproduce", output, "--output", tmp_path / "again.mp4")
    assert "has the same frames as" in capsys.readouterr().out


def test_a_killed_rollout_goes_on_and_ends_equal(tmp_path):
    """Killed by force in a process of its own, somewhere after its first chunk."""
    arguments = ["--input", EXAMPLE, "--prompt", "A robot arm.", "--num_inference_steps", "2", "--num_frames", "81"]
    cut, chunks = tmp_path / "cut.mp4", tmp_path / "cut.mp4.chunks"
    script = [sys.executable, str(SCRIPTS / "rollout_world.py"), *arguments, "--output", str(cut)]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (chunks / "chunk-00001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    made = sorted(chunks.glob("chunk-*.safetensors"))
    assert not cut.exists() and 2 <= len(made) < 7
    stamps = [path.stat().st_mtime_ns for path in made]
    run("rollout_world", *arguments, "--output", cut, "--keep_chunks")
    assert [path.stat().st_mtime_ns for path in made] == stamps
    run("rollout_world", *arguments, "--output", tmp_path / "whole.mp4", "--keep_chunks")
    for name in sorted(path.name for path in chunks.glob("chunk-*")):
        latents = [load_file(folder / name)["latents"] for folder in (chunks, tmp_path / "whole.mp4.chunks")]
        torch.testing.assert_close(*latents, atol=1e-4, rtol=0)
    whole, again = (read_video(path).frames for path in (tmp_path / "whole.mp4", cut))
    # Rounding in the last place of a pixel may lead the lossy codec another way for the rest of a block.
    assert whole.shape[1] == 81 and (whole.float() - again.float()).abs().mean() < 0.1


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A tiny base, its adapters that take actions and a camera, and a plan of 8 actions."""
    root = tmp_path_factory.mktemp("steered")
    pipe = CosmosVideo2WorldPipeline(**components("tiny-video2world"), **SETTINGS)
    pipe.save_pretrained(root / "base")
    for name, changes in (
        ("action", dict(action_dim=28, action_form="intended")),
        ("camera", dict(camera_channels=6)),
    ):
        model = CosmosWorldTransformer3D.from_pretrained(root / "base" / "transformer")
        extend_conditions(model, **changes)
        for weight in added_weights(model, changes).values():
            torch.nn.init.normal_(weight, std=0.1)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        save_adapter(model, root / name, changes, BRIDGE if name == "action" else None)
    plan = np.zeros((8, 7), dtype=np.float32)
    plan[:, 0], plan[:, 6] = 0.5, 1
    np.savez(root / "plan.npz", actions=plan)
    np.save(root / "plan.npy", plan)
    (root / "plan.json").write_text(json.dumps({"actions": [*plan.tolist(), plan[-1].tolist()]}))
    rows = [",".join(f"action{i}" for i in range(7)), *(",".join(map(str, row)) for row in plan)]
    (root / "plan.csv").write_text("\n".join(rows))
    Image.new("RGB", (48, 32), "green").save(root / "first.png")
    return root


def made_by(steered, name, *arguments, script="video2world"):
    output = steered / f"{name}.mp4"
    run(
        script,
        "--model",
        steered / "base",
        "--input",
        steered / "first.png",
        "--output",
        output,
        "--num_inference_steps",
        1,
        *arguments,
    )
    return read_metadata(output).get("frames_sha256"), output


def test_actions_and_cameras_from_the_shell(steered, capsys):
    """One plan in four files is one video; a named camera is one; and reproduce makes it again."""
    action = ("--adapter", steered / "action", "--actions")
    sums = {made_by(steered, kind, *action, steered / f"plan.{kind}")[0] for kind in ("npz", "npy", "csv", "json")}
    assert len(sums) == 1 and sums != {made_by(steered, "still", *action, steered / "plan.npy", "--seed", 1)[0]}
    camera = ("--adapter", steered / "camera", "--camera")
    left, output = made_by(steered, "left", *camera, "orbit_left", "--camera_angle", 20)
    assert left != made_by(steered, "right", *camera, "orbit_right", "--camera_angle", 20)[0]
    intrinsics = [[0.86 * 48, 0, 24], [0, 0.86 * 48, 16], [0, 0, 1]]
    np.savez(steered / "path.npz", intrinsics=intrinsics, extrinsics=named_trajectory("orbit_left", 9, angle=20))
    assert made_by(steered, "file", *camera, steered / "path.npz")[0] == left
    run("reproduce", output, "--output", steered / "again.mp4")
    assert "has the same frames as" in capsys.readouterr().out
    guided = ("--drop_conditions", "actions", "--guidance_scale", 2)
    assert made_by(steered, "guided", *action, steered / "plan.npy", *guided)[0] not in sums


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("action", "--actions", "plan.txt"), "no such file"),
        (("action", "--actions", "first.png"), "actions are read from .npz, .npy, .csv and .json"),
        (("action", "--actions", "path_alone.npz"), "has no 'actions'; there is extrinsics"),
        (("action",), "model needs actions="),
        (("camera", "--camera", "orbit"), "orbit is no file, and no way; there is static"),
        (
            ("camera", "--camera", "static", "--resolution", "1:1"),
            "give --height and --width in place of --resolution",
        ),
        (("camera", "--camera", "path_alone.npz"), "lacks intrinsics"),
    ],
)
def test_what_cannot_steer_is_a_message(steered, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(steered)
    np.savez("path_alone.npz", extrinsics=np.eye(4))
    with pytest.raises(SystemExit):
        made_by(steered, "wrong", "--adapter", *arguments)
    assert message in capsys.readouterr().err


def test_a_steered_rollout_becomes_a_data_set(steered):
    pytest.importorskip("pyarrow")
    plan = np.tile(np.load(steered / "plan.npy"), (2, 1))
    np.save(steered / "long.npy", plan)
    more = ("--adapter", steered / "action", "--actions", steered / "long.npy", "--num_frames", 17, "--overlap", 1)
    made_by(steered, "long", *more, "--lerobot", steered / "set", "--prompt", "a robot arm", script="rollout_world")
    sample = ClipDataset(steered / "set", random=False)[0]
    assert sample["video"].shape == (3, 17, 32, 48) and sample["caption"] == "a robot arm"
    np.testing.assert_allclose(sample["actions"], plan)
    assert ActionSpec.load(steered / "set" / "meta").names == BRIDGE.names


def test_preview_is_kept_up_to_date(tmp_path):
    run(
        "text2world",
        "--prompt",
        "a",
        "--num_inference_steps",
        2,
        "--num_frames",
        5,
        "--output",
        tmp_path / "w.mp4",
        "--preview",
        tmp_path / "preview.png",
    )
    assert Image.open(tmp_path / "preview.png").size[0] > 2 * 128


def test_both_prompts_are_in_the_metadata(tmp_path, monkeypatch):
    """With an upsampler that answers at once; the prompt that was used is the one that is reproduced."""
    from cosmos_hf.pipelines import prompt_upsampler

    class Answering:
        sees = False

        def __call__(self, prompt, image):
            return prompt_upsampler.UpsampledPrompt(prompt, f"{prompt} on a table", "chat")

    monkeypatch.setattr(prompt_upsampler, "_loaded", lambda name, device, four_bit: Answering())
    quick = ("--num_inference_steps", 1, "--num_frames", 5)
    run("text2world", "--prompt", "A cube", "--upsampler", "chat", "--output", tmp_path / "a.mp4", *quick)
    made_by = read_metadata(tmp_path / "a.mp4")
    assert made_by["prompts"] == {"original": "A cube", "upsampled": "A cube on a table", "upsampler": "chat"}
    run("text2world", "--prompt", "A cube on a table", "--output", tmp_path / "b.mp4", *quick)
    assert read_metadata(tmp_path / "b.mp4")["frames_sha256"] == made_by["frames_sha256"]
    run("reproduce", tmp_path / "a.mp4", "--output", tmp_path / "c.mp4")
    assert read_metadata(tmp_path / "c.mp4")["frames_sha256"] == made_by["frames_sha256"]


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
        ("video2world", (), "--input is needed"),
        ("rollout_world", ("--prompt", "a", "--overlap", 9), "overlap counts latent frames and must be in 1..4"),
        ("rollout_world", ("--prompt", "a", "--resolution", "1:1"), "--resolution is not for long worlds"),
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


def test_convert_a_diffusion_decoder(tmp_path, capsys):
    """A checkpoint of the reference, a tokenizer and the file with its text -> a folder that the pipeline reads, and back."""
    tensors, metadata, config = golden("diffusion_decoder", "diffusion_decoder_dit")
    state = {f"net.{key}": value for key, value in weights(tensors).items()}
    torch.save(state, tmp_path / "model.pt")
    text = tensors["crossattn_emb"]
    mask = torch.ones(text.shape[:2]).index_fill(1, torch.tensor([text.shape[1] - 1]), 0)
    torch.save({"context": text, "context_mask": mask}, tmp_path / "aux_vars.pt")
    reference = load_original(metadata["cls"].rsplit(".", 1)[-1], config, weights(tensors))
    reference.save_config(tmp_path / "config")
    statistics = dict(latents_mean=[0.1] * 16, latents_std=[0.5] * 16)
    tiny_video(temporal_compression=8, **statistics).save_pretrained(tmp_path / "vae")
    codes = tiny_video(
        quantizer="fsq", fsq_levels=(8, 8, 8), latent_channels=3, spatial_compression=16, temporal_compression=8
    )
    codes.save_pretrained(tmp_path / "codes")
    given = (tmp_path / "model.pt", "--config", tmp_path / "config" / "config.json", "--output", tmp_path / "ours")
    parts = ("--vae", tmp_path / "vae", "--codes", tmp_path / "codes", "--aux_vars", tmp_path / "aux_vars.pt")
    run("convert_diffusion", *given, *parts)
    assert "CosmosDiffusionDecoderPipeline, 15 steps" in capsys.readouterr().out
    pipe = CosmosDiffusionDecoderPipeline.from_pretrained(tmp_path / "ours")
    assert (pipe.scheduler.config.sigma_min, pipe.scheduler.config.solver) == (0.02, "euler")
    pipe.check_tokenizer(codes)
    assert torch.equal(pipe.stored_prompt.embeds[:-1], text[0, :-1]) and pipe.stored_prompt.embeds[-1].abs().max() == 0
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in pipe.transformer.state_dict().items())
    run("convert_diffusion", tmp_path / "ours", "--to", "original", "--output", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[key], value) for key, value in state.items() if not key.endswith("pos_embedder.seq"))
    capsys.readouterr()
    torch.save([text], tmp_path / "list.pt")
    for arguments, message in (
        (("--base", nano_path()), "--base is for world models"),
        (("--aux_vars", tmp_path / "aux_vars.pt"), "give --vae, its continuous tokenizer, too"),
        (("--vae", tmp_path / "none"), "no such folder"),
        (("--vae", tmp_path / "vae"), "are 64000 codes, the transformer knows 512"),  # the published codes
        ((*parts[:2], "--codes", tmp_path / "vae"), "is a continuous tokenizer"),
        (
            (*parts[:4], "--aux_vars", tmp_path / "list.pt"),
            "must hold the tensors context and context_mask, it holds list",
        ),
    ):
        with pytest.raises(SystemExit):
            run("convert_diffusion", *given, *arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("convert_diffusion", tmp_path / "model.pt", "--preset", "tiny", "--output", tmp_path / "x", *parts)
    assert "this network takes no codes" in capsys.readouterr().err


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


def test_a_preset_and_a_storage_from_the_shell(tmp_path, caplog):
    """On a processor the preset decodes in chunks and says what it leaves out; the mp4 is made again with the same storage."""
    out = tmp_path / "world.mp4"
    size = ("--num_inference_steps", 2, "--num_frames", 9, "--device", "cpu")
    run("video2world", "--input", EXAMPLE, *size, "--preset", "24gb", "--storage", "float8", "--output", out)
    assert "there is no accelerator" in caplog.text
    assert read_metadata(out)["settings"]["storage"] == "float8"
    run("reproduce", out, "--output", tmp_path / "again.mp4")
