"""The autoregressive pipeline with a diffusion decoder: what it decodes, saving and loading, and what does not fit."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos_hf.data.video import read_video, write_video
from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS as TOKENIZERS
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.stored_prompt import CosmosStoredPrompt
from cosmos_hf.models.transformer_cosmos import PRESETS as DIFFUSION
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.pipelines.autoregressive import CosmosAutoregressivePipeline
from tiny_pipelines import diffusion_decoder

SCRIPT = Path(__file__).parents[2] / "pipelines" / "ar_video2world.py"
VIDEO = torch.randint(0, 256, (3, 5, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def build(decoder, **text) -> CosmosAutoregressivePipeline:
    torch.manual_seed(0)
    config = CosmosARConfig(**PRESETS["tiny"] | dict(vocab_size=1000, embedding_size=1064) | text)
    pipe = CosmosAutoregressivePipeline(
        vae=CosmosVideoTokenizer(**TOKENIZERS["tiny-discrete"]).eval(), transformer=CosmosARForCausalLM(config).eval(),
        diffusion_decoder=decoder, height=32, width=32, num_frames=9, fps=5, max_sequence_length=16,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decoder(**changes):
    return diffusion_decoder(code_spatial_compression=8, **changes)


@pytest.fixture(scope="module")
def pipe():
    return build(decoder(stored_prompt=CosmosStoredPrompt.of(torch.ones(4, 32))))


def seed(number=1):
    return torch.Generator().manual_seed(number)


def run(pipe, **arguments):
    return pipe(**{"video": VIDEO, "output_type": "pt", "generator": seed(), **arguments}).frames


def test_the_decoder_makes_the_video_unless_the_call_says_otherwise(pipe):
    """The codes are the same; with greedy codes the decoder's noise is the generator's first draw."""
    greedy = dict(temperature=0)
    codes = run(pipe, **greedy, output_type="latent")
    assert codes.shape == (1, 3, 4, 4) and codes.dtype == torch.int64
    expected = pipe.diffusion_decoder(codes, generator=seed(), output_type="pt").frames
    assert torch.equal(run(pipe, **greedy), expected)
    assert torch.equal(run(pipe, **greedy, use_diffusion_decoder=True), expected)
    plain = run(pipe, **greedy, use_diffusion_decoder=False)
    torch.testing.assert_close(
        plain[0].transpose(0, 1), (pipe.vae.decode_indices(codes).sample[0] / 2 + 0.5).clamp(0, 1)
    )
    more = run(
        pipe, **greedy, decoder_options=dict(num_inference_steps=3, guidance_scale=0.5, overlap_latent_frames=2)
    )
    assert more.shape == expected.shape and not torch.equal(more, expected)
    assert pipe(video=VIDEO, generator=seed(), output_type="pt").fps == 5


def test_a_seed_gives_the_same_video_alone_or_in_a_batch(pipe):
    batch = run(pipe, num_videos_per_prompt=2, generator=[seed(1), seed(2)])
    for i in range(2):
        torch.testing.assert_close(batch[i], run(pipe, generator=seed(1 + i))[0], atol=1e-4, rtol=1e-3)


def test_generators_in_a_tuple(pipe):
    assert torch.equal(run(pipe, generator=(seed(),)), run(pipe, generator=[seed()]))


def test_the_decoder_is_told_the_prompt_or_gets_its_own_text():
    text = dict(cross_attention_dim=32)
    own = decoder(stored_prompt=CosmosStoredPrompt.of(torch.ones(4, 32)))
    pipe, greedy = build(own, **text), dict(temperature=0)
    codes = run(pipe, **greedy, output_type="latent")
    assert torch.equal(run(pipe, **greedy), own(codes, generator=seed(), output_type="pt").frames)
    embeds = torch.randn(1, 16, 32)
    codes = run(pipe, **greedy, prompt_embeds=embeds, output_type="latent")
    told = own(codes, prompt_embeds=embeds, generator=seed(), output_type="pt").frames
    assert torch.equal(run(pipe, **greedy, prompt_embeds=embeds), told)
    assert not torch.equal(told, own(codes, generator=seed(), output_type="pt").frames)
    # one that was trained without texts is told nothing
    deaf = decoder(takes_text=False)
    silent = deaf(codes, generator=seed(), output_type="pt").frames
    assert torch.equal(run(build(deaf, **text), **greedy, prompt_embeds=embeds), silent)


def test_save_and_load_in_a_fresh_process_and_the_script(pipe, tmp_path):
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)
    torch.save((VIDEO, run(pipe)), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from cosmos_hf import CosmosAutoregressivePipeline as P; d = sys.argv[1];"
        "video, frames = torch.load(d + '/expected.pt'); pipe = P.from_pretrained(d + '/pipe');"
        "pipe.set_progress_bar_config(disable=True); g = torch.Generator().manual_seed(1);"
        "assert torch.allclose(pipe(video=video, output_type='pt', generator=g).frames, frames, atol=1e-4);"
        "half = P.from_pretrained(d + '/pipe', torch_dtype=torch.bfloat16);"
        "parts = half.diffusion_decoder.components;"
        "assert {parts[n].dtype for n in ('transformer', 'vae', 'stored_prompt')} == {torch.bfloat16};"
        "half.to(torch.float32); assert parts['vae'].dtype == half.vae.dtype == torch.float32;"
        "half.to('meta'); assert parts['transformer'].device.type == half.transformer.device.type == 'meta';"
        "assert P.from_pretrained(d + '/pipe', diffusion_decoder=None).diffusion_decoder is None"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    without = CosmosAutoregressivePipeline(vae=pipe.vae, transformer=pipe.transformer)
    without.save_pretrained(folder)  # the other folder stays there, but the index no longer names it
    assert CosmosAutoregressivePipeline.from_pretrained(folder).diffusion_decoder is None
    pipe.save_pretrained(folder)
    write_video(tmp_path / "in.mp4", VIDEO, fps=5)
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--model", str(folder), "--input", str(tmp_path / "in.mp4"), "--output"]
    for name, more in (("a", ["--decoder_steps", "1"]), ("b", ["--no_diffusion_decoder"])):
        main([*arguments, str(tmp_path / f"{name}.mp4"), *more])
    a, b = (read_video(tmp_path / f"{name}.mp4").frames for name in "ab")
    assert a.shape == b.shape == (3, 9, 32, 32) and not torch.equal(a, b)
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "c.mp4"), "--no_diffusion_decoder", "--decoder_steps", "1"])


def test_parts_that_do_not_fit_are_refused():
    wrong = CosmosWorldTransformer3D(**DIFFUSION["tiny-diffusion-decoder"] | dict(condition_vocab_size=1600))
    for parts, message in (
        (diffusion_decoder(), "spatial_compression=16, the discrete tokenizer has 8"),
        (decoder(code_temporal_compression=8), "temporal_compression=8, the discrete tokenizer has 4"),
        (
            decoder(transformer=wrong, fsq_levels=(8, 8, 5, 5)),
            r"fsq_levels=\(8, 8, 5, 5\), the discrete tokenizer has",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build(parts)
    with pytest.raises(ValueError, match="text of width 64, the diffusion decoder's to text of width 32"):
        build(decoder(), cross_attention_dim=64)
    assert build(decoder(takes_text=False), cross_attention_dim=64).diffusion_decoder is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(height=24), "cannot make a height of 24 pixels .* multiple of 2"),
        (dict(width=400), "cannot make a width of 400 pixels .* at most 48"),
        (dict(use_diffusion_decoder=False, decoder_options={}), "decoder_options would be ignored"),
        (dict(output_type="latent", use_diffusion_decoder=True), "gives the codes, which nothing decodes"),
        (dict(output_type="latent", decoder_options={}), "decoder_options would be ignored"),
        (dict(decoder_options=dict(guidance_scale=-1)), "guidance_scale must be >= 0"),
        (dict(decoder_options=dict(overlap_latent_frames=3)), "less than the window of 3, got 3"),
        (dict(decoder_options=dict(num_inference_steps=0)), "num_inference_steps must be at least 1"),
        (dict(decoder_options=dict(sampling=dict(solver="ddim"))), "solver must be one of"),
        (
            dict(decoder_options=dict(steps=3)),
            "decoder_options has no steps; there is num_inference_steps, guidance_scale",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_is_computed(pipe, monkeypatch, arguments, message):
    monkeypatch.setattr(pipe.transformer, "generate", None)
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)


def test_without_a_decoder():
    pipe = build(None)
    assert run(pipe).shape == (1, 9, 3, 32, 32)
    with pytest.raises(ValueError, match="the pipeline has no diffusion_decoder"):
        run(pipe, use_diffusion_decoder=True)
    # sizes that only a decoder could not make
    assert run(pipe, height=24).shape == (1, 9, 3, 24, 32)
