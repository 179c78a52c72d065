"""Convert diffusion world models: the reference's checkpoints to our folders, and ours to the reference's or diffusers' layout.

    python pipelines/convert_diffusion.py model.pt --preset 7b-video2world --base Cosmos-1.0-Diffusion-7B-Video2World --output ours
    python pipelines/convert_diffusion.py ours --to original --output model.pt
    python pipelines/convert_diffusion.py ours --to diffusers --output theirs

    python pipelines/convert_diffusion.py model.pt --preset 7b-diffusion-decoder --vae cv8x8x8 --aux_vars aux_vars.pt --output ours

A checkpoint is `.pt` or `.safetensors`, one file or a folder of shards; memory stays near one shard of the output. `--base` is the
folder of a pipeline, in our layout or the one published for diffusers, that the text encoder, tokenizers and scheduler come from.
A diffusion decoder has other parts: a continuous tokenizer (`pipelines/convert_tokenizer.py`), and the text of its `aux_vars.pt`.
"""

import argparse
from pathlib import Path

import torch

from cosmos_hf import preflight
from cosmos_hf.convert.checkpoints import parse_size
from cosmos_hf.convert.diffusion_checkpoints import convert_checkpoint, export_checkpoint, transformer_config_of
from cosmos_hf.models.transformer_cosmos import PRESETS
from cosmos_hf.models.uncertainty_cosmos import UncertaintyHead
from cosmos_hf.pipelines.published_layout import complete_decoder, complete_pipeline, export_for_diffusers
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
    parser.add_argument("--vae", type=Path, help="diffusion decoder: folder of the continuous tokenizer")
    parser.add_argument(
        "--codes", type=Path, help="diffusion decoder: folder of the discrete tokenizer if not DV8x16x16"
    )
    parser.add_argument("--aux_vars", type=Path, help="diffusion decoder: the published file with its text")
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
            check_parts(args, decodes=config.get("condition_vocab_size") is not None)
            head = convert_checkpoint(args.source, args.output / "transformer", config, **options)
            if head is not None:
                head.save_pretrained(args.output / "uncertainty")
            if args.base:
                complete_pipeline(args.base, args.output)
            if args.vae:
                complete_decoder(args.output, args.vae, args.codes, args.aux_vars)
            whole = args.base or args.vae
            check(args.output if whole else args.output / "transformer", args.no_preflight, dtype)
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


def check_parts(args, decodes: bool):
    """A world model's other parts come from a base, a diffusion decoder's from its tokenizer and its text."""
    if decodes and args.base:
        raise ValueError(
            "--base is for world models; a diffusion decoder's pipeline needs --vae, a continuous tokenizer"
        )
    if not decodes and (args.vae or args.codes or args.aux_vars):
        raise ValueError("--vae, --codes and --aux_vars are for a diffusion decoder; this network takes no codes")
    if (args.codes or args.aux_vars) and not args.vae:
        raise ValueError("--codes and --aux_vars are parts of a pipeline: give --vae, its continuous tokenizer, too")


def check(folder: Path, skip: bool, dtype: torch.dtype | None):
    if not skip:
        print(preflight(folder, record=True, **({"torch_dtype": dtype} if dtype else {})))


if __name__ == "__main__":
    main()
