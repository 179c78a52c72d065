"""Convert diffusion world models: the reference's checkpoints to our folders, and ours to the reference's or diffusers' layout.

    python pipelines/convert_diffusion.py model.pt --preset 7b-video2world --base Cosmos-1.0-Diffusion-7B-Video2World --output ours
    python pipelines/convert_diffusion.py ours --to original --output model.pt
    python pipelines/convert_diffusion.py ours --to diffusers --output theirs

A checkpoint is `.pt` or `.safetensors`, one file or a folder of shards; memory stays near one shard of the output. `--base` is the
folder of a pipeline, in our layout or the one published for diffusers, that the text encoder, tokenizers and scheduler come from.
"""

import argparse
from pathlib import Path

import torch

from cosmos_hf import preflight
from cosmos_hf.convert.checkpoints import parse_size
from cosmos_hf.convert.diffusion_checkpoints import convert_checkpoint, export_checkpoint, transformer_config_of
from cosmos_hf.models.transformer_cosmos import PRESETS
from cosmos_hf.models.uncertainty_cosmos import UncertaintyHead
from cosmos_hf.pipelines.published_layout import complete_pipeline, export_for_diffusers
from cosmos_hf.pipelines.scripting import report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint, or for the way back a folder of ours")
    parser.add_argument("--output", type=Path, required=True, help="folder; for original also a .pt file")
    parser.add_argument("--to", choices=("cosmos_hf", "original", "diffusers"), default="cosmos_hf")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="which published network the checkpoint holds")
    parser.add_argument("--config", type=Path, help="instead of a preset: a config.json of CosmosWorldTransformer3D")
    parser.add_argument(
        "--base", type=Path, help="pipeline that the other parts come from; without it only the network is written"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--no_preflight", action="store_true", help="do not load and run the result")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with report(parser):
        options = dict(dtype=dtype, max_shard_size=parse_size(args.max_shard_size))
        if args.to == "cosmos_hf":
            if (args.preset is None) == (args.config is None):
                raise ValueError("give --preset or --config, so that every key of the checkpoint can be checked")
            config = PRESETS[args.preset] if args.preset else transformer_config_of(args.config)
            head = convert_checkpoint(args.source, args.output / "transformer", config, **options)
            if head is not None:
                head.save_pretrained(args.output / "uncertainty")
            if args.base:
                complete_pipeline(args.base, args.output)
            check(args.output if args.base else args.output / "transformer", args.no_preflight, dtype)
        elif args.to == "original":
            network = args.source / "transformer" if (args.source / "transformer").is_dir() else args.source
            kept = args.source / "uncertainty"
            head = UncertaintyHead.from_pretrained(kept) if kept.is_dir() else None
            export_checkpoint(network, args.output, uncertainty=head, **options)
        else:
            if dtype is not None:
                raise ValueError("--to diffusers copies the weights as they are: convert with --dtype first")
            export_for_diffusers(args.source, args.output)
            check(args.output, args.no_preflight, None)
    print(f"{args.output}: written")


def check(folder: Path, skip: bool, dtype: torch.dtype | None):
    if not skip:
        print(preflight(folder, record=True, **({"torch_dtype": dtype} if dtype else {})))


if __name__ == "__main__":
    main()
