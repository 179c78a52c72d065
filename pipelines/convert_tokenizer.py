"""Published tokenizer files to a folder that `from_pretrained` reads.

    python pipelines/convert_tokenizer.py --input Cosmos-1.0-Tokenizer-CV8x8x8 --output models/cv8x8x8

The folder holds encoder.jit and decoder.jit, or autoencoder.jit, and perhaps mean_std.pt. Tensors are read without running code
of the files. --verify runs the files' own program on a random clip and compares: use it for files whose origin you trust.
"""

import argparse
import json
import logging

import torch

from cosmos_hf.convert.compare_torchscript import compare_with_torchscript
from cosmos_hf.convert.published_tokenizer import build_preset, convert_tokenizer_files, find_files
from cosmos_hf.models.diffusers_layout import save_for_diffusers
from cosmos_hf.pipelines.scripting import report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder as published")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--preset", help="cv8x8x8, di16x16-360p, ...; default: from the input folder's name")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="JSON of config values that differ from the preset's"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the files")
    parser.add_argument(
        "--verify", action="store_true", help="run the TorchScript and compare; executes the files' program"
    )
    parser.add_argument("--layout", choices=("cosmos_hf", "diffusers"), default="cosmos_hf", help="of the output")
    args = parser.parse_args(argv)
    with report(parser):
        files, mean_std = find_files(args.input)
        model = build_preset(args.preset or args.input, **args.config)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        result = convert_tokenizer_files(files, model, mean_std, dtype)
        figures = dict(converted=result.converted, dropped=result.dropped, statistics=mean_std is not None)
        if args.verify:
            figures["verified"] = compare_with_torchscript(result.model, result.files)
        elif not result.geometry_is_certain:
            logging.warning("the entries fit several geometries: --verify tells whether this preset is the right one")
        if args.layout == "diffusers":
            save_for_diffusers(result.model, args.output)
        else:
            result.model.save_pretrained(args.output)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
