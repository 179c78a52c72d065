"""Measure a video-to-world pipeline and its tokenizer on held-out clips, next to still pictures.

    python pipelines/evaluate_model.py --data datasets/tabletop/val_iid datasets/tabletop/val_combo --output evaluation.json

For every set: the tokenizer's reconstruction, and the future predicted from 1 and from 9 frames with the clip's caption as
the prompt and the clip's index as the seed, against "copy the last frame" and "mean frame" (see cosmos_hf.evaluation). The
model is a diffusion or an autoregressive one; of an autoregressive one also the perplexity of the true codes is given.
`--instructions` asks of clips of the table-top world with one frame given whether the right object moves the right way, also
with another instruction for the same frame. `--adapter` loads what training/posttrain.py made; actions and cameras that it takes
are those of the clips, and for comparison ("exchanged", with two clips or more) others'.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cosmos_hf import CosmosAutoregressivePipeline, CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.data.clips import ClipDataset, data_names
from cosmos_hf.data.video import contact_sheet, to_float, to_uint8
from cosmos_hf.evaluation.instructions import evaluate_instructions
from cosmos_hf.evaluation.perceptual import PerceptualDistance
from cosmos_hf.evaluation.reconstruction import evaluate_reconstruction
from cosmos_hf.evaluation.worlds import score_future, summarise_futures
from cosmos_hf.models.ar_loss import IGNORED, ignored_tokens
from cosmos_hf.pipelines.conditions import action_vectors, takes_one_action
from cosmos_hf.pipelines.encode import encode_prompts
from cosmos_hf.pipelines.loading import pipeline_class
from cosmos_hf.pipelines.scripting import provenance, report

PIPELINES = (CosmosVideo2WorldPipeline, CosmosAutoregressivePipeline)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=nano_path("video2world"))
    parser.add_argument("--adapter", help="folder of an adapter, as training/posttrain.py writes it")
    parser.add_argument("--data", nargs="+", required=True, help="folders of held-out clips")
    parser.add_argument("--output", default="outputs/evaluation.json")
    parser.add_argument("--num_clips", type=int, default=16, help="of each set")
    parser.add_argument("--conditioning_frames", type=int, nargs="+", default=[1, 9])
    parser.add_argument("--instructions", action="store_true", help="also judge whether instructions are followed")
    parser.add_argument("--num_inference_steps", type=int, help="diffusion models")
    parser.add_argument("--guidance_scale", type=float, help="diffusion models")
    parser.add_argument("--temperature", type=float, help="autoregressive models")
    parser.add_argument("--top_p", type=float, help="autoregressive models")
    parser.add_argument("--no_perceptual", action="store_true", help="leave out the learned distance (extra `eval`)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with report(parser):
        pipe = pipeline_class(args.model, PIPELINES).from_pretrained(args.model).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        if args.adapter:
            pipe.load_lora_weights(args.adapter)
        perceptual = None if args.no_perceptual else PerceptualDistance().to(args.device)
        figures = {"made_by": provenance(args, pipe)}
        for name, path in zip(data_names(args.data), args.data, strict=True):
            clips = ClipDataset(path, num_frames=pipe.call_default("num_frames"), random=False)
            samples = [clips[i] for i in range(min(args.num_clips, len(clips)))]
            entry = {
                "tokenizer": evaluate_reconstruction(reconstructor(pipe.vae), samples, perceptual, args.device)[
                    "summary"
                ]
            }
            for count in args.conditioning_frames:
                sheet = Path(args.output).with_suffix("") / f"{name.replace('/', '-')}-{count}.png"
                entry[f"from_{count}_frames"] = futures(pipe, samples, count, args, sheet)
                if isinstance(pipe, CosmosAutoregressivePipeline):
                    entry[f"from_{count}_frames"]["perplexity"] = perplexity(pipe, samples, count)
                if len(samples) > 1 and (given := conditions_of(pipe)):
                    others = [sample | {key: samples[i - 1][key] for key in given} for i, sample in enumerate(samples)]
                    sheet = sheet.with_name(f"{sheet.stem}-exchanged.png")
                    entry[f"from_{count}_frames"]["exchanged"] = futures(pipe, others, count, args, sheet)["model"]
            if args.instructions:
                entry["instructions"] = evaluate_instructions(partial(future, pipe, args, 1), samples)
            figures[name] = entry
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(figures, indent=1))
    print(f"{args.output}: {', '.join(key for key in figures if key != 'made_by')}")


def reconstructor(vae):
    return torch.no_grad()(lambda video: vae(video).sample)


def futures(pipe, samples: list[dict], count: int, args, sheet: Path) -> dict:
    """Predict every sample's future from `count` frames; summary of the scores, and the best and worst as a contact sheet."""
    scores, videos, took = [], [], []
    for seed, sample in enumerate(tqdm(samples, desc=f"{sample_set(samples)}, {count} frames", unit="clip")):
        started = time.perf_counter()
        generated = future(pipe, args, count, sample, sample["caption"], seed)[None]
        took.append(time.perf_counter() - started)
        masks = sample["masks"][None] if "masks" in sample else None
        scores.append(score_future(generated, to_float(sample["video"])[None], count, masks))
        videos.append(to_uint8(generated[0]))
    order = sorted(range(len(scores)), key=lambda i: scores[i]["model"]["psnr"].mean().item())
    rows, shown = {}, list(range(0, videos[0].shape[1], 2))
    for label, i in (("best", order[-1]), ("median", order[len(order) // 2]), ("worst", order[0])):
        rows[f"{label}: {samples[i]['caption']}"] = videos[i][:, shown]
        rows[f"{label}: what really happened"] = samples[i]["video"][:, shown]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, [f"frame {t}" for t in shown]).save(sheet)
    predicted = (videos[0].shape[1] - count) / samples[0]["fps"]
    return summarise_futures(scores) | {"seconds_per_generated_second": sum(took) / len(took) / predicted}


@torch.no_grad()
def perplexity(pipe: CosmosAutoregressivePipeline, samples: list[dict], count: int) -> float:
    """Of the codes of what really happened, given those of the first `count` frames and, where the model takes it, the caption."""
    total = targets = 0
    for sample in samples:
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
        if "actions" in pipe.transformer.conditions:
            given["actions"] = action_vectors(pipe, sample["actions"], sample["video"].shape[1], sample["fps"]).to(
                pipe.device
            )
        logits = pipe.transformer(tokens, **given).logits
        total += F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum").item()
        targets += int((labels[:, 1:] != IGNORED).sum())
    return math.exp(total / targets)


def future(pipe, args, count: int, sample: dict, caption: str, seed: int) -> torch.Tensor:
    """One generated video [3, T, H, W] in [-1, 1] that begins with `count` frames of the sample's."""
    if isinstance(pipe, CosmosAutoregressivePipeline):
        options = dict(temperature=args.temperature, top_p=args.top_p)
    else:
        options = dict(num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    takes_text = pipe.text_encoder is not None
    conditions = {name: sample[name] for name in conditions_of(pipe)}
    if takes_one_action(pipe):
        conditions["actions"] = sample["actions"][count - 1 : count]
    height, width = sample["video"].shape[2:]
    result = pipe(
        video=sample["video"][:, :count],
        prompt=caption if takes_text else None,
        num_conditioning_frames=count,
        height=height,
        width=width,
        fps=sample["fps"],
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **options,
        **conditions,
    )
    return result.frames[0].transpose(0, 1).float().cpu() * 2 - 1


def conditions_of(pipe) -> list[str]:
    """The arrays of a sample that the model takes."""
    return [name for name in ("actions", "camera") if name in pipe.transformer.conditions]


def sample_set(samples: list[dict]) -> str:
    return samples[0]["record"].get("split", "clips")


if __name__ == "__main__":
    main()
