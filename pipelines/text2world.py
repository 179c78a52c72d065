"""Generate a video from a description.

python pipelines/text2world.py --prompt "A robot arm pushes the blue ball to the left." --output world.mp4
"""

import argparse

import torch

from cosmos_hf import CosmosText2WorldPipeline, nano_path
from cosmos_hf.pipelines.scripting import add_generation_arguments, call_arguments, report, save_result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generation_arguments(parser, model=nano_path("video2world"))
    args = parser.parse_args(argv)
    with report(parser):
        if not args.prompt:
            raise ValueError("--prompt is needed")
        pipe = CosmosText2WorldPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(
            args.device
        )
        result = pipe(**call_arguments(args))
        save_result(args, pipe, result)


if __name__ == "__main__":
    main()
