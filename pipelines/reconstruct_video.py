"""Pass a video through the tokenizer and back, chunk by chunk from file to file, and report the quality.

    python pipelines/reconstruct_video.py --input phone.mp4 --output reconstructed.mp4

Frames are resized until the wanted size is covered and cropped to the centre (--height, --width; default: the input's size
cut to what the tokenizer can represent). The number of frames and the rate stay those of the input (or of --fps).
Memory is that of one chunk plus the keys and values of temporal attention, which grow with the length: reported at the end,
and bounded by --window, which is an approximation.
"""

import argparse
import json

import torch

from cosmos_hf import CosmosVideoTokenizer, nano_path
from cosmos_hf.pipelines.reconstruct import reconstruct_file
from cosmos_hf.pipelines.scripting import report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", default="outputs/reconstructed.mp4")
    parser.add_argument("--model", default=f"{nano_path('video2world')}/vae", help="folder of a video tokenizer")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--fps", type=float, help="resample to this rate")
    parser.add_argument("--chunk", type=int, default=16, help="frames at a time; fewer need less memory")
    parser.add_argument(
        "--window", type=int, help="latent frames that temporal attention looks back at; default: all, exact"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no_progress", action="store_true")
    args = parser.parse_args(argv)
    with report(parser):
        tokenizer = CosmosVideoTokenizer.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
        figures = reconstruct_file(
            tokenizer.to(args.device).eval(),
            args.input,
            args.output,
            height=args.height,
            width=args.width,
            fps=args.fps,
            chunk=args.chunk,
            window=args.window,
            progress=not args.no_progress,
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
