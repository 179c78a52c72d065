"""The continuous video tokenizer beside diffusers' `AutoencoderKLCosmos`: same weights, same input, one run.

    python benchmarks/tokenizer.py

1. Time of encoding and of decoding, and the convolutions' share of the processor's peak, that of a large matrix product measured
   beside each row. Ours need fewer products than the plain way, which is what their share counts: it may be above 1. All that a
   layer does is in its time, but the normalisation before it. Diffusers' arithmetic is what it really does.
2. Peak memory of both, and of the chunked way, each call in a process of its own.
3. Peak memory against clip length: at once, in chunks with the result as one tensor, and streamed with results passed on.

`--parts` runs some of these and keeps the others' figures. Writes benchmarks/results/tokenizer.json.
"""

import argparse
import json
import tempfile
import time
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLCosmos
from measuring import (
    ALLOCATOR,
    RESULTS,
    compare,
    convolution_seconds,
    gflop_by_operation,
    in_new_process,
    keep,
    machine,
    peak_of,
    product_peak,
    resident,
    show,
)

from cosmos_hf import CosmosVideoTokenizer
from cosmos_hf.models.video_layers import CausalConv3d, FrameNorm

SIZES = ("9x128x128", "17x128x128", "17x256x256")  # frames x height x width
LENGTHS = (9, 33, 121, 481)
CHUNK = 16  # pixel frames of the streamed runs; 2 latent frames at 8x
SMALL = (64, 64)
WARM_UP = "9x32x32"
MEMORY_MEASURE = (
    "high-water mark (VmHWM) of a process of its own, less what it held before the call: weights read, libraries warmed up by a "
    f"clip of {WARM_UP}, freed memory given back; environment of both sides {ALLOCATOR}"
)
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(*measure(*args.measure))
        return
    figures = {}
    for name in args.parts:
        figures[name] = PARTS[name](args)
        show(figures[name])
    kept = RESULTS / "tokenizer.json"
    others = json.loads(kept.read_text()) if kept.exists() else {}
    made_by = machine(argv)
    commands = others.get("commands", {}) | dict.fromkeys(args.parts, made_by.pop("command"))
    figures = {"made_by": made_by, "commands": commands, "memory_measure": MEMORY_MEASURE} | {
        name: figures.get(name, others.get(name)) for name in PARTS if name in commands
    }
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
def speed(args) -> list[dict]:
    ours, theirs = make("full")
    rows = []
    for size in args.sizes:
        video = clip(size)
        latents = ours.encode(video).latents
        difference = (theirs.encode(video).latent_dist.mode() - latents).abs().max().item()
        if difference > 1e-3:
            raise RuntimeError(f"the two encoders differ by {difference:.3g}: nothing to compare")
        calls = {
            "encode": (lambda v=video: ours.encode(v), lambda v=video: theirs.encode(v)),
            "decode": (lambda z=latents: ours.decode(z), lambda z=latents: theirs.decode(z)),
        }
        for name, pair in calls.items():
            row = dict(size=size, call=name, **compare(*pair, args.repeats))
            rows.append(row | convolutions(*pair))
    return rows


def convolutions(ours, theirs, repeats: int = 2) -> dict:
    """Rates of both, each the best of some runs between which the peak is measured: the processor's clock drifts."""
    peaks, times = [product_peak()], {"ours": [], "theirs": []}
    for _ in range(repeats):
        seconds, plain_gflop = convolution_layers(ours)
        times["ours"].append(seconds)
        peaks.append(product_peak())
        times["theirs"].append(convolution_seconds(theirs))
        peaks.append(product_peak())
    row = dict(product_peak_gflops=max(peaks))
    for name, work in (("ours", plain_gflop), ("theirs", gflop_by_operation(theirs)["convolution"])):
        row[f"{name}_convolution_gflop"] = work
        row[f"{name}_convolutions_of_peak"] = work / min(times[name]) / max(peaks)
    return row


def convolution_layers(call) -> tuple[float, float]:
    """Of our layers with kernels beyond 1x1x1: seconds without the normalisation before them, and GFLOP of the plain way."""
    forward, activated = CausalConv3d.forward, FrameNorm.activated
    seconds, gflop, inside = 0.0, 0.0, False

    def timed_forward(layer, x, *args, **options):
        nonlocal seconds, gflop, inside
        if layer.pointwise:
            return forward(layer, x, *args, **options)
        started, inside = time.perf_counter(), True
        y = forward(layer, x, *args, **options)
        seconds, inside = seconds + time.perf_counter() - started, False
        gflop += 2 * layer.weight[0].numel() * y.numel() / 1e9
        return y

    def timed_activated(norm, x):
        nonlocal seconds
        started = time.perf_counter()
        y = activated(norm, x)
        seconds -= (time.perf_counter() - started) * inside
        return y

    with patch.object(CausalConv3d, "forward", timed_forward), patch.object(FrameNorm, "activated", timed_activated):
        call()
    return seconds, gflop


def memory(args) -> list[dict]:
    rows = []
    for size in args.sizes:
        peaks = {who: in_new_process("full", who, size) for who in ("ours", "theirs", "chunked")}
        for i, call in enumerate(("encode", "decode")):
            row = {f"{who}_mib": peak[i] for who, peak in peaks.items()}
            rows.append(dict(size=size, call=call, **row, ratio=row["ours_mib"] / row["theirs_mib"]))
    return rows


def memory_by_length(args) -> list[dict]:
    rows = []
    for length in args.lengths:
        size = f"{length}x{SMALL[0]}x{SMALL[1]}"
        row = dict(size=size)
        for who in ("theirs", "ours", "chunked", "streamed"):
            row[f"encode_{who}_mib"], row[f"decode_{who}_mib"] = in_new_process("narrow", who, size)
        rows.append(row)
    return rows


PARTS = {"speed": speed, "memory": memory, "memory_by_length": memory_by_length}


@torch.no_grad()
def measure(config: str, who: str, size: str) -> list[float]:
    """Peak MiB of encoding and of decoding."""
    ours, theirs = make(config)
    resident(ours, theirs)
    for run in (encoding, decoding):
        run(ours, theirs, who, WARM_UP)()
    return [peak_of(run(ours, theirs, who, size)) for run in (encoding, decoding)]


def encoding(ours, theirs, who: str, size: str):
    video = clip(size)

    def streamed():
        stream = ours.encoder_stream()
        for start in (0, *range(1 + CHUNK, video.shape[2], CHUNK)):
            stream.push(video[:, :, start : start + CHUNK + (start == 0)])

    return dict(
        ours=lambda: ours.encode(video),
        theirs=lambda: theirs.encode(video),
        chunked=lambda: ours.encode(video, chunk=CHUNK),
        streamed=streamed,
    )[who]


def decoding(ours, theirs, who: str, size: str):
    frames, height, width = map(int, size.split("x"))
    latents = torch.randn(1, 16, ours.latent_frames(frames), height // 8, width // 8)

    def streamed():
        stream = ours.decoder_stream()
        for part in latents.split(CHUNK // 8, dim=2):
            stream.push(part)

    return dict(
        ours=lambda: ours.decode(latents),
        theirs=lambda: theirs.decode(latents),
        chunked=lambda: ours.decode(latents, chunk=CHUNK // 8),
        streamed=streamed,
    )[who]


if __name__ == "__main__":
    main()
