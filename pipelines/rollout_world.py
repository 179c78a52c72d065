"""Continue an image, a video or a description for as long as you like, chunk after chunk.

    python pipelines/rollout_world.py --input robot.mp4 --prompt "A robot arm picks up the red cube." --num_frames 81

    python pipelines/rollout_world.py --input robot.mp4 --adapter runs/nano_action/export --actions plan.npz --lerobot rollouts

Cut and started again with the same arguments, it goes on where it was. Beside the mp4, a JSON file tells how the picture drifts.
See docs/sampling.md.
"""

import argparse
import json
from pathlib import Path

from cosmos_hf import CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.data.video import read_video
from cosmos_hf.pipelines.rollout import HISTORIES, rollout
from cosmos_hf.pipelines.scripting import (
    SAMPLING,
    add_generation_arguments,
    file_checksum,
    input_argument,
    load_pipeline,
    provenance,
    report,
)
from cosmos_hf.pipelines.steering import (
    add_steering_arguments,
    open_writer,
    steering_arguments,
    steering_record,
    write_episode,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="image or video file to continue; without it the world begins with the prompt")
    parser.add_argument("--num_conditioning_frames", type=int, help="1 + k * the tokenizer's temporal factor")
    parser.add_argument("--then", nargs="+", default=[], help="prompts of the second chunk, the third, ...")
    parser.add_argument("--num_frames_per_chunk", type=int, help="default: the model's")
    parser.add_argument("--overlap", type=int, default=2, help="latent frames that a chunk is given of the one before")
    parser.add_argument("--history", choices=HISTORIES, default="latents")
    parser.add_argument("--history_noise", type=float, default=0.001)
    parser.add_argument("--truth", help="video whose first frame is the result's, to measure the distance to")
    parser.add_argument(
        "--keep_chunks", action="store_true", help="so that a later run with more frames only adds to it"
    )
    parser.add_argument(
        "--lerobot", help="new folder: the rollout and its actions as a LeRobot data set of one episode"
    )
    add_steering_arguments(parser)
    add_generation_arguments(parser, model=nano_path("video2world"))
    parser.set_defaults(num_frames=81)
    args = parser.parse_args(argv)
    with report(parser):
        for name in ("resolution", "upsampler", "preview"):
            if getattr(args, name):
                raise ValueError(f"--{name} is not for long worlds")
        pipe = load_pipeline(CosmosVideo2WorldPipeline, args)
        source, metadata = {}, provenance(args, pipe) | dict(script="rollout_world") | steering_record(args)
        steering = steering_arguments(args, pipe)
        writer = open_writer(args.lerobot, pipe, args.fps, "actions" in steering) if args.lerobot else None
        if args.input:
            source |= input_argument(args.input)
            metadata["input_sha256"] = file_checksum(args.input)
        names = ("height", "width", "num_frames_per_chunk", "fps", "num_inference_steps", "guidance_scale", "overlap")
        names += (
            "history",
            "history_noise",
            "seed",
            "truth",
            "keep_chunks",
            "negative_prompt",
            "num_conditioning_frames",
        )
        result = rollout(
            pipe,
            args.output,
            args.num_frames,
            **source,
            prompt=[args.prompt, *args.then] if args.prompt else None,
            sampling={name: getattr(args, name) for name in SAMPLING if getattr(args, name)},
            metadata=metadata,
            **{name: getattr(args, name) for name in names},
            **steering,
        )
        if writer is not None:
            task = " ".join([args.prompt, *args.then]) if args.prompt else ""
            print(f"{write_episode(writer, result.path, steering.get('actions'), task)}: a LeRobot data set")
        curve = Path(args.output).with_suffix(".drift.json")
        curve.write_text(json.dumps(result.drift, indent=1))
    shape = read_video(result.path, num_frames=1).frames.shape
    print(
        f"{result.path}: {result.num_frames} frames of {shape[2]}x{shape[3]} at {result.fps:g} fps; drift in {curve}"
    )


if __name__ == "__main__":
    main()
