"""What long worlds lose, by what a chunk is given of the one before it.

    python benchmarks/rollout.py --data datasets/tabletop/val_iid

The bundled nano model continues clips for several windows. Per way of handing over (`history`, overlap in latent frames, noise
on the history): sharpness as a share of the first chunk's, colour shift and seam, means over clips and over the chunks after
the first, and PSNR as long as the truth lasts. Prints the table and writes benchmarks/results/rollout.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from sampler import machine

from cosmos_hf import CosmosVideo2WorldPipeline, nano_path, rollout
from cosmos_hf.data.clips import ClipDataset

WAYS = [("latents", 1, 0.001), ("latents", 2, 0.001), ("pixels", 2, 0.001), ("latents", 2, 0.1), ("latents", 3, 0.001)]
FIGURES = ("sharpness_ratio", "colour_shift", "seam", "psnr")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=nano_path("video2world"))
    parser.add_argument("--data", required=True, help="folder of held-out clips")
    parser.add_argument("--num_clips", type=int, default=3)
    parser.add_argument("--num_frames", type=int, default=65)
    parser.add_argument("--num_inference_steps", type=int, default=8)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "rollout.json"))
    args = parser.parse_args(argv)
    started = time.perf_counter()
    pipe = CosmosVideo2WorldPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    clips = ClipDataset(args.data, num_frames=None, random=False)
    samples = [clips[i] for i in range(0, len(clips), max(1, len(clips) // args.num_clips))][: args.num_clips]
    result = {"made_by": machine("rollout", argv), "ways": {}}
    print(f"{'history, overlap, noise':28}" + "".join(f"{name:>17}" for name in FIGURES))
    for history, overlap, noise in WAYS:
        curves = [roll(pipe, sample, args, history, overlap, noise) for sample in samples]
        later = [entry for curve in curves for entry in curve[1:]]
        mean = {}
        for name in FIGURES:
            values = [entry[name] for entry in later if name in entry]
            mean[name] = sum(values) / len(values)
        mean["last_sharpness_ratio"] = sum(curve[-1]["sharpness_ratio"] for curve in curves) / len(curves)
        result["ways"][f"{history}, {overlap}, {noise}"] = mean
        print(
            f"{history}, {overlap}, {noise:<14}".ljust(28) + "".join(f"{mean[name]:17.3f}" for name in FIGURES),
            flush=True,
        )
    result["made_by"]["seconds"] = round(time.perf_counter() - started)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=1))
    print(args.output)


def roll(pipe, sample: dict, args, history: str, overlap: int, noise: float) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        return rollout(
            pipe,
            Path(folder) / "world.mp4",
            args.num_frames,
            video=sample["video"][:, :9],
            prompt=sample["caption"],
            overlap=overlap,
            history=history,
            history_noise=noise,
            truth=sample["video"],
            num_inference_steps=args.num_inference_steps,
        ).drift


if __name__ == "__main__":
    main()
