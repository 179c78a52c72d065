"""Cached decoding and prefill, in one run: ours, transformers' `LlamaForCausalLM` of the same shape, and the memory's limit.

    python benchmarks/autoregressive.py --hidden 512 --layers 8 --codes 64000

Each round times every contestant once, one after the other, so that a busy machine is busy for all; the median round is reported.
The limit is the bytes of the weights that a code needs over the bandwidth of a matrix-vector product measured in the same rounds.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from cosmos_hf import CosmosARConfig, CosmosARForCausalLM


def build(args):
    shape = dict(
        vocab_size=args.codes, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 128), head_dim=64,
    )  # fmt: skip
    side = 16
    frames = -(-(args.prompt + args.new) // side**2)
    ours = CosmosARForCausalLM(CosmosARConfig(**shape, latent_shape=(frames, side, side)))
    theirs = LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=frames * side**2, bos_token_id=None, eos_token_id=None)
    )
    return {
        name: model.to(args.device, getattr(torch, args.dtype)).eval()
        for name, model in (("ours", ours), ("llama", theirs))
    }


def clock(args, work) -> float:
    if args.device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bandwidth(args, matrix, vector) -> float:
    """Bytes per second of matrix-vector products with the size of the output layer."""
    repeats = 20
    seconds = clock(args, lambda: [torch.nn.functional.linear(vector, matrix) for _ in range(repeats)])
    return repeats * matrix.numel() * matrix.element_size() / seconds


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 512),
        ("layers", 8),
        ("codes", 64000),
        ("prompt", 64),
        ("new", 64),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", default="benchmarks/results/autoregressive.json")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    models = build(args)
    prompt = torch.randint(0, args.codes, (1, args.prompt), device=args.device)
    matrix = models["ours"].lm_head.weight
    vector = torch.randn(1, args.hidden, device=args.device, dtype=matrix.dtype)
    weights = sum(p.numel() * p.element_size() for p in models["ours"].parameters())
    weights -= models["ours"].model.embed_tokens.weight.numel() * matrix.element_size()  # one row of it is read

    def decode(name, cache):
        return lambda: models[name].generate(
            prompt, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False, cache_implementation=cache
        ) if name == "llama" else models[name].generate(prompt, max_new_tokens=args.new, cache_implementation=cache)  # fmt: skip

    contestants = {f"{name} {cache}": decode(name, cache) for name in models for cache in ("dynamic", "static")}
    prefills = {name: (lambda name=name: models[name](prompt, use_cache=True, logits_to_keep=1)) for name in models}
    seconds = {name: [] for name in [*contestants, *(f"{n} prefill" for n in prefills), "bandwidth"]}
    for i in range(args.rounds + 1):  # the first round warms up
        measured = {name: clock(args, work) for name, work in contestants.items()}
        measured |= {f"{name} prefill": clock(args, work) for name, work in prefills.items()}
        measured["bandwidth"] = bandwidth(args, matrix, vector)
        for name, value in measured.items() if i else ():
            seconds[name].append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    limit = median["bandwidth"] / weights
    rate = {name: args.new / median[name] for name in contestants}
    result = {
        "parameters_million": round(sum(p.numel() for p in models["ours"].parameters()) / 1e6, 1),
        "bandwidth_gb_per_s": round(median["bandwidth"] / 1e9, 2),
        "limit_codes_per_s": round(limit, 1),
        "codes_per_s": {name: round(value, 1) for name, value in rate.items()},
        "share_of_limit": {name: round(value / limit, 3) for name, value in rate.items()},
        "ours_over_llama": {c: round(rate[f"ours {c}"] / rate[f"llama {c}"], 2) for c in ("dynamic", "static")},
        "prefill_tokens_per_s": {name: round(args.prompt / median[f"{name} prefill"], 1) for name in prefills},
        "settings": vars(args),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(result, indent=2))
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
