"""How much memory a LoRA step of a published size takes on a GPU, beside what `estimate_posttraining` says.

    python benchmarks/memory.py

The weights are random (memory does not ask what they are), the frozen base's blocks in bfloat16, all else as a run has it. It needs
a CUDA GPU: the 7B model takes 49 GiB for the paper's clips of 121 frames of 704x1280 (16 latent frames), 25 GiB for 33.
Prints the table and writes benchmarks/results/memory.json.
"""

import argparse

import torch
from measuring import keep, machine, seconds, show
from peft import LoraConfig
from torch import nn

from cosmos_hf import CosmosWorldTransformer3D
from cosmos_hf.models.four_bit import blocks_of
from cosmos_hf.models.transformer_cosmos import PRESETS
from cosmos_hf.training.memory import GIB, LORA_TARGETS, diffusion_step, estimate_posttraining


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b-video2world", choices=sorted(PRESETS))
    parser.add_argument("--latent_frames", type=int, nargs="+", default=[5, 16])
    parser.add_argument("--latent_size", type=int, nargs=2, default=[88, 160], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--text_length", type=int, default=512)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU, whose memory is measured")
    transformer = build(args.model)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad])
    rows = []
    for frames in args.latent_frames:
        shape = frames, *args.latent_size

        def step(shape=shape):
            with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
                loss = diffusion_step(transformer, shape, 1, args.text_length)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()

        step()  # the optimizer's state comes into being
        torch.cuda.reset_peak_memory_stats()
        told = estimate_posttraining(args.model, "lora bfloat16", shape, text_length=args.text_length, average=False)
        rows.append(
            dict(
                latents="x".join(map(str, shape)),
                step_s=seconds(step),
                peak_gib=torch.cuda.max_memory_allocated() / GIB,
                estimated_gib=told["total"],
                reserved_gib=torch.cuda.max_memory_reserved() / GIB,
            )
        )
    show(rows)
    print(keep("memory", dict(made_by=machine(argv), model=args.model, method="lora bfloat16", steps=rows)))


def build(name: str) -> CosmosWorldTransformer3D:
    """The model with LoRA of rank 16: linear layers of its blocks in bfloat16, the rest and what learns in float32."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = CosmosWorldTransformer3D(**PRESETS[name])
    torch.set_default_dtype(torch.float32)
    layers = [layer for layer in blocks_of(transformer).modules() if isinstance(layer, nn.Linear)]
    halved = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for tensor in [*transformer.parameters(), *transformer.buffers()]:
        if tensor.is_floating_point() and id(tensor) not in halved:
            tensor.data = tensor.data.float()
    transformer.requires_grad_(False)
    with torch.device("cuda"):
        transformer.add_adapter(LoraConfig(r=16, target_modules=LORA_TARGETS["diffusion"]))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    transformer.enable_gradient_checkpointing()
    return transformer.train()


if __name__ == "__main__":
    main()
