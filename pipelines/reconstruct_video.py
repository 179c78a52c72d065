"""Pass a video through the tokenizer and back, in bounded memory whatever its length, and report the quality.

    python pipelines/reconstruct_video.py --input phone.mp4 --output reconstructed.mp4

Frames are resized until the wanted size is covered and cropped to the centre (--height, --width; default: the input's size
cut to what the tokenizer can represent). The number of frames and the rate stay those of the input (or of --fps).
"""

import argparse
import json

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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no_progress", action="store_true")
    args = parser.parse_args(argv)
    with report(parser):
        tokenizer = CosmosVideoTokenizer.from_pretrained(args.model).to(args.device).eval()
        figures = reconstruct_file(
            tokenizer, args.input, args.output, args.height, args.width, args.fps, progress=not args.no_progress
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
