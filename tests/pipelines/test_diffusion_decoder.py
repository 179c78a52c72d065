"""The diffusion decoder's pipeline: the reference's sampling run, windows without seams, streaming, and parts that do not fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosmos_hf.convert import load_original
from cosmos_hf.models.stored_prompt import CosmosStoredPrompt
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from cosmos_hf.pipelines.diffusion_decoder import CosmosDiffusionDecoderPipeline
from cosmos_hf.pipelines.preflight import PreflightError, preflight
from cosmos_hf.pipelines.windows import Windows
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from golden_files import golden, weights
from tiny_pipelines import diffusion_decoder
from tiny_tokenizers import tiny_video

LEVELS = (8, 5, 5, 5)


@pytest.fixture(scope="module")
def pipe():
    return diffusion_decoder(stored_prompt=CosmosStoredPrompt.of(torch.randn(4, 32)))


def indices(frames=3, height=2, width=4, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (batch, frames, height, width), generator=generator)


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def run(pipe, codes, **arguments):
    return pipe(codes, **{"output_type": "latent", "generator": seeds(0)[0], **arguments}).frames


# ---- the reference -----------------------------------------------------------------------------------------------------


def test_the_references_guided_run():
    """Its loop of five Euler steps with guidance 1.8, whose first sample has the deviation of the noisy data."""
    tensors, metadata, config = golden("diffusion_decoder", "diffusion_decoder_dit", outputs=True)
    transformer = load_original(metadata["cls"].rsplit(".", 1)[-1], config, weights(tensors))
    pipe = CosmosDiffusionDecoderPipeline(
        transformer=transformer, vae=tiny_video(temporal_compression=8, channels_mult=(1, 2, 2)),
        scheduler=CosmosEDMScheduler(sigma_min=0.02, solver="euler"), fsq_levels=(8, 8, 8), window_latent_frames=4,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.num_inference_steps, pipe.config.guidance_scale, pipe.config.fps) == (15, 1.8, 24)
    result = pipe(
        tensors["tokens"][:, 0],
        prompt_embeds=tensors["crossattn_emb"],
        latents=tensors["sample.noise"] * (80**2 + 1) ** 0.5 / 80,
        num_inference_steps=5,
        output_type="latent",
    ).frames
    torch.testing.assert_close(result, tensors["sample.out"], atol=1e-3, rtol=0)


# ---- results -------------------------------------------------------------------------------------------------------------


def test_output_types_and_sizes(pipe):
    """Codes of 16 pixels are a grid twice as coarse as the latents' of 8; both have a frame for four."""
    latents = run(pipe, indices())
    assert latents.shape == (1, 16, 3, 4, 8)
    pt = run(pipe, indices(), output_type="pt")
    assert pt.shape == (1, 9, 3, 32, 64) and pt.min() >= 0 and pt.max() <= 1
    array = run(pipe, indices(), output_type="np")
    np.testing.assert_allclose(array, pt.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    result = pipe(indices(), output_type="pil", fps=5)
    assert result.frames[0][0].size == (64, 32) and result.fps == 5


def test_codes_are_their_indices(pipe):
    codes = pipe.fsq.decode(indices()).movedim(-1, 1)
    assert torch.equal(run(pipe, codes), run(pipe, indices()))
    assert torch.equal(run(pipe, codes.bfloat16()), run(pipe, indices()))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("codes", indices(seed=1)),
        ("prompt_embeds", torch.ones(1, 4, 32)),
        ("fps", 12),
        ("num_inference_steps", 3),
        ("guidance_scale", 0.5),
        ("generator", torch.Generator().manual_seed(5)),
        ("sampling", dict(solver="unipc")),
    ],
)
def test_every_input_matters(pipe, argument, value):
    base = dict(codes=indices())
    assert not torch.equal(run(pipe, **base), run(pipe, **base | {argument: value}))


def test_the_unconditional_branch_has_code_0_and_no_text(pipe, monkeypatch):
    seen = []
    forward = pipe.transformer.forward

    def watched(states, timestep, text, **given):
        seen.append((given["condition"].max().item(), max(kv.value.abs().max().item() for kv in text)))
        return forward(states, timestep, text, **given)

    monkeypatch.setattr(pipe.transformer, "forward", watched)
    run(pipe, indices(), num_inference_steps=1)
    assert seen[0][0] > 0 and seen[0][1] > 0 and seen[1] == (0, 0)


def test_both_branches_in_one_batch_are_the_same(pipe):
    codes = indices(5, batch=2)
    both = run(pipe, codes, sampling=dict(batch_guidance=True))
    torch.testing.assert_close(both, run(pipe, codes), atol=1e-4, rtol=1e-4)


def test_a_callback_sees_every_step_and_may_stop(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        pipe.interrupt = True

    assert run(pipe, indices(), num_inference_steps=4, callback_on_step_end=callback).shape == (1, 16, 3, 4, 8)
    assert seen == [{"latents": (1, 16, 3, 4, 8), "denoised": (1, 16, 3, 4, 8)}]


def test_a_seed_gives_the_same_video_alone_or_in_a_batch(pipe):
    batch = run(pipe, indices(batch=2), generator=seeds(1, 2))
    for i in range(2):
        alone = run(pipe, indices(batch=2)[i : i + 1], generator=seeds(1 + i))
        torch.testing.assert_close(batch[i], alone[0], atol=1e-4, rtol=1e-4)


def test_a_short_clip_is_completed_as_the_reference_does(pipe):
    """The network sees a whole window, forwards and backwards; the result has the clip's frames."""
    short, noise = indices(2), torch.randn(1, 16, 3, 4, 8)
    whole = run(pipe, short[:, [0, 1, 0]], latents=noise)
    torch.testing.assert_close(run(pipe, short, latents=noise), whole[:, :, :2])


def test_codes_that_span_several_latent_frames():
    """Codes of 8 frames and latents of 4: the two latent frames of a code frame have its codes."""
    pipe = diffusion_decoder(code_temporal_compression=8, window_latent_frames=5)
    noise = torch.randn(1, 16, 5, 4, 8)
    spread = indices()[:, [0, 1, 1, 2, 2]]
    equal = diffusion_decoder(window_latent_frames=5)
    torch.testing.assert_close(run(pipe, indices(), latents=noise), run(equal, spread, latents=noise))


def test_streaming_is_decoding_at_once(pipe):
    latents = run(pipe, indices(5))
    z = pipe.vae.denormalize(latents / 0.5)
    with torch.no_grad():
        whole = pipe.vae.decode(z).sample
    for chunk in (1, 2, 5):
        parts = list(pipe.stream(latents, chunk))
        assert len(parts) == -(-5 // chunk)
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-5)
    pixels = run(pipe, indices(5), output_type="pt")
    torch.testing.assert_close(pixels[0], (whole[0] / 2 + 0.5).clamp(0, 1).transpose(0, 1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        next(pipe.stream(latents, 0))


def test_frames_beyond_the_statistics_have_the_last_ones():
    """Published statistics are kept for each of 16 latent frames, and a decoded clip may be longer."""
    vae = tiny_video(latents_mean=[[0.0, 1.0]] * 16, latents_std=[[1.0, 3.0]] * 16)
    latents = torch.randn(1, 16, 4, 2, 2)
    with pytest.raises(ValueError, match="statistics are kept for 2 latent frames, got 4"):
        vae.denormalize(latents)
    expected = torch.cat([latents[:, :, :1], latents[:, :, 1:] * 3 + 1], 2)
    torch.testing.assert_close(vae.denormalize(latents, prolong=True), expected)


# ---- windows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "size", "overlap"), [(8, 8, 2), (9, 8, 2), (14, 8, 2), (31, 8, 2), (30, 8, 5), (7, 3, 1), (20, 5, 4)]
)
def test_windows_cover_a_clip(frames, size, overlap):
    windows = Windows(frames, size, overlap)
    starts, total = windows.starts, torch.zeros(frames)
    assert starts[0] == 0 and starts[-1] + size == frames
    assert all(1 <= b - a <= size - overlap for a, b in zip(starts[:-1], starts[1:], strict=True))
    for start, weight in zip(starts, windows.weights, strict=True):
        assert weight.min() >= 0 and (start == 0 or weight[0] == 0)
        total[start : start + size] += weight
    torch.testing.assert_close(total, torch.ones(frames))


def test_windows_change_nothing_for_a_network_of_single_frames():
    states = torch.randn(2, 3, 11, 2, 2)
    condition, mask = torch.randn(2, 1, 11, 1, 1), torch.randn(1, 1, 4, 4)

    def network(states, given):
        assert given["mask"] is mask
        return states * given["condition"]

    out = Windows(11, 4, 2).evaluate(network, states, dict(condition=condition, mask=mask))
    torch.testing.assert_close(out, states * condition)


TOLD, UNTOLD = 0.3, 0.5


def ideal_network(scheduler):
    """The best estimate for clips whose every position has a value that the codes tell, one that nobody tells and that stays the
    same for the whole clip, and one that is new in each frame: what a network can know that sees a window alone."""
    constant, fresh = 0.9 * UNTOLD**2, 0.1 * UNTOLD**2

    def forward(states, timestep, text, *, fps, condition):
        sigma = (4 * timestep.double()).exp()
        c_skip, c_out, c_in, _ = scheduler.preconditioning(sigma)
        noisy = states.double() / c_in
        told = (condition.double() / 500 - 1) * TOLD
        told = told.repeat_interleave(2, 3).repeat_interleave(2, 4)
        rest = noisy - told
        share = constant / (constant + (fresh + sigma**2) / states.shape[2])
        common = share * rest.mean(2, keepdim=True)
        estimate = told + common + fresh / (fresh + sigma**2) * (rest - common)
        return SimpleNamespace(sample=((estimate - c_skip * noisy) / c_out).float())

    return forward


def jumps(frames):
    """Root mean square change from frame to frame, [T - 1], of [1, C, T, H, W]."""
    return frames.diff(dim=2).square().mean((0, 1, 3, 4)).sqrt()


def test_no_jitter_beyond_a_window(monkeypatch):
    """The seam, the largest change from frame to frame over the usual one. Windows one by one jump to another clip each time; those
    that are denoised together make one clip, and the more they overlap the less is to be seen."""
    pipe = diffusion_decoder(window_latent_frames=8, num_inference_steps=15, guidance_scale=0)
    monkeypatch.setattr(pipe.transformer, "forward", ideal_network(pipe.scheduler))
    codes = torch.randint(0, 1000, (1, 1, 16, 16)).expand(-1, 32, -1, -1)

    def seam(latents):
        return float(jumps(latents).max() / jumps(latents).median())

    alone = torch.cat([run(pipe, codes[:, :8], generator=g) for g in seeds(1, 2, 3, 4)], 2)
    default, two = run(pipe, codes), run(pipe, codes, overlap_latent_frames=2)
    assert seam(alone) > 3 and 1.3 < seam(two) < 1.7 and seam(default) < 1.15
    # the usual change is that of one window, not of a clip that was smoothed away
    assert jumps(default).median() > 0.95 * jumps(run(pipe, codes[:, :8])).median()


# ---- parts, folders, errors ----------------------------------------------------------------------------------------------


def test_save_load_and_preflight(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    assert "stored_prompt: CosmosStoredPrompt" in str(preflight(tmp_path, record=True))
    again = CosmosDiffusionDecoderPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert {n: again.config[n] for n in pipe.config if n[0] != "_"} == {
        n: v for n, v in pipe.config.items() if n[0] != "_"
    }
    torch.testing.assert_close(run(again, indices(5)), run(pipe, indices(5)), atol=1e-5, rtol=1e-5)
    assert "xpected types" not in caplog.text and "type annotation" not in caplog.text
    again.vae.register_to_config(latents_mean=None, latents_std=None)
    with pytest.raises(PreflightError, match="vae has no latents_mean"):
        preflight(again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(fsq_levels=(8, 8, 5, 5)), r"are 1600 codes, the transformer knows 1000 \(condition_vocab_size\)"),
        (dict(code_temporal_compression=2), "temporal compression of 2, the latents of 4"),
        (dict(code_spatial_compression=12), "spatial compression of 12, the latents of 8"),
        (dict(window_latent_frames=1), "window_latent_frames must be between 2 and the transformer's 16"),
        (dict(window_latent_frames=17), "must be between 2 and the transformer's 16"),
        (dict(overlap_latent_frames=3), "less than the window of 3, got 3"),
        (dict(stored_prompt=CosmosStoredPrompt(4, 16)), "stored_prompt is 16 wide, the transformer takes 32"),
        (dict(stored_prompt=CosmosStoredPrompt(4, 32), takes_text=False), "trained with texts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        diffusion_decoder(**changes)


def test_parts_that_do_not_fit_are_refused(pipe):
    for preset in ("tiny", "tiny-video2world"):
        with pytest.raises(ValueError, match="takes token ids .* this one takes (none|condition_mask)"):
            diffusion_decoder(transformer=CosmosWorldTransformer3D(**PRESETS[preset]))
    discrete = tiny_video(quantizer="fsq", latent_channels=6)
    with pytest.raises(ValueError, match="vae is a discrete tokenizer"):
        diffusion_decoder(vae=discrete)
    with pytest.raises(ValueError, match="vae has 8 latent channels, the transformer 16"):
        diffusion_decoder(vae=tiny_video(latent_channels=8))
    # for which tokenizer's codes it is
    for changes, message in (
        (dict(), "codes with spatial_compression=16, the discrete tokenizer has 8"),
        (dict(spatial_compression=16, temporal_compression=8), "temporal_compression=4, the discrete tokenizer has 8"),
        (
            dict(spatial_compression=16, fsq_levels=(5, 8, 5, 5)),
            r"fsq_levels=\(8, 5, 5, 5\), the discrete tokenizer has \(5,",
        ),
    ):
        settings = dict(quantizer="fsq", fsq_levels=LEVELS, latent_channels=4) | changes
        with pytest.raises(ValueError, match=message):
            pipe.check_tokenizer(tiny_video(**settings))
    with pytest.raises(ValueError, match="the tokenizer is continuous"):
        pipe.check_tokenizer(pipe.vae)
    pipe.check_tokenizer(tiny_video(quantizer="fsq", fsq_levels=LEVELS, latent_channels=4, spatial_compression=16))


@pytest.mark.parametrize(
    ("codes", "arguments", "message"),
    [
        (indices() + 900, {}, r"indices must lie in 0..999, got .* not of a tokenizer with fsq_levels"),
        (indices()[0], {}, r"indices must be \[B, T', H', W'\]"),
        (indices()[:, :0], {}, "and not empty"),
        (torch.rand(1, 5, 3, 2, 2), {}, r"codes must be \[B, 4, T', H', W'\]"),
        (torch.rand(1, 4, 3, 2, 2), {}, "these are no codes of levels"),
        (indices(height=30), {}, "cannot make a height of 480 pixels .* at most 48"),
        (indices(), dict(overlap_latent_frames=3), "less than the window of 3, got 3"),
        (indices(), dict(overlap_latent_frames=0), "at least 1"),
        (indices(), dict(guidance_scale=-1), "guidance_scale must be >= 0"),
        (indices(), dict(output_type="gif"), "output_type must be one of"),
        (indices(), dict(latents=torch.zeros(1, 16, 2, 4, 8)), r"unit noise of shape \(1, 16, 3, 4, 8\)"),
        (indices(), dict(prompt_embeds=torch.zeros(1, 4, 9)), r"must be \[1 or 1, tokens, 32\]"),
        (indices(), dict(generator=seeds(1, 2)), "2 generators for 1 videos"),
        (indices(), dict(sampling=dict(solver="ddim")), "solver must be one of"),
    ],
)
def test_bad_calls_are_refused(pipe, codes, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, codes, **arguments)


def test_a_grid_that_the_patches_do_not_divide_is_refused():
    pipe = diffusion_decoder(code_spatial_compression=8)
    with pytest.raises(ValueError, match="cannot make a height of 24 pixels .* multiple of 2"):
        run(pipe, indices(height=3))


def test_a_decoder_without_texts_refuses_one():
    pipe = diffusion_decoder(takes_text=False)
    assert run(pipe, indices()).shape == (1, 16, 3, 4, 8)
    with pytest.raises(ValueError, match="trained without texts"):
        run(pipe, indices(), prompt_embeds=torch.zeros(1, 4, 32))


def test_a_stored_prompt_ends_where_its_text_does(tmp_path):
    embeds, mask = torch.randn(1, 6, 8), torch.tensor([[1, 1, 1, 0, 0, 0]])
    prompt = CosmosStoredPrompt.of(embeds, mask, text="high quality")
    assert torch.equal(prompt.embeds[:3], embeds[0, :3]) and prompt.embeds[3:].abs().max() == 0
    prompt.save_pretrained(tmp_path)
    again = CosmosStoredPrompt.from_pretrained(tmp_path)
    assert torch.equal(again.embeds, prompt.embeds) and again.config.text == "high quality"
    for bad, message in (((embeds.log(),), "must be finite"), ((embeds[0, 0],), r"\[tokens, width\]")):
        with pytest.raises(ValueError, match=message):
            CosmosStoredPrompt.of(*bad)
    with pytest.raises(ValueError, match="the mask of 6 tokens"):
        CosmosStoredPrompt.of(embeds, mask[:, :4])
