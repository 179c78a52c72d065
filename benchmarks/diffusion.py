"""The diffusion network and a whole generation beside diffusers' Cosmos pipeline: same weights, same draws, one run.

    python benchmarks/diffusion.py

1. One network call within a generation: time, and the share of the machine's measured matrix-product peak. The text's keys and
   values, which are the same at every step, are computed before; `ours_whole_s` is a call that computes them, too.
2. A guided video-to-world generation of 10 steps, tokenizer and text encoder included.
3. Peak memory of both generations, each in a process of its own.

The models are cut down to what a small machine holds: the published width per head, fewer heads and blocks. diffusers' solver
takes 10 evaluations for 10 steps, and so does ours here ("euler"). Writes benchmarks/results/diffusion.json.
"""

import argparse
import tempfile
from types import SimpleNamespace

import diffusers.models.transformers.transformer_cosmos as upstream
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLCosmos,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
)
from measuring import compare, gflop, in_new_process, keep, machine, peak_of, product_peak, resident, show
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from cosmos_hf import CosmosVideo2WorldPipeline, CosmosWorldTransformer3D

# The network's heads of 128, blocks, and latent size (T, H, W). "nano" is that of the bundled model, with heads of 64.
NETWORKS = {
    "1024 wide, 8 blocks": (dict(num_attention_heads=8, attention_head_dim=128, num_layers=8), (8, 24, 40)),
    "512 wide, 8 blocks": (dict(num_attention_heads=4, attention_head_dim=128, num_layers=8), (5, 16, 24)),
    "nano: 256 wide, 6 blocks": (dict(num_attention_heads=4, attention_head_dim=64, num_layers=6), (5, 12, 16)),
}
TEXT_TOKENS, TEXT_WIDTH, FPS = 512, 1024, 24
GENERATION = dict(height=192, width=320, num_frames=57, num_inference_steps=10, guidance_scale=7.0)


class Unchecked:
    """diffusers' pipelines insist on a safety checker, which is not part of what is compared."""

    def to(self, device):
        return self

    def check_text_safety(self, text):
        return True

    def check_video_safety(self, frames):
        return frames


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no_generation", action="store_true", help="the network calls only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # diffusers resizes the padding mask, nearest, with torchvision, which need not be installed for this.
    upstream.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size, mode="nearest")),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    if args.measure:
        print(measure(args.measure))
        return
    figures = {"made_by": machine(argv), "product_peak_gflops": product_peak()}
    figures["network"] = [network_call(name, args.repeats, figures["product_peak_gflops"]) for name in args.networks]
    show(figures["network"])
    if not args.no_generation:
        ours, theirs = pipelines()
        row = compare(lambda: generate(ours), lambda: generate(theirs), args.repeats)
        row |= dict(ours_mib=in_new_process("ours")[0], theirs_mib=in_new_process("theirs")[0])
        figures["generation"] = [dict(**GENERATION, **row, memory_ratio=row["ours_mib"] / row["theirs_mib"])]
        show(figures["generation"])
    print(keep("diffusion", figures))


def make_network(name: str) -> CosmosTransformer3DModel:
    torch.manual_seed(0)
    model = CosmosTransformer3DModel(in_channels=17, text_embed_dim=TEXT_WIDTH, **NETWORKS[name][0]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def network_call(name: str, repeats: int, peak: float) -> dict:
    theirs = make_network(name)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = CosmosWorldTransformer3D.from_pretrained(folder).eval()
    frames, height, width = NETWORKS[name][1]
    x, timestep = torch.randn(1, 16, frames, height, width), torch.tensor([0.3])
    text = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH)
    given = torch.zeros(1, 1, frames, height, width)
    padding = torch.zeros(1, 1, height * 8, width * 8)

    prepared = ours.prepare_text(text)

    def call_ours(text=prepared):
        return ours(x, timestep, text, fps=FPS, condition_mask=given).sample

    def call_theirs():
        return theirs(x, timestep, text, fps=FPS, condition_mask=given, padding_mask=padding, return_dict=False)[0]

    error = (call_ours() - call_theirs()).abs().max().item()
    if error > 1e-3:
        raise RuntimeError(f"the two networks differ by {error:.3g}: nothing to compare")
    work = gflop(call_theirs)
    row = compare(call_ours, call_theirs, repeats)
    shares = dict(ours_of_peak=work / row["ours_s"] / peak, theirs_of_peak=work / row["theirs_s"] / peak)
    shares["ours_whole_s"] = compare(lambda: call_ours(text), call_theirs, repeats)["ours_s"]
    return dict(network=name, latents=f"{frames}x{height}x{width}", gflop=work, **row, **shares)


def pipelines():
    """(ours, diffusers'), with the same random weights; the text encoder is a small T5 of the published width."""
    network, vocabulary = make_network("1024 wide, 8 blocks"), [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [("\u2581", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    theirs = CosmosVideoToWorldPipeline(
        tokenizer=T5TokenizerFast(vocab=vocabulary + letters, extra_ids=0),
        text_encoder=T5EncoderModel(
            T5Config(d_model=TEXT_WIDTH, d_kv=64, d_ff=1024, num_layers=2, num_heads=4, vocab_size=64)
        ).eval(),
        transformer=network,
        vae=AutoencoderKLCosmos(
            encoder_block_out_channels=(32, 64, 128, 128), decode_block_out_channels=(64, 128, 128, 128)
        ).eval(),
        scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=Unchecked(),
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.register_modules(safety_checker=None)
        theirs.save_pretrained(folder)
        theirs.register_modules(safety_checker=Unchecked())
        ours = CosmosVideo2WorldPipeline.from_pretrained(folder)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


def generate(pipe):
    frames = torch.randint(0, 256, (9, 3, GENERATION["height"], GENERATION["width"]), dtype=torch.uint8)
    given = dict(prompt="a robot arm", negative_prompt="blur", fps=FPS, output_type="pt", **GENERATION)
    if isinstance(pipe, CosmosVideo2WorldPipeline):
        return pipe(video=frames.transpose(0, 1), num_conditioning_frames=9, **given)
    return pipe(video=frames.float()[None] / 255, **given)


def measure(who: str) -> float:
    """Peak MiB of a generation, weights not counted."""
    pipe = dict(zip(("ours", "theirs"), pipelines(), strict=True))[who]
    resident(pipe.transformer, pipe.vae, pipe.text_encoder)
    return peak_of(lambda: generate(pipe))


if __name__ == "__main__":
    main()
