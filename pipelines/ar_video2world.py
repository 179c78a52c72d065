"""Continue an image or a video with an autoregressive model.

    python pipelines/ar_video2world.py --input robot.mp4
    python pipelines/ar_video2world.py --model cosmos-5b --input robot.mp4 --prompt "A robot arm picks up the red cube."
    python pipelines/ar_video2world.py --input robot.mp4 --adapter runs/nano_ar_action/export --actions plan.csv

The bundled nano model, which is the default, takes no prompt. The input is treated as in `video2world.py`. Videos longer than the
model's grid are made by sliding windows over the codes. A model that has a diffusion decoder decodes with it.
"""

import argparse

import torch

from cosmos_hf import CosmosAutoregressivePipeline, nano_path
from cosmos_hf.pipelines.scripting import (
    add_batch_argument,
    add_placing_arguments,
    file_checksum,
    input_argument,
    load_pipeline,
    report,
    run_batch,
    save_result,
)
from cosmos_hf.pipelines.steering import add_steering_arguments, steering_arguments, steering_record

INTEGERS = ("height", "width", "num_frames", "num_conditioning_frames", "overlap_latent_frames")
NUMBERS = ("fps", "temperature", "top_p")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=nano_path("autoregressive"), help="folder or Hub id of a pipeline")
    parser.add_argument("--input", help="image or video file")
    parser.add_argument("--prompt")
    parser.add_argument("--output", default="outputs/world.mp4", help="the mp4; with --batch a folder")
    for name in INTEGERS + NUMBERS:
        parser.add_argument(f"--{name}", type=int if name in INTEGERS else float, help="default: the model's")
    parser.add_argument("--draft", choices=("heads", "previous_frame"), help="guess several codes for each pass")
    parser.add_argument("--no_diffusion_decoder", action="store_true", help="let the tokenizer decode")
    parser.add_argument("--decoder_steps", type=int, help="steps of the diffusion decoder; default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    add_steering_arguments(parser, camera=False)
    add_placing_arguments(parser)
    add_batch_argument(parser)
    args = parser.parse_args(argv)
    with report(parser):
        if not args.input and not args.batch:
            raise ValueError("--input is needed")
        pipe = load_pipeline(CosmosAutoregressivePipeline, args)

        def make(args):
            if not args.input:
                raise ValueError("input is missing")
            result = pipe(
                **input_argument(args.input),
                prompt=args.prompt,
                draft=args.draft,
                **{name: getattr(args, name) for name in INTEGERS + NUMBERS},
                use_diffusion_decoder=False if args.no_diffusion_decoder else None,
                decoder_options=None if args.decoder_steps is None else dict(num_inference_steps=args.decoder_steps),
                generator=torch.Generator().manual_seed(args.seed),
                output_type="pt",
                **steering_arguments(args, pipe),
            )
            extra = dict(script="ar_video2world", input=args.input, input_sha256=file_checksum(args.input))
            save_result(args, pipe, result, **extra, **steering_record(args))

        run_batch(parser, args, make)


if __name__ == "__main__":
    main()
