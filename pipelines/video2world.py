"""Continue an image or a video.

    python pipelines/video2world.py --input robot.mp4 --prompt "A robot arm picks up the red cube." --output future.mp4

The input is any file that PyAV or Pillow reads: a video is resampled to the model's frame rate by time stamps, resized until
the model's size is covered and cropped to its centre, and its last frames are continued. The mp4 carries the settings.
"""

import argparse

import torch

from cosmos_hf import CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.data.video import IMAGE_SUFFIXES
from cosmos_hf.pipelines.scripting import add_generation_arguments, call_arguments, report, save_result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="image or video file")
    parser.add_argument("--num_conditioning_frames", type=int, help="1 + k * the tokenizer's temporal factor")
    add_generation_arguments(parser, model=nano_path("video2world"))
    args = parser.parse_args(argv)
    with report(parser):
        pipe = CosmosVideo2WorldPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(
            args.device
        )
        kind = "image" if args.input.lower().endswith(tuple(IMAGE_SUFFIXES)) else "video"
        result = pipe(
            **{kind: args.input},
            num_conditioning_frames=args.num_conditioning_frames,
            **call_arguments(args),
        )
        save_result(args, pipe, result, input=args.input)


if __name__ == "__main__":
    main()
