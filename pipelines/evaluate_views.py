"""Measure a multi-view world model on held-out clips of known cameras: is it one world, is the way followed, how near are pictures?

    python pipelines/evaluate_views.py --adapter runs/nano_views/export --data datasets/driving/val_iid --output views.json

For every set and every way of giving frames: `frames` gives the first frame of each view, `view` the whole of the first view.
Beside the model's figures stand those of the true videos and of their reconstruction by the tokenizer, the best that the model
could reach; with `--compare_base` also those of the base that continues each view by itself. Sampson errors leave out pairs
of frames that were both given; those of the true videos are of the pairs that count where first frames are given.
Needs `pip install 'cosmos-hf[geometry]'`.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from cosmos_hf import CosmosAutoregressivePipeline, CosmosMultiViewPipeline, CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.conditioning.camera import CameraPath
from cosmos_hf.data.clips import ClipDataset, data_names
from cosmos_hf.data.video import contact_sheet, to_float, to_uint8
from cosmos_hf.evaluation.multiview import score_geometry, score_pictures, summarise_views
from cosmos_hf.pipelines.conditions import clip_actions
from cosmos_hf.pipelines.loading import pipeline_class
from cosmos_hf.pipelines.scripting import provenance, report

GIVEN = ("frames", "view")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=nano_path("video2world"), help="folder of a base, or of a multi-view pipeline"
    )
    parser.add_argument("--adapter", help="folder of an adapter with views")
    parser.add_argument("--data", nargs="+", required=True, help="shards of held-out clips with cameras")
    parser.add_argument("--output", default="outputs/views.json")
    parser.add_argument("--num_clips", type=int, default=8, help="of each set")
    parser.add_argument("--views", nargs="+", help="of the model's views; default: all")
    parser.add_argument("--given", nargs="+", choices=GIVEN, default=list(GIVEN))
    parser.add_argument("--num_inference_steps", type=int, help="diffusion models")
    parser.add_argument("--guidance_scale", type=float, help="diffusion models")
    parser.add_argument("--temperature", type=float, help="autoregressive models")
    parser.add_argument("--compare_base", action="store_true", help="also the base alone, view by view")
    parser.add_argument("--truth_only", action="store_true", help="figures of the true videos and the tokenizer alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with report(parser):
        autoregressive = pipeline_class(args.model) is CosmosAutoregressivePipeline
        several = CosmosAutoregressivePipeline if autoregressive else CosmosMultiViewPipeline
        pipe = several.from_pretrained(args.model).to(args.device)
        if args.adapter:
            pipe.load_lora_weights(args.adapter)
        pipe.set_progress_bar_config(disable=True)
        figures = {"made_by": provenance(args, pipe)}
        for name, path in zip(data_names(args.data), args.data, strict=True):
            entry = evaluate_set(pipe, name, path, args)
            figures[name] = {kind: summarise_views(scores) for kind, scores in entry.items() if scores}
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(figures, indent=1))
    print(f"{args.output}: {', '.join(key for key in figures if key != 'made_by')}")


def evaluate_set(pipe, name: str, path: str, args) -> dict[str, list[dict]]:
    """Scores of every clip by what they are of."""
    settings = {name: pipe.call_default(name) for name in ("height", "width", "num_frames")}
    size = settings["height"], settings["width"]
    views = tuple(args.views or pipe.views or ())
    spec = pipe.action_spec
    if pipe.views and spec is not None and spec.kind == "trajectory" and pipe.views[0] not in views:
        raise ValueError(
            f"the model's trajectories are in the axes of the camera {pipe.views[0]}: name it among the --views, too"
        )
    clips = ClipDataset(path, num_frames=settings["num_frames"], size=size, random=False, views=views or None)
    kinds = ("truth", "reconstruction", *args.given, *(f"base_{given}" for given in args.given if given == "frames"))
    entry, rows = {kind: [] for kind in kinds}, {}
    base = None
    if args.compare_base:
        same = type(pipe) is CosmosAutoregressivePipeline
        base = (type(pipe) if same else CosmosVideo2WorldPipeline).from_pretrained(args.model).to(args.device)
        base.set_progress_bar_config(disable=True)
    for seed in tqdm(range(min(args.num_clips, len(clips))), desc=name, unit="clip"):
        sample = clips[seed]
        made = {"truth": to_float(sample["video"]), "reconstruction": reconstruct(pipe, sample["video"])}
        for given in () if args.truth_only else args.given:
            made[given] = generate(pipe, sample, views, given, seed, args)
            if base is not None and given == "frames":
                made[f"base_{given}"] = torch.stack([alone(base, sample, v, seed, args) for v in range(len(views))])
        for kind, videos in made.items():
            entry[kind].append(score(videos, sample, kind))
            if seed == 0:
                rows |= {f"{kind}: {view}": to_uint8(video)[:, ::4] for view, video in zip(views, videos, strict=True)}
    sheet = Path(args.output).with_suffix("") / f"{name.replace('/', '-')}.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(sheet)
    return entry


def score(videos: torch.Tensor, sample: dict, kind: str) -> dict:
    camera, (views, _, frames) = sample["camera"], videos.shape[:3]
    given = [frames] + [0] * (views - 1) if kind == "view" else [1] * views
    pictures = to_uint8(videos).permute(0, 2, 3, 4, 1).numpy()
    figures = {"geometry": score_geometry(pictures, camera["intrinsics"], camera["extrinsics"], given)}
    if kind != "truth":
        made_from = [0] * views if kind == "reconstruction" else given  # the tokenizer makes all frames
        figures["psnr"] = score_pictures(videos, to_float(sample["video"]), made_from)
    return figures


@torch.no_grad()
def reconstruct(pipe, video: torch.Tensor) -> torch.Tensor:
    frames = to_float(video).to(pipe.vae.device, pipe.vae.dtype)
    return torch.cat([pipe.vae(view[None]).sample.float().cpu() for view in frames]).clamp(-1, 1)


def generate(pipe, sample: dict, views: tuple[str, ...], given: str, seed: int, args) -> torch.Tensor:
    """All views [V, 3, T, H, W] in [-1, 1], with the inputs that the model takes."""
    videos, camera, more = dict(zip(views, sample["video"], strict=True)), sample["camera"], {}
    if "camera" in pipe.transformer.conditions:
        size = sample["video"].shape[-2:]
        paths = [CameraPath(k, e, *size) for k, e in zip(camera["intrinsics"], camera["extrinsics"], strict=True)]
        more["camera"] = dict(zip(views, paths, strict=True))
    if "actions" in pipe.transformer.conditions:
        first = views.index(pipe.views[0]) if pipe.views[0] in views else 0
        more["actions"] = clip_actions(pipe, sample, camera["extrinsics"][first])
    if given == "frames":
        more["image"] = {view: video[:, :1] for view, video in videos.items()}
    else:
        more["video"] = {views[0]: videos[views[0]]}
    if not isinstance(pipe, CosmosAutoregressivePipeline):
        more |= dict(prompt=dict(zip(views, sample["view_captions"], strict=True)), views=list(views))
    elif pipe.text_encoder is not None:
        more["prompt"] = sample["caption"]
    result = pipe(**more, **drawn(pipe, seed, args))
    return torch.stack([result.frames[view][0].transpose(0, 1).float().cpu() * 2 - 1 for view in views])


def alone(base, sample: dict, view: int, seed: int, args) -> torch.Tensor:
    video = sample["video"][view]
    result = base(
        image=video[:, :1],
        prompt=None if base.text_encoder is None else sample["view_captions"][view],
        height=video.shape[2],
        width=video.shape[3],
        num_frames=video.shape[1],
        **drawn(base, seed, args),
    )
    return result.frames[0].transpose(0, 1).float().cpu() * 2 - 1


def drawn(pipe, seed: int, args) -> dict:
    """How a call samples."""
    how = dict(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    if isinstance(pipe, CosmosAutoregressivePipeline):
        how = dict(temperature=args.temperature)
    return how | dict(generator=torch.Generator().manual_seed(seed), output_type="pt")


if __name__ == "__main__":
    main()
