"""How much memory a LoRA step of a published size takes on a GPU, beside what `estimate_posttraining` says.

    python benchmarks/memory.py

The weights are random (memory does not ask what they are), the frozen base's blocks in bfloat16, all else as a run has it. It needs
a CUDA GPU: the 7B model takes 49 GiB for the paper's clips of 121 frames of 704x1280 (16 latent frames), 25 GiB for 33.
Prints the table and writes benchmarks/results/memory.json.
"""

import argparse

import torch
from measuring import keep, machine, seconds, show

from cosmos_hf import CosmosWorldTransformer3D, nano_path
from cosmos_hf.models.transformer_cosmos import PRESETS
from cosmos_hf.training.adaptation import add_lora, freeze
from cosmos_hf.training.memory import GIB, diffusion_step, estimate_posttraining
from cosmos_hf.training.posttrain import PosttrainConfig


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
    torch.cuda.empty_cache()  # of the base before it was halved
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


def build(name: str, device: str = "cuda") -> CosmosWorldTransformer3D:
    """The model as a run with `base_precision: bfloat16` trains it, with LoRA as it is by default."""
    settings = PosttrainConfig(  # whose init_from must be a pipeline; the weights are drawn here
        init_from=nano_path("video2world"),
        conditions=["instruction"],
        base_precision="bfloat16",
        mixed_precision="bf16",
    )
    with torch.device(device):
        transformer = CosmosWorldTransformer3D(**PRESETS[name])
        freeze(transformer, settings)
        add_lora(transformer, settings, "transformer_blocks")
    transformer.enable_gradient_checkpointing()
    return transformer.train()


if __name__ == "__main__":
    main()
