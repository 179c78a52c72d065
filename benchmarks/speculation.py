"""Forward passes and codes per second with guessed codes: Medusa heads and copies, next to none.

    python benchmarks/speculation.py --model runs/medusa9/export --data datasets/tabletop/val_iid

Every contestant continues the same held-out clips from their first latent frame, greedily; the results must equal plain decoding.
A model with 9 heads is measured with 0, 3, 6 and 9 of them. Copies come from the previous latent frame, or from transformers' own
prompt lookup: what stood behind the latest codes when they first appeared.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from measuring import machine, show

from cosmos_hf import CosmosAutoregressivePipeline
from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.video import to_float
from cosmos_hf.models.medusa_cosmos import speculative_generate
from cosmos_hf.pipelines.encode import encode_text


@torch.no_grad()
def prompts(pipe, data: str, count: int):
    """First latent frames of held-out clips [B, 1 + H' W' or H' W'], with the arguments that the transformer needs beside them."""
    config, clips = pipe.transformer.config, ClipDataset(data, num_frames=pipe.config.num_frames, random=False)
    samples = [clips[i] for i in range(count)]
    frames = torch.stack([to_float(sample["video"][:, :1]) for sample in samples]).to(pipe.device)
    codes = torch.cat([pipe.vae.encode(frame[None]).indices for frame in frames])
    height, width = codes.shape[2:]
    prompt, inputs = (
        codes.flatten(1),
        {"latent_shape": (pipe.vae.latent_frames(pipe.config.num_frames), height, width)},
    )
    if config.bov_token_id is not None:
        prompt = torch.cat([prompt.new_full((count, 1), config.bov_token_id), prompt], dim=1)
    if config.cross_attention_dim is not None:
        captions = [sample["caption"] for sample in samples]
        inputs["encoder_hidden_states"] = encode_text(
            pipe.tokenizer, pipe.text_encoder, captions, pipe.config.max_sequence_length, pipe.device
        )
    return prompt, inputs


def measure(prompt, inputs, work) -> tuple[torch.Tensor, int, float]:
    """`work(prompt of one item, its inputs) -> (sequences, passes)` for every item in turn: sequences, passes, seconds."""
    rows, passes, started = [], 0, time.perf_counter()
    for i in range(len(prompt)):
        own = {name: v[i : i + 1] if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        sequences, count = work(prompt[i : i + 1], own)
        rows.append(sequences)
        passes += count
    return torch.cat(rows), passes, time.perf_counter() - started


def contestants(model, copies: list[int]) -> dict:
    def plain(prompt, inputs):
        return model.generate(prompt, **inputs), model.config.num_positions(inputs["latent_shape"]) - prompt.shape[1]

    def guessed(**options):
        def work(prompt, inputs):
            out = speculative_generate(model, prompt, **inputs, **options)
            return out.sequences, out.forward_passes

        return work

    def looked_up(count):
        def work(prompt, inputs):
            calls = []
            watch = model.model.register_forward_hook(lambda *_: calls.append(1))
            sequences = model.generate(prompt, prompt_lookup_num_tokens=count, **inputs)
            watch.remove()
            return sequences, len(calls)

        return work

    heads = model.config.medusa_num_heads
    made = {"0 heads": plain}
    made |= {f"{n} heads": guessed(widths=(1,) * n) for n in sorted({3, 6, 9, heads}) if 0 < n <= heads}
    if heads:
        made[f"{heads} heads, tree"] = guessed(widths=tuple(max(1, 4 - i) for i in range(heads)))
    made |= {f"previous frame, {n} copies": guessed(draft="previous_frame", widths=(1,) * n) for n in copies}
    return made | {f"prompt lookup, {n} copies": looked_up(n) for n in copies}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="folders of pipelines")
    parser.add_argument("--data", required=True, help="held-out clips")
    parser.add_argument("--num_clips", type=int, default=4)
    parser.add_argument("--copies", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--output", default="benchmarks/results/speculation.json")
    args = parser.parse_args(argv)
    result = {}
    for folder in args.model:
        pipe = CosmosAutoregressivePipeline.from_pretrained(folder)
        prompt, inputs = prompts(pipe, args.data, args.num_clips)
        rows, expected = {}, None
        for name, work in contestants(pipe.transformer, args.copies).items():
            sequences, passes, seconds = measure(prompt, inputs, work)
            expected = sequences if expected is None else expected
            codes = sequences.numel() - prompt.numel()
            rows[name] = {
                "forward_passes": passes / args.num_clips,
                "codes_per_s": round(codes / seconds, 1),
                "as_plain": round((sequences == expected).float().mean().item(), 6),
            }
        show([{"guesses": name, **row} for name, row in rows.items()])
        result[str(folder)] = rows
    result["settings"] = vars(args)
    result["made_by"] = machine(argv)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
