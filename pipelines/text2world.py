"""Generate a video from a description.

python pipelines/text2world.py --prompt "A robot arm pushes the blue ball to the left." --output world.mp4
python pipelines/text2world.py --batch prompts.jsonl --output outputs/worlds
"""

import argparse

from cosmos_hf import CosmosText2WorldPipeline, nano_path
from cosmos_hf.pipelines.prompt_upsampler import upsample_argument
from cosmos_hf.pipelines.scripting import (
    add_batch_argument,
    add_generation_arguments,
    call_arguments,
    load_pipeline,
    preview_arguments,
    report,
    run_batch,
    save_result,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generation_arguments(parser, model=nano_path("video2world"))
    add_batch_argument(parser)
    args = parser.parse_args(argv)
    with report(parser):
        if not args.prompt and not args.batch:
            raise ValueError("--prompt is needed")
        pipe = load_pipeline(CosmosText2WorldPipeline, args)

        def make(args):
            prompts = upsample_argument(args)
            result = pipe(**call_arguments(args) | prompts.call | preview_arguments(args, pipe))
            save_result(args, pipe, result, script="text2world", **prompts.metadata)

        run_batch(parser, args, make)


if __name__ == "__main__":
    main()
