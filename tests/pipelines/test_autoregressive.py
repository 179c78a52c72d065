"""The autoregressive pipeline, with tiny real components."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_hf import nano_path
from cosmos_hf.data.video import read_metadata, read_video, to_float, write_video
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS as TOKENIZERS
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.pipelines.autoregressive import CosmosAutoregressivePipeline
from tiny_pipelines import SMALL, TEXT, autoregressive

SCRIPT = Path(__file__).parents[2] / "pipelines" / "ar_video2world.py"


@pytest.fixture(scope="module")
def with_text():
    return autoregressive(text=True)


@pytest.fixture(scope="module")
def plain():
    return autoregressive()


def clip(frames, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def run(pipe, **arguments):
    return pipe(**{"output_type": "latent", "generator": seeds(1)[0], **arguments}).frames


def test_output_types(plain):
    pt = run(plain, video=clip(5), output_type="pt")
    assert pt.shape == (1, 9, 3, 32, 32) and pt.min() >= 0 and pt.max() <= 1
    array = run(plain, video=clip(5), output_type="np")
    np.testing.assert_allclose(array, pt.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert run(plain, image=Image.new("RGB", (48, 32)), output_type="pil")[0][0].size == (32, 32)
    assert run(plain, video=clip(5)).shape == (1, 3, 4, 4)
    assert isinstance(plain(video=clip(5), return_dict=False), tuple)


def test_given_frames_are_kept_and_the_seed_matters(plain):
    expected = plain.vae.encode(to_float(clip(5))[None]).indices
    a, b = (run(plain, video=clip(5), generator=g) for g in seeds(1, 2))
    assert torch.equal(a[:, :2], expected) and torch.equal(b[:, :2], expected)
    assert not torch.equal(a[:, 2], b[:, 2])


def test_what_is_encoded_is_what_the_reference_encodes(plain):
    """It repeats the last frame up to the whole video's length before encoding, and keeps the given latent frames."""
    given = to_float(clip(5))[None]
    padded = torch.cat([given, given[:, :, -1:].expand(-1, -1, 4, -1, -1)], dim=2)
    assert torch.equal(plain.vae.encode(padded).indices[:, :2], plain.vae.encode(given).indices)


@pytest.mark.parametrize("argument", ["prompt", "video", "num_conditioning_frames", "temperature", "top_p"])
def test_every_input_matters(with_text, argument):
    other = dict(prompt="A blue ball.", video=clip(5, seed=3), num_conditioning_frames=1, temperature=0.3, top_p=0.1)
    base = dict(prompt="A red cube.", video=clip(5), top_p=1.0)
    a, b = run(with_text, **base), run(with_text, **base | {argument: other[argument]})
    assert not torch.equal(a[:, -1], b[:, -1])


def test_no_prompt_is_a_zero_text(with_text):
    a = run(with_text, video=clip(5))
    b = run(with_text, video=clip(5), prompt_embeds=torch.zeros(1, 16, 32))
    assert torch.equal(a, b)


def test_a_seed_gives_the_same_video_alone_or_in_a_batch(with_text):
    prompts, videos = ["A red cube.", "A ball."], [clip(5), clip(5, seed=4)]
    batch = run(with_text, prompt=prompts, video=videos, generator=seeds(7, 8))
    for i in range(2):
        assert torch.equal(batch[i], run(with_text, prompt=prompts[i], video=videos[i], generator=seeds(7 + i))[0])
    three = run(with_text, video=clip(5), num_videos_per_prompt=3, generator=seeds(1, 2, 1))
    assert torch.equal(three[0], three[2]) and not torch.equal(three[0], three[1])


@pytest.mark.parametrize("size", [(16, 48), (24, 32)])
def test_any_latent_grid(plain, size):
    height, width = size
    assert run(plain, video=clip(5), height=height, width=width).shape == (1, 3, height // 8, width // 8)


def test_longer_worlds_slide_over_codes(with_text):
    """A window begins with the last codes of the one before, and its own continuation is what stands in the result."""
    out = run(
        with_text, image=Image.new("RGB", (32, 32), "red"), num_frames=29, overlap_latent_frames=2, temperature=0
    )
    assert out.shape == (1, 8, 4, 4)
    model = with_text.transformer
    text = torch.zeros(1, 16, 32)
    for start in (1, 3, 5):
        seen = out[:, start : start + 2].flatten(1) if start else out[:, :1].flatten(1)
        prompt = torch.cat([torch.full((1, 1), 1000), seen], 1)
        expected = model.generate(prompt, max_new_tokens=16, encoder_hidden_states=text)[:, -16:]
        assert torch.equal(out[:, start + 2].flatten(1), expected), start


def test_guessed_codes_do_not_change_the_most_probable_video(with_text):
    arguments = dict(video=clip(5), prompt="A red cube.", temperature=0)
    plain, guessed = run(with_text, **arguments), run(with_text, **arguments, draft="previous_frame")
    assert torch.equal(plain, guessed)
    a, b = (run(with_text, video=clip(5), draft="previous_frame", generator=g) for g in seeds(1, 2))
    assert not torch.equal(a, b)


def test_progress_bar_counts_codes(plain, capsys):
    plain.set_progress_bar_config(disable=False)
    run(plain, video=clip(5))
    plain.set_progress_bar_config(disable=True)
    assert "16/16" in capsys.readouterr().err


def test_progress_bar_counts_guessed_codes_of_every_video(plain, capsys):
    plain.set_progress_bar_config(disable=False)
    run(plain, video=clip(5), num_videos_per_prompt=2, draft="previous_frame", generator=None)
    plain.set_progress_bar_config(disable=True)
    assert "32/32" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("max_new_tokens", 5), ("max_length", 20), ("top_k", 1)])
@pytest.mark.parametrize("draft", [None, "previous_frame"])
def test_a_call_decides_and_not_the_generation_config(plain, monkeypatch, name, value, draft):
    expected = run(plain, video=clip(5), draft=draft)
    monkeypatch.setattr(plain.transformer.generation_config, name, value)
    assert torch.equal(run(plain, video=clip(5), draft=draft), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "exactly one of image and video"),
        (dict(video=clip(5), num_conditioning_frames=4), r"must be 1 \+ k \* 4, got 4: use 1 or 5"),
        (dict(video=clip(9), num_conditioning_frames=9), "at most 5 here, got 9"),
        (dict(video=clip(5), num_frames=1), "leaves nothing to generate"),
        (dict(video=clip(5), height=20), "height must be a multiple of 8, got 20: use 16 or 24"),
        (dict(video=clip(5), output_type="gif"), "output_type must be one of"),
        (dict(video=clip(5), top_p=1.5), r"top_p in \[0, 1\]"),
        (dict(video=clip(5), draft="heads"), "no Medusa heads"),
        (dict(video=clip(5), draft="x"), "draft must be None or one of"),
        (dict(video=clip(5), temperature=-1.0), "temperature must be >= 0"),
        (dict(video=clip(5), overlap_latent_frames=3), "less than the window of 3, got 3"),
        (dict(video=clip(5), generator=seeds(1, 2)), "2 generators for 1 videos"),
        (dict(video=clip(5), prompt="x", prompt_embeds=torch.zeros(1, 4, 32)), "not both"),
        (dict(video=clip(5), prompt_embeds=torch.zeros(1, 4, 9)), r"must be \[batch, tokens, 32\]"),
    ],
)
def test_contradictions_are_refused(with_text, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(with_text, **arguments)


def test_parts_that_do_not_fit_are_refused(plain):
    with pytest.raises(ValueError, match="a prompt would be ignored"):
        run(plain, video=clip(5), prompt="A cube.")
    continuous = CosmosVideoTokenizer(**TOKENIZERS["tiny"])
    with pytest.raises(ValueError, match="continuous tokenizer"):
        CosmosAutoregressivePipeline(vae=continuous, transformer=plain.transformer)
    other = CosmosVideoTokenizer(**TOKENIZERS["tiny-discrete"] | dict(fsq_levels=(8, 8, 5, 5)))
    with pytest.raises(ValueError, match="1600 codes, the transformer 1000"):
        CosmosAutoregressivePipeline(vae=other, transformer=plain.transformer)
    text = CosmosARForCausalLM(CosmosARConfig(**SMALL | TEXT))
    pipe = CosmosAutoregressivePipeline(vae=plain.vae, transformer=text, height=32, width=32, num_frames=9)
    with pytest.raises(ValueError, match="no text_encoder"):
        run(pipe, video=clip(5), prompt="A cube.")


def test_save_and_load_in_a_fresh_process_and_the_script(with_text, plain, tmp_path):
    with_text.save_pretrained(tmp_path / "text")
    plain.save_pretrained(tmp_path / "plain")
    expected = run(with_text, video=clip(5), prompt="A red cube."), run(plain, video=clip(5))
    torch.save((clip(5), *expected), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from cosmos_hf import CosmosAutoregressivePipeline as P; d = sys.argv[1];"
        "video, a, b = torch.load(d + '/expected.pt'); g = lambda: torch.Generator().manual_seed(1);"
        "pipe = P.from_pretrained(d + '/text'); assert pipe.config.num_frames == 9;"
        "assert torch.equal(pipe(video=video, prompt='A red cube.', output_type='latent', generator=g()).frames, a);"
        "pipe = P.from_pretrained(d + '/plain'); assert pipe.text_encoder is None;"
        "assert torch.equal(pipe(video=video, output_type='latent', generator=g()).frames, b)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    write_video(tmp_path / "in.mp4", clip(40, 50, 90), fps=30)
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = [
        "--model",
        str(tmp_path / "plain"),
        "--input",
        str(tmp_path / "in.mp4"),
        "--output",
        str(tmp_path / "out.mp4"),
    ]
    main([*arguments, "--num_frames", "13"])
    assert read_video(tmp_path / "out.mp4").frames.shape == (3, 13, 32, 32)
    again = ["--output", str(tmp_path / "again.mp4")]
    runpy.run_path(str(SCRIPT.with_name("reproduce.py")))["main"]([str(tmp_path / "out.mp4"), *again])
    assert read_metadata(tmp_path / "again.mp4")["script"] == "ar_video2world"
    main([*arguments[:-1], str(tmp_path / "placed.mp4"), "--num_frames", "13", "--preset", "80gb"])
    placed, plain_one = (read_video(tmp_path / name).frames for name in ("placed.mp4", "out.mp4"))
    assert torch.equal(placed, plain_one)
    (tmp_path / "jobs.jsonl").write_text(
        '{"num_frames": 9, "temperature": 0.5}\n{"num_frames": 9, "draft": "previous_frame"}\n'
    )
    main([*arguments[:-1], str(tmp_path / "many"), "--batch", str(tmp_path / "jobs.jsonl")])
    assert [read_video(path).frames.shape[1] for path in sorted((tmp_path / "many").iterdir())] == [9, 9]
    with pytest.raises(SystemExit):
        main([*arguments, "--num_frames", "12"])


# ---- the bundled model ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_bundled_model_knows_its_world():
    """The codes of a held-out clip are far likelier than chance (1 in 4375), and its future looks like the clip, not like noise."""
    pipe = CosmosAutoregressivePipeline.from_pretrained(nano_path("autoregressive"))
    assert pipe.transformer.dtype == torch.float32
    video = read_video(f"{nano_path('autoregressive')}/example.mp4").frames
    codes = pipe.vae.encode(to_float(video)[None]).indices
    grid, first = tuple(codes.shape[1:]), codes[0, 0].numel()
    labels = codes.flatten(1).clone()
    labels[:, :first] = -100
    loss = pipe.transformer(codes.flatten(1), labels=labels, latent_shape=grid).loss
    assert loss.exp() < 40
    future = pipe(video=video[:, :1], generator=torch.Generator().manual_seed(0), output_type="pt").frames[0]
    error = (future.transpose(0, 1) - video / 255).square().mean()
    assert future.shape[0] == 17 and -10 * error.log10() > 14
