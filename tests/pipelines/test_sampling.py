"""Options of a sampling run: guidance batched, within an interval, rescaled; solvers and noise levels from the call."""

import pytest
import torch

from cosmos_hf.pipelines.sampling import Sampling, guided

PROMPT = "A robot arm picks up the red cube."


def clip(frames, height=32, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def run(pipe, prompt=PROMPT, seeds=(1,), **sampling):
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = dict(guidance_scale=2.0, num_inference_steps=3, output_type="latent")
    return pipe(prompt=prompt, video=clip(5), generator=generator, sampling=sampling, **options).frames


def test_batched_guidance_is_sequential_guidance(video2world):
    """Also for a batch of prompts: the two branches of every item keep together."""
    for prompt, seeds in ((PROMPT, (1,)), ([PROMPT, "A blue ball."], (1, 2))):
        calls = []
        hook = video2world.transformer.register_forward_hook(
            lambda m, args, out, calls=calls: calls.append(len(args[0]))
        )
        one_by_one = run(video2world, prompt, seeds)
        assert calls == [len(seeds)] * 6
        calls.clear()
        together = run(video2world, prompt, seeds, batch_guidance=True)
        hook.remove()
        assert calls == [2 * len(seeds)] * 3
        torch.testing.assert_close(one_by_one, together, atol=2e-4, rtol=0)


def test_interval_guides_within_and_saves_outside(video2world):
    calls = []
    hook = video2world.transformer.register_forward_hook(lambda m, args, out: calls.append(1))
    everywhere = run(video2world, guidance_interval=(0.0, 100.0))
    assert len(calls) == 6 and torch.equal(everywhere, run(video2world))
    calls.clear()
    nowhere = run(video2world, guidance_interval=(200.0, 300.0))
    hook.remove()
    assert len(calls) == 3
    unguided = video2world(
        prompt=PROMPT,
        video=clip(5),
        generator=torch.Generator().manual_seed(1),
        guidance_scale=0,
        num_inference_steps=3,
        output_type="latent",
    ).frames
    torch.testing.assert_close(nowhere, unguided)
    within = run(video2world, guidance_interval=(0.01, 10.0))
    assert (within - everywhere).abs().max() > 1e-3 and (within - nowhere).abs().max() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rescaling_brings_the_spread_back(share):
    """Of the generated frames alone: the given ones, whose output nobody reads, count for nothing."""
    with_text, without = torch.randn(2, 2, 16, 3, 4, 4)
    with_text[:, :, 0] *= 50
    generated = torch.tensor([False, True, True]).view(1, 1, 3, 1, 1)
    outputs = {"text": with_text, "negative": without}
    scale, sampling = 6.0, Sampling(guidance_rescale=share)
    result = guided(
        lambda x, noise, texts, kept: outputs[texts[0]],
        None,
        torch.tensor(0.0),
        "text",
        "negative",
        scale,
        sampling,
        generated,
    )
    plain = with_text + scale * (with_text - without)
    spread = lambda x: x[:, :, 1:].flatten(1).std(1, correction=0)  # noqa: E731
    expected = share * spread(with_text) + (1 - share) * spread(plain)
    torch.testing.assert_close(spread(result), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options", [dict(solver="euler"), dict(solver="res_2ab"), dict(grid="karras"), dict(guidance_rescale=0.7)]
)
def test_options_reach_the_sampler(video2world, options):
    assert (run(video2world, **options) - run(video2world)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (dict(solvers="euler"), "sampling has no option solvers; there is solver, grid, guidance_interval"),
        (dict(solver="ddim"), "solver must be one of unipc, res_2ab, euler, got 'ddim'"),
        (dict(grid="linear"), "grid must be one of karras, angle, got 'linear'"),
        (dict(guidance_interval=(5.0, 1.0)), "guidance_interval must be \\(low, high\\)"),
        (dict(guidance_rescale=2.0), "guidance_rescale must be between 0 and 1, got 2.0"),
    ],
)
def test_unknown_options_are_refused(video2world, sampling, message):
    with pytest.raises(ValueError, match=message):
        run(video2world, **sampling)


def test_keys_and_values_of_texts_are_computed_once(video2world, monkeypatch):
    """For each branch; not where a hook brings the blocks' weights, and then with the same result."""
    block, calls = video2world.transformer.transformer_blocks[0], []
    handle = block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for batched, hooked, expected in ((False, False, 2), (True, False, 1), (False, True, 6)):
        if hooked:
            monkeypatch.setattr(block, "_hf_hook", object(), raising=False)  # as accelerate marks it
        calls.clear()
        results.append(run(video2world, batch_guidance=batched))
        assert len(calls) == expected
    handle.remove()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-4)
    assert torch.equal(results[2], results[0])
