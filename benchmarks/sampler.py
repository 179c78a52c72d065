"""Solvers and noise levels against each other: error by number of network evaluations.

    python benchmarks/sampler.py --data datasets/tabletop/val_iid

1. Two toy problems with closed-form denoisers and exact solutions: root mean square error of the samples.
2. The bundled nano model: distance of its latents to those of a converged run from the same noise (root mean square over the
   generated frames; their own spread is given), and PSNR of the video to what really happened.
3. Guidance: scales, rescaling, interval; both branches one after the other and in one batch.

Prints the tables and writes benchmarks/results/sampler.json with machine, versions and command.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from cosmos_hf import CosmosEDMScheduler, CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.video import read_metadata, read_video, to_float
from cosmos_hf.evaluation.metrics import psnr

ROOT = Path(__file__).parents[1]
METHODS = {
    "euler, karras (published)": ("euler", "karras"),
    "res_2ab, karras (published)": ("res_2ab", "karras"),
    "unipc, karras": ("unipc", "karras"),
    "res_2ab, angle": ("res_2ab", "angle"),
    "unipc, angle (default)": ("unipc", "angle"),
}
GUIDANCE = {
    "scale 0": (0, {}),
    "scale 1": (1, {}),
    "scale 3": (3, {}),
    "scale 7": (7, {}),
    "scale 7, rescale 0.7": (7, dict(guidance_rescale=0.7)),
    "scale 7, interval 0.2 to 5": (7, dict(guidance_interval=(0.2, 5.0))),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=nano_path("video2world"))
    parser.add_argument("--data", help="folder of held-out clips; default: the model's one example")
    parser.add_argument("--num_clips", type=int, default=2)
    parser.add_argument("--conditioning_frames", type=int, default=1)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 8, 12, 18, 36])
    parser.add_argument("--converged_steps", type=int, default=100)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "sampler.json"))
    args = parser.parse_args(argv)
    started = time.perf_counter()
    result = {
        "made_by": machine("sampler", argv),
        "toy": {name: toy_table(name, args.evaluations) for name in ("lin", "gm")},
    }
    for name, table in result["toy"].items():
        show(f"toy problem {name}: rms error to the exact solution", table)
    model = Nano(args)
    result["nano"] = model.solver_table(args.evaluations, args.converged_steps)
    show(
        f"nano model: distance to the converged latents (spread {result['nano']['spread']:.3f})",
        result["nano"]["distance"],
    )
    show("nano model: PSNR to what happened, dB", result["nano"]["psnr"])
    result["guidance"] = model.guidance_table()
    for name, entry in result["guidance"].items():
        print(f"{name:32} {json.dumps(entry)}")
    result["made_by"]["seconds"] = round(time.perf_counter() - started)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=1))
    print(args.output)


def machine(script: str, argv) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return dict(
        command=f"python benchmarks/{script}.py " + " ".join(argv if argv is not None else sys.argv[1:]),
        processor=f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("cosmos-hf", "torch", "diffusers")}
        | {"python": platform.python_version()},
    )


def show(title: str, table: dict):
    counts = list(next(iter(table.values())))
    print(f"\n{title}\n{'network evaluations':32}" + "".join(f"{count:>9}" for count in counts))
    for name, row in table.items():
        print(f"{name:32}" + "".join(f"{value:9.4f}" if value < 10 else f"{value:9.2f}" for value in row.values()))


# ---- toy problems --------------------------------------------------------------------------------------------------


def toy_table(name: str, evaluations: list[int]) -> dict:
    tensors = load_file(ROOT / "tests" / "golden" / "diffusion" / "sampler_toy.safetensors")
    denoise, exact, start = (
        toy_denoiser(name, tensors),
        tensors[f"outputs.exact.{name}"],
        80 * tensors["inputs.unit_noise"],
    )
    table = {"heun, karras": {n: rms(heun(denoise, start, n), exact) for n in evaluations}}
    for label, (solver, grid) in METHODS.items():
        table[label] = {}
        for n in evaluations:
            scheduler, x = CosmosEDMScheduler(solver=solver, grid=grid), start
            scheduler.set_timesteps(n - (solver == "res_2ab"))
            for i, timestep in enumerate(scheduler.timesteps):
                x = scheduler.step(denoise(x, scheduler.sigmas[i]), timestep, x).prev_sample
            table[label][n] = rms(x, exact)
    return table


def toy_denoiser(name: str, tensors: dict):
    """The exact denoiser of a Gaussian ("lin") or of a mixture of three ("gm")."""
    toy = {key.split(".")[-1]: value for key, value in tensors.items() if key.startswith(f"toy.{name}.")}
    if name == "lin":
        return lambda x, sigma: toy["mu"] + toy["var"] / (toy["var"] + sigma**2) * (x - toy["mu"])

    def mixture(x, sigma):
        var = toy["std"] ** 2
        total = var + sigma**2
        difference = x[:, None] - toy["mu"]
        log_density = toy["weight"].log() - 0.5 * (difference.square().sum(-1) / total + x.shape[-1] * total.log())
        share = log_density.softmax(-1)[..., None]
        return (share * (var[:, None] * x[:, None] + sigma**2 * toy["mu"]) / total[:, None]).sum(1)

    return mixture


def heun(denoise, x, evaluations: int):
    """The second-order method of EDM (arXiv 2206.00364, algorithm 1): two evaluations a step, one in the last."""
    scheduler = CosmosEDMScheduler(solver="euler")
    scheduler.set_timesteps((evaluations + 1) // 2)
    for sigma, target in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        slope = (x - denoise(x, sigma)) / sigma
        trial = x + (target - sigma) * slope
        x = trial if target == 0 else x + (target - sigma) * (slope + (trial - denoise(trial, target)) / target) / 2
    return x


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


# ---- the nano model ------------------------------------------------------------------------------------------------


class Nano:
    """The model, its clips and one noise for each."""

    def __init__(self, args):
        self.pipe = CosmosVideo2WorldPipeline.from_pretrained(args.model)
        self.pipe.set_progress_bar_config(disable=True)
        # Its own sigma_min is 1, which is better for it, but only the karras grid heeds that: to the usual end all solve the same.
        self.pipe.scheduler = CosmosEDMScheduler.from_config(
            self.pipe.scheduler.config, sigma_min=CosmosEDMScheduler().config.sigma_min
        )
        config = self.pipe.config
        if args.data:
            clips = ClipDataset(args.data, num_frames=config.num_frames, random=False)
            samples = [clips[i] for i in range(0, len(clips), max(1, len(clips) // args.num_clips))][: args.num_clips]
            self.truth, self.prompts = torch.stack([s["video"] for s in samples]), [s["caption"] for s in samples]
        else:
            example = Path(args.model) / "example.mp4"
            self.truth = read_video(example, num_frames=config.num_frames).frames[None]
            self.prompts = [read_metadata(example)["caption"]]
        self.count = args.conditioning_frames
        factor = self.pipe.vae.config.spatial_compression
        shape = (self.pipe.vae.latent_frames(config.num_frames), config.height // factor, config.width // factor)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(len(self.truth), self.pipe.vae.config.latent_channels, *shape, generator=generator)
        self.skip = self.pipe.vae.latent_frames(self.count)

    def sample(self, steps: int, scale: float | None = None, **sampling) -> torch.Tensor:
        return self.pipe(
            video=list(self.truth[:, :, : self.count]),
            prompt=self.prompts,
            num_conditioning_frames=self.count,
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=self.noise,
            output_type="latent",
            sampling=sampling,
        ).frames

    @torch.no_grad()
    def psnr(self, latents: torch.Tensor) -> float:
        """Of the generated frames, mean over frames and clips."""
        vae = self.pipe.vae
        latents = vae.denormalize(latents / self.pipe.scheduler.config.sigma_data)
        videos = torch.cat([vae.decode(item[None]).sample for item in latents])
        return psnr(videos, to_float(self.truth))[:, self.count :].mean().item()

    def solver_table(self, evaluations: list[int], converged_steps: int) -> dict:
        converged = self.sample(converged_steps, solver="res_2ab", grid="karras")
        other = self.sample(converged_steps, solver="unipc", grid="angle")
        generated = lambda latents: latents[:, :, self.skip :]  # noqa: E731
        table = dict(
            clips=len(self.truth),
            conditioning_frames=self.count,
            spread=generated(converged).std().item(),
            converged=f"res_2ab on the karras grid, {converged_steps} steps",
            unipc_with_as_many_steps_differs_by=rms(generated(other), generated(converged)),
            psnr_of_converged=self.psnr(converged),
            distance={},
            psnr={},
        )
        for label, (solver, grid) in METHODS.items():
            runs = {n: self.sample(n - (solver == "res_2ab"), solver=solver, grid=grid) for n in evaluations}
            table["distance"][label] = {n: rms(generated(run), generated(converged)) for n, run in runs.items()}
            table["psnr"][label] = {n: self.psnr(run) for n, run in runs.items()}
        return table

    def guidance_table(self, steps: int = 12) -> dict:
        """PSNR to what happened and the latents' spread, by guidance; the two ways to evaluate the branches."""
        table = {}
        for name, (scale, sampling) in GUIDANCE.items():
            latents = self.sample(steps, scale, **sampling)
            table[name] = dict(
                psnr=round(self.psnr(latents), 2), spread=round(latents[:, :, self.skip :].std().item(), 4)
            )
        seconds, results = {}, {}
        for name, batched in (("sequential", False), ("batched", True)):
            started = time.perf_counter()
            results[name] = self.sample(steps, 1, batch_guidance=batched)
            seconds[name] = round(time.perf_counter() - started, 2)
        difference = (results["sequential"] - results["batched"]).abs().max().item()
        table["branches"] = dict(seconds=seconds, largest_difference=difference)
        return table


if __name__ == "__main__":
    main()
