"""Caches of diffusers on the diffusion transformer: off by default, exact where nothing is skipped, kept apart by branch."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from parallel_problem import build
from tiny_pipelines import SETTINGS, components

STEPS = 8


def caches():
    return {
        "first block": FirstBlockCacheConfig(threshold=10.0),
        "taylor": TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
        ),
        "taylor lite": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, use_lite_mode=True),
        "magnitudes": MagCacheConfig(threshold=1.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    }


@pytest.fixture
def pipe():
    from cosmos_hf import CosmosText2WorldPipeline

    pipe = CosmosText2WorldPipeline(**components("tiny"), **SETTINGS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt="a robot arm picks up the red cube", **given):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="latent", **given).frames


def count_calls(pipe) -> list[int]:
    """Calls of the last block's MLP, up to now."""
    calls = [0]
    original = pipe.transformer.transformer_blocks[-1].ff.net[2].register_forward_hook
    original(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("name", caches())
def test_a_cache_skips_work_and_comes_off_without_a_trace(pipe, name):
    calls = count_calls(pipe)
    expected, evaluations = generate(pipe), calls[0]
    pipe.transformer.enable_cache(caches()[name])
    assert pipe.transformer.can_prepare_text
    first, skipped = generate(pipe), calls[0] - evaluations
    assert 0 < skipped < evaluations
    assert (first - expected).abs().max() > 0 and torch.isfinite(first).all()
    other = generate(pipe, "red")
    torch.testing.assert_close(generate(pipe), first, atol=0, rtol=0)  # nothing is left over from another generation
    assert not torch.equal(other, first)
    pipe.transformer.disable_cache()
    torch.testing.assert_close(generate(pipe), expected, atol=0, rtol=0)


def test_a_cache_that_never_hits_changes_nothing(pipe):
    expected = generate(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    torch.testing.assert_close(generate(pipe), expected, atol=0, rtol=0)


def test_branches_of_guidance_do_not_mix(pipe):
    """One after the other, or both in one batch whose decisions are then common: the same where all decisions are."""
    pipe.transformer.enable_cache(caches()["magnitudes"])
    apart = generate(pipe)
    torch.testing.assert_close(generate(pipe, sampling=dict(batch_guidance=True)), apart, atol=1e-4, rtol=1e-4)


def test_an_interrupted_generation_leaves_nothing_behind(pipe):
    pipe.transformer.enable_cache(caches()["first block"])
    expected = generate(pipe)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, "red", callback_on_step_end=stop)
    torch.testing.assert_close(generate(pipe), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "config, message",
    [
        (FasterCacheConfig(), "FasterCacheConfig is not offered: it would mix the two branches of guidance"),
        (PyramidAttentionBroadcastConfig(), "Use FirstBlockCacheConfig, TaylorSeerCacheConfig, MagCacheConfig"),
        (
            TaylorSeerCacheConfig(cache_identifiers=["blocks.*attn"]),
            "'blocks.*attn' is the name of no module of this model",
        ),
    ],
)
def test_what_would_be_wrong_or_without_effect_is_refused(config, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        build().enable_cache(config)
