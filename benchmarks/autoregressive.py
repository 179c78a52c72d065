"""Cached decoding and prefill: ours, transformers' `LlamaForCausalLM` of the same shape, and the memory's limit.

    python benchmarks/autoregressive.py --sizes 88m 300m

Every round times all contestants in turn, so that a busy machine is busy for all; figures are medians over the rounds of what was
measured in the same round. A contestant's time is that of its whole `generate` call, prompt and preparations included. The limit is
the bytes that one code needs (all weights but the embedding's, and the mean of the cache) over the bandwidth of adding up the same
weights. Memory is the peak of a process of its own beyond the weights.
"""

import argparse
import json
import statistics

import torch
from measuring import RESULTS, in_new_process, keep, machine, peak_of, seconds, show
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from cosmos_hf import CosmosARConfig, CosmosARForCausalLM

SIZES = {  # hidden size, layers, codes to generate
    "tiny": (64, 2, 32),
    "88m": (512, 8, 256),
    "300m": (1024, 14, 128),
}
CODES, SIDE, CACHES = 64000, 16, ("dynamic", "static")


def build(who: str, size: str, args):
    hidden, layers, _ = SIZES[size]
    shape = dict(
        vocab_size=CODES, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), head_dim=64,
    )  # fmt: skip
    frames = -(-(args.prompt + SIZES[size][2]) // SIDE**2)
    with no_init_weights():
        if who == "ours":
            model = CosmosARForCausalLM(CosmosARConfig(**shape, latent_shape=(frames, SIDE, SIDE)))
        else:
            config = LlamaConfig(
                **shape, max_position_embeddings=frames * SIDE**2, bos_token_id=None, eos_token_id=None
            )
            model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return model.to(args.device, getattr(torch, args.dtype)).eval()


def prompt(args) -> torch.Tensor:
    return torch.randint(0, CODES, (1, args.prompt), generator=torch.Generator().manual_seed(0)).to(args.device)


def generation(model, args, new: int, cache: str):
    own = {} if isinstance(model, CosmosARForCausalLM) else dict(min_new_tokens=new, do_sample=False)
    return lambda: model.generate(prompt(args), max_new_tokens=new, cache_implementation=cache, **own)


def speed(size: str, args) -> dict:
    new = SIZES[size][2]
    models = {who: build(who, size, args) for who in ("ours", "llama")}
    calls = {f"{who} {cache}": generation(m, args, new, cache) for who, m in models.items() for cache in CACHES}
    calls |= {
        f"{who} prefill": lambda m=m: m(prompt(args), use_cache=True, logits_to_keep=1) for who, m in models.items()
    }
    ours = models["ours"]
    read = [p for p in ours.parameters() if p is not ours.model.embed_tokens.weight]
    weights = sum(p.numel() * p.element_size() for p in read)
    config = ours.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * read[0].element_size()
    per_code = weights + per_token * (args.prompt + new / 2)
    passes = max(1, int(4e9 / weights))
    calls["stream"] = lambda: [p.view(-1).sum() for _ in range(passes) for p in read]
    for model in models.values():
        for cache in CACHES:
            generation(model, args, 20, cache)()
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: seconds(call) for name, call in calls.items()})
        rounds[-1]["limit"] = new * rounds[-1]["stream"] / passes * per_code / weights

    def median(of):
        return round(statistics.median(of(r) for r in rounds), 3)

    return {
        "parameters_million": round(sum(p.numel() for p in ours.parameters()) / 1e6, 1),
        "codes": new,
        "megabytes_per_code": round(per_code / 1e6, 1),
        "bandwidth_gb_per_s": median(lambda r: passes * weights / r["stream"] / 1e9),
        "limit_codes_per_s": median(lambda r: new / r["limit"]),
        "rows": [
            {
                "contestant": f"{who} {cache}",
                "codes_per_s": median(lambda r, n=f"{who} {cache}": new / r[n]),
                "share_of_limit": median(lambda r, n=f"{who} {cache}": r["limit"] / r[n]),
                "over_llama": median(lambda r, n=f"{who} {cache}", c=cache: r[f"llama {c}"] / r[n]),
            }
            for who in models
            for cache in CACHES
        ],
        "prefill_tokens_per_s": {who: median(lambda r, w=who: args.prompt / r[f"{w} prefill"]) for who in models},
        "prefill_over_llama": median(lambda r: r["llama prefill"] / r["ours prefill"]),
        "seconds": rounds,
    }  # fmt: skip


def memory(who: str, size: str, args) -> float:
    """MiB of one generation beyond the weights, with the same prompt, precision and device."""
    same = ("--prompt", str(args.prompt), "--dtype", args.dtype, "--device", args.device)
    (peak,) = in_new_process(who, size, *same)
    return peak


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["88m", "300m"], choices=SIZES)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--no_memory", action="store_true", help="do not measure memory")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        who, size = args.measure
        print(peak_of(generation(build(who, size, args), args, SIZES[size][2] // 4, "dynamic"), args.device))
        return
    path = RESULTS / "autoregressive.json"
    figures = json.loads(path.read_text()) if path.exists() else {}  # other sizes' stay
    for size in args.sizes:
        figures[size] = row = {**speed(size, args), "made_by": machine(argv)}
        keep("autoregressive", figures)  # before anything else can fail
        if not args.no_memory:
            row["peak_mib_beyond_weights"] = {who: round(memory(who, size, args)) for who in ("ours", "llama")}
            keep("autoregressive", figures)
        show(row["rows"])
        print({name: value for name, value in row.items() if name not in ("rows", "seconds", "made_by")})


if __name__ == "__main__":
    main()
