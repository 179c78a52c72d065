"""Measure a video-to-world pipeline and its tokenizer on held-out clips, next to still pictures.

    python pipelines/evaluate_model.py --data datasets/tabletop/val_iid datasets/tabletop/val_combo --output evaluation.json

For every set: the tokenizer's reconstruction, and the future predicted from 1 and from 9 frames with the clip's caption as
the prompt and the clip's index as the seed, against "copy the last frame" and "mean frame" (see cosmos_hf.evaluation). The
model is a diffusion or an autoregressive one; of an autoregressive one also the perplexity of the true codes is given.
`--instructions` asks of clips of the table-top world with one frame given whether the right object moves the right way, also
with another instruction for the same frame.

`--adapter` loads what training/posttrain.py made; clips are read in the size and length that it was trained on. Actions,
trajectories and cameras that the model takes are those of the clips, and for comparison ("exchanged", with two clips or more)
others'. "plans" tells whether several of them for one first frame lead to futures that differ as the true ones do, and "poses",
of models that take a camera, whether the camera went its way; it needs `pip install 'cosmos-hf[geometry]'`.
FID and FVD of the predicted frames need the usual extractors' files: --inception inception-2015-12-05.pt, --i3d i3d_torchscript.pt.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel

from cosmos_hf import CosmosAutoregressivePipeline, CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.data.clips import ClipDataset, data_names
from cosmos_hf.data.video import contact_sheet, to_float, to_uint8
from cosmos_hf.evaluation.camera_following import recover_paths, score_paths, why_not_measurable
from cosmos_hf.evaluation.frechet import compare_videos, load_extractors
from cosmos_hf.evaluation.instructions import evaluate_instructions
from cosmos_hf.evaluation.perceptual import PerceptualDistance
from cosmos_hf.evaluation.plans import evaluate_plans
from cosmos_hf.evaluation.reconstruction import evaluate_reconstruction
from cosmos_hf.evaluation.worlds import latent_l2, score_future, summarise_futures
from cosmos_hf.models.ar_loss import IGNORED, ignored_tokens
from cosmos_hf.pipelines.conditions import action_vectors, conditions_of_clip, takes_one_action
from cosmos_hf.pipelines.encode import encode_prompts
from cosmos_hf.pipelines.loading import pipeline_class
from cosmos_hf.pipelines.scripting import provenance, report

PIPELINES = (CosmosVideo2WorldPipeline, CosmosAutoregressivePipeline)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=nano_path("video2world"))
    parser.add_argument("--adapter", help="folder of an adapter, as training/posttrain.py writes it")
    parser.add_argument(
        "--text_encoder", help="folder of a pipeline with the one of the training, for a model that has none"
    )
    parser.add_argument("--data", nargs="+", required=True, help="folders of held-out clips")
    parser.add_argument("--camera", help="which camera to read of clips that have several")
    parser.add_argument("--output", default="outputs/evaluation.json")
    parser.add_argument("--num_clips", type=int, default=16, help="of each set")
    parser.add_argument("--conditioning_frames", type=int, nargs="+", default=[1, 9])
    parser.add_argument("--instructions", action="store_true", help="also judge whether instructions are followed")
    parser.add_argument("--num_inference_steps", type=int, help="diffusion models")
    parser.add_argument("--guidance_scale", type=float, help="diffusion models")
    parser.add_argument("--temperature", type=float, help="autoregressive models")
    parser.add_argument("--top_p", type=float, help="autoregressive models")
    parser.add_argument("--plans", type=int, default=4, help="different plans from one first frame; 0: leave that out")
    parser.add_argument("--no_poses", action="store_true", help="recover no poses from videos (extra `geometry`)")
    parser.add_argument("--fps", type=float, help="read clips at this rate; default: their own")
    parser.add_argument("--inception", help="TorchScript file for FID")
    parser.add_argument("--i3d", help="TorchScript file for FVD")
    parser.add_argument("--no_perceptual", action="store_true", help="leave out the learned distances (extra `eval`)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.plans == 1 or args.plans < 0:
        parser.error(
            f"--plans {args.plans}: one plan cannot differ from itself; give 0 to leave plans out, or two or more"
        )
    with report(parser):
        pipe = load(args)
        perceptual = None if args.no_perceptual else PerceptualDistance().to(args.device)
        extractors = load_extractors(args.inception, args.i3d, not args.no_perceptual, args.device)
        figures = {"made_by": provenance(args, pipe)}
        for name, path in zip(data_names(args.data), args.data, strict=True):
            figures[name] = evaluate_set(pipe, name, path, args, perceptual, extractors)
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(figures, indent=1))
    print(f"{args.output}: {', '.join(key for key in figures if key != 'made_by')}")


def load(args):
    """The pipeline with its adapter. ValueError where instructions are asked for that it would not read."""
    kind, parts = pipeline_class(args.model, PIPELINES), {}
    if args.text_encoder:
        folder = Path(args.text_encoder)
        parts["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer")
        parts["text_encoder"] = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    pipe = kind.from_pretrained(args.model, **parts).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.adapter:
        pipe.load_lora_weights(args.adapter)
    reads_text = kind is CosmosVideo2WorldPipeline or pipe.transformer.config.cross_attention_dim is not None
    if args.instructions and not reads_text:
        raise ValueError(
            "--instructions: this model reads no text; load an adapter that was trained with instructions"
        )
    if reads_text and pipe.text_encoder is None:
        why = f"{args.model} has no text_encoder: give --text_encoder, the folder of a pipeline that has the one of the training"
        if args.instructions:
            raise ValueError(why)
        print(f"captions are left out: {why}")
    if args.text_encoder and not reads_text:
        raise ValueError("--text_encoder would be ignored: this model reads no text")
    return pipe


def evaluate_set(pipe, name: str, path: str, args, perceptual, extractors: list) -> dict:
    samples = read_clips(pipe, path, args)
    given = [conditions_of_clip(pipe, sample) for sample in samples]
    true_paths = find_true_paths(pipe, name, samples, args)
    tokenizer = evaluate_reconstruction(reconstructor(pipe.vae), samples, perceptual, args.device)
    entry = {"clips": describe(pipe, name, samples), "tokenizer": tokenizer["summary"]}
    for count in args.conditioning_frames:
        videos, seconds = futures(pipe, samples, given, count, args)
        sheet = Path(args.output).with_suffix("") / f"{name.replace('/', '-')}-{count}.png"
        row = score(videos, samples, count, sheet) | {"seconds_per_generated_second": seconds}
        if true_paths is not None:
            row["poses"] = pose_figures(videos, samples, true_paths, count)
        if extractors:
            made, true = ([v[:, count:] for v in kind] for kind in (videos, [to_float(s["video"]) for s in samples]))
            row["frechet"] = compare_videos(extractors, made, true, args.device)
        if pipe.vae.config.quantizer is None:
            row["latent_l2"] = {"model": latent_l2(pipe.vae, videos, true_videos(samples), count)}
        if isinstance(pipe, CosmosAutoregressivePipeline):
            row["perplexity"] = perplexity(pipe, samples, given, count)
        if len(samples) > 1 and given[0]:
            videos, _ = futures(pipe, samples, [given[-1], *given[:-1]], count, args)
            if "latent_l2" in row:
                row["latent_l2"]["exchanged"] = latent_l2(pipe.vae, videos, true_videos(samples), count)
            row["exchanged"] = score(videos, samples, count, sheet.with_name(f"{sheet.stem}-exchanged.png"))["model"]
        entry[f"from_{count}_frames"] = row
    if args.plans and len(samples) > 1 and given[0]:
        # Captions tell what the true plan does: all plans go without.
        entry["plans"] = evaluate_plans(
            lambda sample, plan, seed: future(pipe, args, 1, sample, None, seed, given[plan]), samples, args.plans
        )
    if args.instructions:
        entry["instructions"] = evaluate_instructions(
            lambda sample, caption, seed: future(
                pipe, args, 1, sample, caption, seed, conditions_of_clip(pipe, sample)
            ),
            samples,
        )
    return entry


def read_clips(pipe, path: str, args) -> list[dict]:
    """In the size and length that an adapter was trained on; else in the clips' own size and the model's length."""
    trained = pipe.trained_settings
    size = (trained["height"], trained["width"]) if trained else None
    length = pipe.call_default("num_frames")
    clips = ClipDataset(path, num_frames=length, size=size, fps=args.fps, random=False, views=args.camera)
    return [clips[i] for i in range(min(args.num_clips, len(clips)))]


def describe(pipe, name: str, samples: list[dict]) -> dict:
    """What was measured; says where clips have another rate than the adapter's."""
    frames, height, width = samples[0]["video"].shape[1:]
    rate, trained = samples[0]["fps"], pipe.trained_settings.get("fps")
    if trained and abs(rate - trained) > 0.01 * trained:
        print(f"{name}: clips at {rate:g} fps, but the adapter was trained at {trained:g}; see --fps")
    return dict(count=len(samples), height=height, width=width, num_frames=frames, fps=rate)


def true_videos(samples: list[dict]) -> Iterator[torch.Tensor]:
    """[3, T, H, W] in [-1, 1] of one sample after the other: all at once take four times the memory of the samples."""
    return (to_float(sample["video"]) for sample in samples)


def reconstructor(vae):
    return torch.no_grad()(lambda video: vae(video).sample)


def futures(pipe, samples: list[dict], given: list[dict], count: int, args) -> tuple[list[torch.Tensor], float]:
    """Every sample's video [3, T, H, W] in [-1, 1], predicted from `count` frames; and seconds per generated second."""
    videos, started = [], time.perf_counter()
    for seed, sample in enumerate(tqdm(samples, desc=f"{sample_set(samples)}, {count} frames", unit="clip")):
        videos.append(future(pipe, args, count, sample, sample["caption"], seed, given[seed]))
    predicted = (videos[0].shape[1] - count) / samples[0]["fps"] * len(samples)
    return videos, (time.perf_counter() - started) / predicted


def score(videos: list[torch.Tensor], samples: list[dict], count: int, sheet: Path) -> dict:
    """Summary of the scores; the best, the median and the worst go into a contact sheet."""
    scores = []
    for video, sample in zip(videos, samples, strict=True):
        masks = sample["masks"][None] if "masks" in sample else None
        scores.append(score_future(video[None], to_float(sample["video"])[None], count, masks))
    order = sorted(range(len(scores)), key=lambda i: scores[i]["model"]["psnr"].mean().item())
    rows, shown = {}, list(range(0, videos[0].shape[1], 2))
    for label, i in (("best", order[-1]), ("median", order[len(order) // 2]), ("worst", order[0])):
        rows[f"{label}: {samples[i]['caption']}"] = to_uint8(videos[i])[:, shown]
        rows[f"{label}: what really happened"] = samples[i]["video"][:, shown]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, [f"frame {t}" for t in shown]).save(sheet)
    return summarise_futures(scores)


def find_true_paths(pipe, name: str, samples: list[dict], args) -> list | str | None:
    """The true renderings' recovered paths, or why there are none; None where the model takes no camera or nobody asks."""
    if args.no_poses or "camera" not in pipe.transformer.conditions:
        return None
    cameras = [sample["camera"] for sample in samples]
    if why := why_not_measurable(cameras):
        print(f"{name}: no pose errors: {why}")
        return why
    return recover_paths([sample["video"] for sample in samples], cameras)


def pose_figures(videos: list[torch.Tensor], samples: list[dict], true_paths: list | str, count: int) -> dict:
    """Of the generated videos, and as a ceiling of the true ones."""
    if isinstance(true_paths, str):
        return {"skipped": true_paths}
    cameras = [sample["camera"] for sample in samples]
    paths = recover_paths([to_uint8(video) for video in videos], cameras)
    return {"model": score_paths(paths, cameras, count), "truth": score_paths(true_paths, cameras, count)}


@torch.no_grad()
def perplexity(pipe: CosmosAutoregressivePipeline, samples: list[dict], conditions: list[dict], count: int) -> float:
    """Of the codes of what really happened, given those of the first `count` frames and, where the model takes it, the caption."""
    total = targets = 0
    for sample, condition in zip(samples, conditions, strict=True):
        codes = pipe.vae.encode(to_float(sample["video"])[None].to(pipe.device)).indices
        tokens, config = codes.flatten(1), pipe.transformer.config
        if config.bov_token_id is not None:
            tokens = torch.cat([torch.full_like(tokens[:, :1], config.bov_token_id), tokens], 1)
        labels = tokens.clone()
        labels[:, : ignored_tokens(config, codes.shape[1:], pipe.vae.latent_frames(count))] = IGNORED
        text = None
        if pipe.text_encoder is not None:
            text, _ = encode_prompts(pipe, sample["caption"], None, None, None, 1, False, pipe.device)
        given = dict(latent_shape=tuple(codes.shape[1:]), encoder_hidden_states=text)
        if "actions" in condition:
            vectors = action_vectors(pipe, condition["actions"], sample["video"].shape[1], sample["fps"])
            given["actions"] = vectors.to(pipe.device)
        logits = pipe.transformer(tokens, **given).logits
        total += F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum").item()
        targets += int((labels[:, 1:] != IGNORED).sum())
    return math.exp(total / targets)


def future(pipe, args, count: int, sample: dict, caption: str | None, seed: int, conditions: dict) -> torch.Tensor:
    """One generated video [3, T, H, W] in [-1, 1] that begins with `count` frames of the sample's; without text no guidance."""
    if isinstance(pipe, CosmosAutoregressivePipeline):
        options = dict(temperature=args.temperature, top_p=args.top_p)
    else:
        guidance = None if caption is None else args.guidance_scale
        options = dict(num_inference_steps=args.num_inference_steps, guidance_scale=guidance)
    if takes_one_action(pipe):
        conditions = conditions | {"actions": conditions["actions"][count - 1 : count]}
    num_frames, height, width = sample["video"].shape[1:]
    result = pipe(
        video=sample["video"][:, :count],
        prompt=None if pipe.text_encoder is None else caption,
        num_conditioning_frames=count,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=sample["fps"],
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **options,
        **conditions,
    )
    return result.frames[0].transpose(0, 1).float().cpu() * 2 - 1


def sample_set(samples: list[dict]) -> str:
    return samples[0]["record"].get("split", "clips")


if __name__ == "__main__":
    main()
