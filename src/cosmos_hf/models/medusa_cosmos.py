"""Several codes per forward pass of an autoregressive world model (arXiv 2501.03575, section 5.2.4), by guessing and checking.

Guesses come from Medusa heads (arXiv 2401.10774) or from the previous latent frame, for much of a video stays as it was. Head i
guesses the code i + 2 places ahead from the hidden state that the next code is predicted from; all heads share the output layer.
Guesses form a tree that one forward pass checks: what the network itself says at every node decides how deep a branch may be
followed. With "exact" acceptance samples have the distribution of `generate`, and in float32 greedy results are its own, code for
code. In bfloat16 and float16 a pass over several codes rounds otherwise than one over a single code, so that where two codes are
nearly as probable the other one may be taken, and the video differs from there on; transformers' assisted decoding does so, too.

In the paper's best recipe the heads, the last two layers and the output layer are trained (`training/train_medusa.py`).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .ar_cache import ReservedCache
from .ar_checks import check_generators
from .ar_generation import nucleus
from .ar_layers import self_attention_cache, with_context_cache
from .offloading import wake

ACCEPTANCES = ("exact", "typical")
DRAFTS = ("heads", "previous_frame")
COPIES = 4


class MedusaHead(nn.Module):
    """A residual layer; it starts as the identity, so that an untrained head guesses what the network says comes next."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + nn.functional.silu(nn.functional.linear(hidden_states, self.weight, self.bias))


@dataclass
class SpeculativeOutput:
    """`sequences` [B, S + new] with the prompt; `forward_passes` of the network, the prompt's included, over all items."""

    sequences: torch.Tensor
    forward_passes: int


@dataclass(frozen=True)
class GuessTree:
    """The nodes that one forward pass checks, parents before children; node 0 is the code that is already certain.

    parents[i]: the node before. depths[i]: 0 for node 0, else the head + 1 that guesses it. choices[i]: which of its guesses.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    choices: tuple[int, ...]

    def ancestors(self) -> torch.Tensor:
        """Which node sees which: bool [nodes, nodes], every node its branch and itself."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if node:
                seen[node] |= seen[parent]
        return seen


def guess_tree(widths: tuple[int, ...]) -> GuessTree:
    """The tree in which head i's `widths[i]` best guesses continue the best branch so far; others are not continued.

    (1, 1, 1) is a chain. Guesses behind a wrong guess are rarely right, so only the first of each depth has children.
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"a tree needs at least one guess per head, got {widths}")
    parents, depths, choices, best = [0], [0], [0], 0
    for depth, width in enumerate(widths, start=1):
        first = len(parents)
        for choice in range(width):
            parents.append(best)
            depths.append(depth)
            choices.append(choice)
        best = first
    return GuessTree(tuple(parents), tuple(depths), tuple(choices))


@torch.no_grad()
def speculative_generate(
    model,
    input_ids: torch.LongTensor,
    max_new_tokens: int | None = None,
    draft: str = "heads",
    widths: tuple[int, ...] | None = None,
    acceptance: str = "exact",
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
    latent_shape: tuple[int, int, int] | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    actions: torch.Tensor | None = None,
    streamer=None,
) -> SpeculativeOutput:
    """Continue videos with guessed codes.

    Args:
        model: `CosmosARForCausalLM`.
        input_ids: [B, S]; items are generated one after the other, since each accepts another number of guesses.
        max_new_tokens: default: as the model's `generation_config` has it, or else the rest of the video.
        draft: "heads" (`medusa_num_heads` > 0 is needed), or "previous_frame": the codes one latent frame before.
        widths: guesses per head, for the first so many heads, by default one of each; for "previous_frame" a 1 for every
            code that is guessed at a time, by default 4: on a processor, each node of a pass costs a further 5 to 10 %.
        acceptance: "exact", or "typical": also guesses whose probability is above min(epsilon, delta * exp(-entropy)), which
            departs from the network's own choice and takes fewer passes.
        temperature, top_p: 0 takes the most probable code; above, codes are drawn.
        generator: a torch generator, or one per item.
        latent_shape, encoder_hidden_states, encoder_attention_mask, actions: as in `CosmosARForCausalLM.forward`.
        streamer: as in `generate`; it is given every item's prompt [1, S], then its codes [1], as they are accepted.
    """
    config = model.config
    _check_choices(config, draft, acceptance, temperature, top_p)
    widths = tuple(widths or (1,) * (config.medusa_num_heads if draft == "heads" else COPIES))
    if draft == "heads" and len(widths) > config.medusa_num_heads:
        raise ValueError(f"widths names {len(widths)} heads, the model has {config.medusa_num_heads}")
    if draft == "previous_frame" and set(widths) != {1}:
        raise ValueError(f"the previous frame gives one guess per code, got widths={widths}")
    check_generators(generator, len(input_ids), "sequences")
    request = {"latent_shape": latent_shape, "encoder_hidden_states": encoder_hidden_states}
    request |= {"encoder_attention_mask": encoder_attention_mask, "max_new_tokens": max_new_tokens, "actions": actions}
    request = {name: value for name, value in request.items() if value is not None}
    count = model._check_request(input_ids, request)
    request.pop("max_new_tokens", None)
    rule = _Rule(acceptance, temperature, top_p, epsilon, delta)
    wake(model)  # what is called below are its parts
    packed = model._packed_decoder(len(input_ids) * count)
    rows, passes = [], 0
    for i in range(len(input_ids)):
        own = {n: v[i : i + 1] if isinstance(v, torch.Tensor) else v for n, v in request.items()}
        source = generator[i] if isinstance(generator, (list, tuple)) else generator
        decoder = _Decoder(model, packed, guess_tree(widths), draft, rule, source, own, input_ids.device)
        rows.append(decoder.run(input_ids[i : i + 1], count, streamer))
        passes += decoder.passes
    return SpeculativeOutput(torch.cat(rows), passes)


def _check_choices(config, draft: str, acceptance: str, temperature: float, top_p: float):
    for name, value, legal in (("draft", draft, DRAFTS), ("acceptance", acceptance, ACCEPTANCES)):
        if value not in legal:
            raise ValueError(f"{name} must be one of {', '.join(legal)}, got {value!r}")
    if draft == "heads" and not config.medusa_num_heads:
        raise ValueError(
            "this model has no Medusa heads (medusa_num_heads=0): train them with training/train_medusa.py, or use "
            "draft='previous_frame'"
        )
    if config._attn_implementation not in ("eager", "sdpa", None):
        raise ValueError(
            f"guesses are checked with a mask that {config._attn_implementation} does not take: call "
            f'model.set_attn_implementation("sdpa") first (or "eager")'
        )
    if temperature < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature must be >= 0 and top_p in [0, 1], got {temperature} and {top_p}")


@dataclass(frozen=True)
class _Rule:
    """How a code is chosen, and which guesses may stand."""

    acceptance: str
    temperature: float
    top_p: float
    epsilon: float
    delta: float

    def follow(self, scores: torch.Tensor, guesses: list[int], generator) -> tuple[int | None, int]:
        """What the network says [V], and the guesses for that place -> (index of the guess that stands or None, the code).

        A draw tries one guess after the other: it stands with its probability; if it does not, it is out of the race for the
        rest. So the code has the network's distribution whatever was guessed.
        """
        if self.temperature == 0 or self.top_p == 0:
            code = int(scores.argmax())
            if code in guesses:
                return guesses.index(code), code
            likely = self._likely(scores, guesses)
            return (None, code) if likely is None else (likely, guesses[likely])
        likely = self._likely(scores, guesses)
        if likely is not None:
            return likely, guesses[likely]
        left = nucleus((scores / self.temperature).softmax(-1)[None], self.top_p)[0]
        for i, guess in enumerate(guesses):
            if _uniform(generator) * float(left.sum()) < float(left[guess]):
                return i, guess
            left[guess] = 0.0
        return None, int((left / _exponential(left, generator)).argmax())

    def _likely(self, scores: torch.Tensor, guesses: list[int]) -> int | None:
        """The most probable guess, where acceptance is typical and it is probable enough."""
        if self.acceptance != "typical" or not guesses:
            return None
        log = scores.log_softmax(-1)
        entropy = float(-(log.exp() * log).sum())
        chances = log[torch.tensor(guesses, device=log.device)].exp()
        best = int(chances.argmax())
        return best if float(chances[best]) > min(self.epsilon, self.delta * math.exp(-entropy)) else None


def _uniform(generator) -> float:
    return float(torch.rand((), generator=generator, device="cpu" if generator is None else generator.device))


def _exponential(like: torch.Tensor, generator) -> torch.Tensor:
    device = like.device if generator is None else generator.device
    return torch.empty(like.shape, device=device).exponential_(1, generator=generator).to(like.device)


class _Decoder:
    """One sequence: a cache, and the loop of guessing, checking and keeping."""

    def __init__(self, model, packed, tree: GuessTree, draft: str, rule: _Rule, generator, inputs: dict, device):
        self.model, self.packed, self.tree, self.draft, self.rule = model, packed, tree, draft, rule
        self.generator, self.inputs, self.passes = generator, inputs, 0
        capacity = model.config.num_positions(inputs.get("latent_shape")) + len(tree.parents)
        self.cache = with_context_cache(ReservedCache(model.config, capacity), model.config)
        self.seen = tree.ancestors().to(device)
        self.depths = torch.tensor(tree.depths, device=device)
        self.children = [
            [i for i, p in enumerate(tree.parents) if i and p == node] for node in range(len(tree.parents))
        ]

    def run(self, prompt: torch.Tensor, count: int, streamer) -> torch.Tensor:
        def tell(tokens: torch.Tensor):
            for code in [] if streamer is None else tokens.cpu().T:
                streamer.put(code)

        if streamer is not None:
            streamer.put(prompt.cpu())
        end = prompt.shape[1] + count
        states = self._forward(prompt)[:, -1:]
        _, code = self.rule.follow(self._scores(states)[0, 0], [], self.generator)
        sequence = torch.cat([prompt, prompt.new_tensor([[code]])], dim=1)
        tell(sequence[:, -1:])
        while sequence.shape[1] < end:
            past = sequence.shape[1] - 1
            # Guesses that would stand behind the last code asked for are not made.
            nodes = int((self.depths < end - past).sum())
            guesses = self._guess(states, sequence, nodes)
            states, accepted, code = self._check(guesses, past)
            new = torch.cat([accepted, accepted.new_tensor([[code]])], dim=1)[:, : end - past - 1]
            sequence = torch.cat([sequence, new], dim=1)
            tell(new)
        if streamer is not None:
            streamer.end()
        return sequence

    def _forward(self, tokens: torch.Tensor, past: int = 0, positions=None, mask=None) -> torch.Tensor:
        """Tokens [1, S] behind `past` others, mask: bool [S, past + S] -> hidden states [1, S, D]."""
        self.passes += 1
        if past and self.packed is not None:
            return self.packed.states(tokens, past, self.cache, positions=positions, mask=mask, **self.inputs)
        if mask is not None:
            mask = mask[None, None]
            if self.model.config._attn_implementation == "eager":
                hidden = torch.finfo(self.model.dtype).min
                mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, hidden)
        out = self.model.model(
            tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True, **self.inputs
        )  # fmt: skip
        for name in ("encoder_hidden_states", "actions"):
            self.inputs.pop(name, None)  # their keys and values are in the cache
        return out.last_hidden_state

    def _scores(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(states) if self.packed is None else self.packed.scores(states)
        return logits[..., : self.model.config.codebook_size].float()

    def _guess(self, states: torch.Tensor, sequence: torch.Tensor, nodes: int) -> torch.Tensor:
        """Hidden state [1, 1, D] that the sequence's last code came from -> codes of the tree's first nodes [1, n], n <= nodes."""
        last = sequence[:, -1:]
        if self.draft == "previous_frame":
            start = self._previous_frame(sequence)
            return last if start is None else torch.cat([last, sequence[:, start : start + nodes - 1]], dim=1)
        widths = [self.tree.depths[:nodes].count(d) for d in range(1, 1 + max(self.tree.depths[:nodes]))]
        if not widths:
            return last
        if self.packed is None:
            scores = self._scores(torch.cat([head(states) for head in self.model.medusa_heads[: len(widths)]], dim=1))
        else:
            scores = self.packed.guesses(states, len(widths))[..., : self.model.config.codebook_size]
        return torch.cat([last, *(scores[:, i].topk(width).indices for i, width in enumerate(widths))], dim=1)

    def _previous_frame(self, sequence: torch.Tensor) -> int | None:
        """Where the next place stands in the latent frame before; None in the first."""
        config = self.model.config
        _, height, width = self.inputs.get("latent_shape") or config.latent_shape
        start = sequence.shape[1] - height * width
        return None if start < (config.bov_token_id is not None) else start

    def _check(self, guesses: torch.Tensor, past: int):
        """One forward pass over the tree -> (state behind the last accepted node, accepted codes [1, n], the code after them)."""
        nodes = guesses.shape[1]
        mask = None
        if nodes > 1:
            mask = torch.cat([self.seen.new_ones(nodes, past), self.seen[:nodes, :nodes]], dim=1)
        states = self._forward(guesses, past, (past + self.depths[:nodes])[None], mask)
        scores, codes = self._scores(states)[0], guesses[0].tolist()
        path = [0]
        while True:
            children = [child for child in self.children[path[-1]] if child < nodes]
            chosen, code = self.rule.follow(scores[path[-1]], [codes[child] for child in children], self.generator)
            if chosen is None:
                break
            path.append(children[chosen])
        self._keep(past, path, nodes)
        index = torch.tensor(path, device=guesses.device)
        return states[:, path[-1]][:, None], guesses[:, index[1:]], code

    def _keep(self, past: int, path: list[int], nodes: int):
        """Leave in the cache what was accepted."""
        kept = len(path)
        for layer in self_attention_cache(self.cache).layers:
            if path == list(range(kept)):
                layer.crop(kept - nodes)
            else:
                layer.keep(past, past + torch.tensor(path, device=layer.keys.device))
