"""The continuous video tokenizer beside diffusers' `AutoencoderKLCosmos`: same weights, same input, one run.

    python benchmarks/tokenizer.py

1. Encoding and decoding time, and each one's share of the machine's measured matrix-product peak.
2. Peak memory of both, each in a process of its own.
3. Peak memory against clip length: at once, and chunk by chunk.

Writes benchmarks/results/tokenizer.json.
"""

import argparse
import tempfile

import torch
from diffusers import AutoencoderKLCosmos
from measuring import compare, gflop, in_new_process, keep, machine, matmul_peak, peak_of, show

from cosmos_hf import CosmosVideoTokenizer

SIZES = ("9x128x128", "17x128x128", "17x256x256")  # frames x height x width
LENGTHS = (9, 33, 121, 481)
CHUNK = 16  # pixel frames of the streamed runs; 2 latent frames at 8x
SMALL = (64, 64)
# Full size by default; the narrow one shows memory against length in a time that is not that of the network's size.
CONFIGS = {
    "full": {},
    "narrow": dict(encoder_block_out_channels=(32, 64, 64, 64), decode_block_out_channels=(32, 64, 64, 64)),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(measure(*args.measure))
        return
    figures = {"made_by": machine(argv), "matmul_peak_gflops": matmul_peak()}
    figures["speed"] = speed(args.sizes, args.repeats, figures["matmul_peak_gflops"])
    show(figures["speed"])
    figures["memory"] = memory(args.sizes)
    show(figures["memory"])
    figures["memory_by_length"] = memory_by_length(args.lengths)
    show(figures["memory_by_length"])
    print(keep("tokenizer", figures))


def make(config: str):
    """(ours, theirs) with the same random weights."""
    torch.manual_seed(0)
    theirs = AutoencoderKLCosmos(**CONFIGS[config]).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return CosmosVideoTokenizer.from_pretrained(folder).eval(), theirs


def clip(size: str) -> torch.Tensor:
    return torch.rand(1, 3, *map(int, size.split("x")), generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def speed(sizes, repeats: int, peak: float) -> list[dict]:
    ours, theirs = make("full")
    rows = []
    for size in sizes:
        video = clip(size)
        latents = ours.encode(video).latents
        difference = (theirs.encode(video).latent_dist.mode() - latents).abs().max().item()
        if difference > 1e-3:
            raise RuntimeError(f"the two encoders differ by {difference:.3g}: nothing to compare")
        calls = {
            "encode": (lambda v=video: ours.encode(v), lambda v=video: theirs.encode(v)),
            "decode": (lambda z=latents: ours.decode(z), lambda z=latents: theirs.decode(z)),
        }
        for name, (a, b) in calls.items():
            work = gflop(b)
            row = compare(a, b, repeats)
            row |= dict(ours_of_peak=work / row["ours_s"] / peak, theirs_of_peak=work / row["theirs_s"] / peak)
            rows.append(dict(size=size, call=name, gflop=work, **row))
    return rows


def memory(sizes) -> list[dict]:
    rows = []
    for size in sizes:
        for call in ("encode", "decode"):
            a, b = (in_new_process("full", who, call, size) for who in ("ours", "theirs"))
            rows.append(dict(size=size, call=call, ours_mib=a, theirs_mib=b, ratio=a / b))
    return rows


def memory_by_length(lengths) -> list[dict]:
    rows = []
    for length in lengths:
        size = f"{length}x{SMALL[0]}x{SMALL[1]}"
        row = dict(size=size)
        for call in ("encode", "decode"):
            for who in ("theirs", "ours", "streamed"):
                row[f"{call}_{who}_mib"] = in_new_process("narrow", who, call, size)
        rows.append(row)
    return rows


@torch.no_grad()
def measure(config: str, who: str, call: str, size: str) -> float:
    """Peak MiB of one call."""
    ours, theirs = make(config)
    video = clip(size)
    if call == "encode":
        calls = dict(
            ours=lambda: ours.encode(video),
            theirs=lambda: theirs.encode(video),
            streamed=lambda: ours.encode(video, chunk=CHUNK),
        )
    else:
        frames = ours.latent_frames(video.shape[2])
        latents = torch.randn(1, 16, frames, video.shape[3] // 8, video.shape[4] // 8)
        calls = dict(
            ours=lambda: ours.decode(latents),
            theirs=lambda: theirs.decode(latents),
            streamed=lambda: ours.decode(latents, chunk=CHUNK // 8),
        )
    return peak_of(calls[who])


if __name__ == "__main__":
    main()
