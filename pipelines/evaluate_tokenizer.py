"""Measure a tokenizer: PSNR, SSIM, a perceptual distance, flicker and Frechet distances of what comes back, with intervals.

    python pipelines/evaluate_tokenizer.py --model runs/tokenizer/export --data datasets/tabletop/val_iid --real

`--real` adds the real clips and photographs that lie inside PyPI packages (cosmos_hf.data.real_media). rFID and rFVD need
the usual extractors' files, which you have to have: --inception inception-2015-12-05.pt, --i3d i3d_torchscript.pt.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from cosmos_hf import nano_path
from cosmos_hf.data.clips import ClipDataset, data_names
from cosmos_hf.data.pictures import PictureDataset, find_pictures
from cosmos_hf.data.real_media import write_real_set
from cosmos_hf.evaluation.codes import counting_codes
from cosmos_hf.evaluation.frechet import load_extractors
from cosmos_hf.evaluation.perceptual import PerceptualDistance
from cosmos_hf.evaluation.reconstruction import evaluate_reconstruction
from cosmos_hf.models.tokenizer_kinds import load_tokenizer, reconstruct
from cosmos_hf.pipelines.scripting import provenance, report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"{nano_path('video2world')}/vae", help="folder of a tokenizer")
    parser.add_argument("--data", nargs="*", default=[], help="folders of held-out clips or pictures")
    parser.add_argument("--real", action="store_true", help="add real footage from PyPI packages")
    parser.add_argument("--camera", help="which camera to read of clips that have several")
    parser.add_argument("--output", default="outputs/tokenizer.json")
    parser.add_argument("--num_frames", type=int, default=17, help="length of the clips")
    parser.add_argument("--num_clips", type=int, default=16, help="of each set; 0: all")
    parser.add_argument(
        "--height", type=int, help="resize to this; default: as stored, cut to what the tokenizer takes"
    )
    parser.add_argument("--width", type=int)
    parser.add_argument("--inception", help="TorchScript file for rFID")
    parser.add_argument("--i3d", help="TorchScript file for rFVD")
    parser.add_argument("--no_perceptual", action="store_true", help="leave out the learned distances (extra `eval`)")
    parser.add_argument("--allow_shift", action="store_true", help="report shifted frames instead of refusing them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_progress", action="store_true")
    args = parser.parse_args(argv)
    with report(parser), tempfile.TemporaryDirectory() as scratch:
        if not args.data and not args.real:
            raise ValueError("nothing to measure on: give --data folders, --real, or both")
        if (args.height is None) != (args.width is None):
            raise ValueError("give --height and --width together")
        tokenizer = load_tokenizer(args.model).to(args.device).eval()
        extractors = load_extractors(args.inception, args.i3d, not args.no_perceptual, args.device)
        perceptual = None if args.no_perceptual else PerceptualDistance().to(args.device)
        figures = {"made_by": provenance(args, tokenizer)}
        for name, path in [*zip(data_names(args.data), args.data, strict=True), *real_sets(args, scratch)]:
            clips = tqdm(open_set(path, args, tokenizer), desc=name, unit="clip", disable=args.no_progress)
            with counting_codes(tokenizer) as codes:
                figures[name] = evaluate_reconstruction(
                    lambda video: reconstruct(tokenizer, video),
                    clips,
                    perceptual,
                    args.device,
                    extractors,
                    args.allow_shift,
                )
            if codes is not None:
                figures[name]["codes"] = codes.figures()
            print(f"{name}: {one_line(figures[name])}")
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(figures, indent=1))


def real_sets(args, scratch: str) -> list[tuple[str, str]]:
    """Real footage as a data set, and its name."""
    if not args.real:
        return []
    write_real_set(scratch, args.num_frames, args.height or 96, args.width or 128, glides=2)
    return [("real", scratch)]


def open_set(path: str, args, tokenizer) -> Iterator[dict]:
    """Samples of a set, every frame cut in the centre to a multiple of the tokenizer's factor."""
    size = (args.height, args.width) if args.height else None
    if find_pictures(path):
        clips = PictureDataset(path, random=False)
    else:
        clips = ClipDataset(path, num_frames=args.num_frames, size=size, random=False, views=args.camera)
    factor = tokenizer.config.spatial_compression
    step = max(1, len(clips) // args.num_clips) if args.num_clips else 1  # spread over the set, whatever its order
    for i in range(0, len(clips), step)[: args.num_clips or None]:
        sample = clips[i]
        legal = tuple(side // factor * factor for side in sample["video"].shape[2:])
        yield replace(clips.reader, crop=legal).crop_sample(sample, None)


def one_line(figures: dict) -> str:
    parts = [
        f"{name} {leaf['mean']:.3f} [{leaf['low']:.3f}, {leaf['high']:.3f}]"
        for name, leaf in figures["summary"].items()
    ]
    parts += [f"{name} {leaf['distance']:.3f}" for name, leaf in figures.get("frechet", {}).items()]
    return ", ".join(parts) + f" ({len(figures['clips'])} clips)"


if __name__ == "__main__":
    main()
