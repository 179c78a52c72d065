"""What approximations cost and save: feature caches and weights stored in float8, on the bundled nano model.

    python benchmarks/shortcuts.py

Every way makes the same clips from the same noise as a plain run, which is timed just before it: the ratio of the times (sampling
only), the share of block evaluations that were computed, and the PSNR of the generated frames to the plain run's. "fewer steps" is
what the same time buys without a cache. Prints the table and writes benchmarks/results/shortcuts.json.
"""

import argparse
import statistics

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from measuring import keep, machine, seconds, show

from cosmos_hf import CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.evaluation.metrics import psnr

PROMPTS = (
    "A robot arm picks up the yellow ball.",
    "A robot arm pushes the red cube to the left.",
    "The robot arm stays still.",
)


def ways(steps: int) -> dict:
    taylor = dict(disable_cache_before_step=4, taylor_factors_dtype=torch.float32)
    return {
        **{f"first block, threshold {t}": FirstBlockCacheConfig(threshold=t) for t in (0.05, 0.1, 0.2)},
        **{f"TaylorSeer, every {n}": TaylorSeerCacheConfig(cache_interval=n, **taylor) for n in (2, 3)},
        "TaylorSeer lite, every 2": TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True, **taylor),
        **{f"fewer steps, {n}": n for n in (steps * 3 // 4, steps // 2)},
        "float8 storage": "float8",
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=nano_path("video2world"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="one prompt and one noise for each, at most 3")
    args = parser.parse_args(argv)
    rows = [measure(args, name, way) for name, way in ways(args.steps).items()]
    show(rows)
    print(keep("shortcuts", dict(made_by=machine(argv), steps=args.steps, seeds=args.seeds, ways=rows)))


def measure(args, name: str, way) -> dict:
    plain, pipe = load(args.model), load(args.model)
    steps = way if isinstance(way, int) else args.steps
    if way == "float8":
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    elif not isinstance(way, int):
        pipe.transformer.enable_cache(way)
    computed = [0]
    for block in pipe.transformer.transformer_blocks:
        block.ff.net[2].register_forward_hook(lambda *_: computed.__setitem__(0, computed[0] + 1))
    sample(plain, args, 1, 0), sample(pipe, args, 1, 0)  # warm
    computed[0], ratios, likeness = 0, [], []
    for seed in range(args.seeds):
        expected, theirs = timed(lambda seed=seed: sample(plain, args, args.steps, seed))
        latents, ours = timed(lambda seed=seed: sample(pipe, args, steps, seed))
        ratios.append(theirs / ours)
        likeness.append(psnr(*(decode(plain, x) for x in (latents, expected)))[:, 1:].mean().item())
    full = args.seeds * args.steps * len(pipe.transformer.transformer_blocks)
    return dict(
        way=name,
        speed=statistics.median(ratios),
        computed=computed[0] / full,
        psnr=statistics.mean(likeness),
        worst=min(likeness),
    )


def load(model) -> CosmosVideo2WorldPipeline:
    pipe = CosmosVideo2WorldPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, args, steps: int, seed: int) -> torch.Tensor:
    return pipe(
        video=f"{args.model}/example.mp4",
        num_conditioning_frames=1,
        prompt=PROMPTS[seed],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames


@torch.no_grad()
def decode(pipe, latents: torch.Tensor) -> torch.Tensor:
    return pipe.vae.decode(pipe.vae.denormalize(latents / pipe.scheduler.config.sigma_data)).sample.clamp(-1, 1)


def timed(call):
    result = []
    spent = seconds(lambda: result.append(call()))
    return result[0], spent


if __name__ == "__main__":
    main()
