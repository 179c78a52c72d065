"""Continue an image or a video.

    python pipelines/video2world.py --input robot.mp4 --prompt "A robot arm picks up the red cube." --output future.mp4
    python pipelines/video2world.py --batch clips.jsonl --output outputs/futures
    python pipelines/video2world.py --input robot.mp4 --adapter runs/nano_action/export --actions plan.csv

The input is any file that PyAV or Pillow reads: a video is resampled to the model's frame rate by time stamps, resized until
the model's size is covered and cropped to its centre (--fit pad: kept whole), and its last frames are continued. The mp4
carries the settings; pipelines/reproduce.py makes it again.
"""

import argparse

from cosmos_hf import CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.data.video import FITS
from cosmos_hf.pipelines.prompt_upsampler import upsample_argument
from cosmos_hf.pipelines.scripting import (
    add_batch_argument,
    add_generation_arguments,
    call_arguments,
    file_checksum,
    input_argument,
    load_pipeline,
    preview_arguments,
    report,
    run_batch,
    save_result,
)
from cosmos_hf.pipelines.steering import add_steering_arguments, steering_arguments, steering_record


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="image or video file")
    parser.add_argument("--num_conditioning_frames", type=int, help="1 + k * the tokenizer's temporal factor")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how the input comes to the model's size")
    add_generation_arguments(parser, model=nano_path("video2world"))
    add_steering_arguments(parser)
    add_batch_argument(parser)
    args = parser.parse_args(argv)
    with report(parser):
        if not args.input and not args.batch:
            raise ValueError("--input is needed")
        pipe = load_pipeline(CosmosVideo2WorldPipeline, args)

        def make(args):
            if not args.input:
                raise ValueError("input is missing")
            prompts = upsample_argument(args, args.input)
            result = pipe(
                **input_argument(args.input),
                num_conditioning_frames=args.num_conditioning_frames,
                fit=args.fit,
                **call_arguments(args) | prompts.call | preview_arguments(args, pipe) | steering_arguments(args, pipe),
            )
            extra = dict(script="video2world", input=args.input, input_sha256=file_checksum(args.input))
            save_result(args, pipe, result, **extra, **prompts.metadata, **steering_record(args))

        run_batch(parser, args, make)


if __name__ == "__main__":
    main()
