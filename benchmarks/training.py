"""What bf16 and compiled blocks save in training: steps of LoRA on the bundled world model, beside plain float32 ones.

    python benchmarks/training.py

Every way is timed in turn with the plain one, on the same latents; compiling is not counted, but told. It needs a C++ compiler.
Prints the table and writes benchmarks/results/training.json.
"""

import argparse

import torch
from measuring import compare, keep, machine, seconds, show
from peft import LoraConfig

from cosmos_hf import CosmosWorldTransformer3D, nano_path
from cosmos_hf.training.devices import compile_blocks

WAYS = {"bf16": (True, ""), "compiled": (False, "inductor"), "bf16, compiled": (True, "inductor")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    plain = step_of(args, False, "")
    rows = []
    for name, way in WAYS.items():
        step = step_of(args, *way)
        first = seconds(step)
        figures = compare(step, plain, args.repeats)
        rows.append(dict(way=name, **figures, first_step_s=first))
    show(rows)
    print(keep("training", dict(made_by=machine(argv), batch_size=args.batch_size, ways=rows)))


def step_of(args, bf16: bool, backend: str):
    """Forward and backward of a batch of clips of 17 frames of 96x128."""
    torch.manual_seed(0)
    transformer = CosmosWorldTransformer3D.from_pretrained(nano_path("video2world"), subfolder="transformer")
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    compile_blocks(transformer.to(args.device).train(), backend)
    size, config = args.batch_size, transformer.config
    latents = torch.randn(size, config.out_channels, 5, 12, 16, device=args.device)
    text = torch.randn(size, 48, config.text_embed_dim, device=args.device)
    given = torch.zeros(size, 1, 5, 12, 16, device=args.device)

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            out = transformer(latents, torch.zeros(size, device=args.device), text, condition_mask=given).sample
        (out.float() - latents).square().mean().backward()

    return step


if __name__ == "__main__":
    main()
