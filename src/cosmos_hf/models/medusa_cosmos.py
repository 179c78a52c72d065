"""Medusa (arXiv 2401.10774) for the autoregressive world models (arXiv 2501.03575, section 5.2.4): several codes per forward pass.

Head i guesses the code i + 2 places ahead from the hidden state that the next code is predicted from; all heads share the output
layer. The guesses of all heads form a tree that one forward pass checks: the network's own prediction at every node says how
deep a branch may be followed. With "exact" acceptance the result is that of greedy decoding, code for code.

In the paper's best recipe the heads, the last two layers and the output layer are trained (`training/train_medusa.py`).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

ACCEPTANCES = ("exact", "typical")


class MedusaHead(nn.Module):
    """A residual layer; it starts as the identity, so that an untrained head guesses what the network says comes next."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + nn.functional.silu(nn.functional.linear(hidden_states, self.weight, self.bias))


@dataclass
class MedusaOutput:
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
def medusa_generate(
    model,
    input_ids: torch.LongTensor,
    max_new_tokens: int | None = None,
    acceptance: str = "exact",
    widths: tuple[int, ...] | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
    latent_shape: tuple[int, int, int] | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
) -> MedusaOutput:
    """Continue videos greedily with guessed codes.

    Args:
        model: `CosmosARForCausalLM` with `medusa_num_heads` > 0.
        input_ids: [B, S]; items are generated one after the other, since each accepts another number of guesses.
        max_new_tokens: default: the rest of the video.
        acceptance: "exact": guesses that are the network's own greedy choice; "typical": also those whose probability is above
            min(epsilon, delta * exp(-entropy)), which follows less the greedy result and takes fewer passes.
        widths: guesses per head, for the first so many heads; default: one of each.
        latent_shape, encoder_hidden_states, encoder_attention_mask: as in `CosmosARForCausalLM.forward`.
    """
    config = model.config
    if not config.medusa_num_heads:
        raise ValueError(
            "this model has no Medusa heads (medusa_num_heads=0): train them with training/train_medusa.py"
        )
    if acceptance not in ACCEPTANCES:
        raise ValueError(f"acceptance must be one of {', '.join(ACCEPTANCES)}, got {acceptance!r}")
    widths = tuple(widths or (1,) * config.medusa_num_heads)
    if len(widths) > config.medusa_num_heads:
        raise ValueError(f"widths names {len(widths)} heads, the model has {config.medusa_num_heads}")
    request = {"latent_shape": latent_shape, "encoder_hidden_states": encoder_hidden_states}
    request |= {"encoder_attention_mask": encoder_attention_mask, "max_new_tokens": max_new_tokens}
    request = {name: value for name, value in request.items() if value is not None}
    model._check_request(input_ids, request)
    count = request.pop("max_new_tokens", model.generation_config.max_new_tokens)
    rows, passes = [], 0
    for i in range(len(input_ids)):
        own = {n: v[i : i + 1] if isinstance(v, torch.Tensor) else v for n, v in request.items()}
        decoder = _Decoder(model, guess_tree(widths), acceptance, epsilon, delta, own)
        rows.append(decoder.run(input_ids[i : i + 1], count))
        passes += decoder.passes
    return MedusaOutput(torch.cat(rows), passes)


class _Decoder:
    """One sequence: a cache, and the loop of guessing, checking and keeping."""

    def __init__(self, model, tree: GuessTree, acceptance: str, epsilon: float, delta: float, inputs: dict):
        self.model, self.tree, self.inputs = model, tree, inputs
        self.acceptance, self.epsilon, self.delta = acceptance, epsilon, delta
        cache = DynamicCache(config=model.config)
        if model.config.cross_attention_dim is not None:
            cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        self.cache, self.passes = cache, 0
        self.seen = tree.ancestors().to(model.device)
        self.depths = torch.tensor(tree.depths, device=model.device)

    def run(self, prompt: torch.Tensor, count: int) -> torch.Tensor:
        length, capacity = prompt.shape[1], self.model.config.num_positions(self.inputs.get("latent_shape"))
        states = self._forward(prompt)[:, -1:]
        tokens, code = [], self._scores(states).argmax(-1)  # [1, 1]
        while True:
            tokens.append(code)
            if sum(part.shape[1] for part in tokens) >= count:
                break
            past = length + sum(part.shape[1] for part in tokens) - 1
            # Guesses that would stand behind the video's end are not made.
            nodes = int((self.depths < capacity - past).sum())
            guesses = self._guess(states, code, nodes)
            states, accepted, code = self._check(guesses, past, nodes)
            if accepted.shape[1]:
                tokens.append(accepted)
        new = torch.cat(tokens, dim=1)[:, :count]
        return torch.cat([prompt, new], dim=1)

    def _forward(self, tokens: torch.Tensor, **more) -> torch.Tensor:
        self.passes += 1
        out = self.model.model(tokens, past_key_values=self.cache, use_cache=True, **self.inputs, **more)
        if self.model.config.cross_attention_dim is not None and "encoder_attention_mask" not in self.inputs:
            self.inputs.pop("encoder_hidden_states", None)  # its keys and values are in the cache
        return out.last_hidden_state

    def _scores(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(states)[..., : self.model.config.codebook_size].float()

    def _guess(self, states: torch.Tensor, code: torch.Tensor, nodes: int) -> torch.Tensor:
        """Hidden state [1, 1, D] that `code` was predicted from -> codes of the tree's first nodes [1, nodes]."""
        guesses = [code]
        widths = [self.tree.depths[:nodes].count(d) for d in range(1, 1 + max(self.tree.depths[:nodes]))]
        if widths:
            heads = [head(states) for head in self.model.medusa_heads[: len(widths)]]
            scores = self._scores(torch.cat(heads, dim=1))
            guesses += [scores[:, i].topk(width).indices for i, width in enumerate(widths)]
        return torch.cat(guesses, dim=1)

    def _check(self, guesses: torch.Tensor, past: int, nodes: int):
        """One forward pass over the tree -> (state behind the last accepted node, accepted codes [1, n], the code after them)."""
        mask = None
        if nodes > 1:
            seen = torch.cat([self.seen.new_ones(nodes, past), self.seen[:nodes, :nodes]], dim=1)[None, None]
            mask = seen
            if self.model.config._attn_implementation == "eager":
                mask = torch.zeros_like(seen, dtype=self.model.dtype)
                mask = mask.masked_fill(~seen, torch.finfo(self.model.dtype).min)
        positions = (past + self.depths[:nodes])[None]
        states = self._forward(guesses, attention_mask=mask, position_ids=positions)
        scores = self._scores(states)[0]
        best = scores.argmax(-1)
        path = [0]
        while (following := self._accept(path[-1], guesses[0], best, scores, nodes)) is not None:
            path.append(following)
        self._keep(past, path, nodes)
        index = torch.tensor(path, device=guesses.device)
        return states[:, path[-1]][:, None], guesses[:, index[1:]], best[index[-1]].view(1, 1)

    def _accept(self, node: int, guesses, best, scores, nodes: int) -> int | None:
        """The child of a node that may follow it, or None."""
        children = [i for i in range(1, nodes) if self.tree.parents[i] == node]
        for child in children:
            if guesses[child] == best[node]:
                return child
        if self.acceptance == "typical" and children:
            log = scores[node].log_softmax(-1)
            entropy = -(log.exp() * log).sum()
            least = torch.minimum(torch.tensor(self.epsilon), self.delta * (-entropy).exp())
            likely = [child for child in children if log[guesses[child]].exp() > least]
            if likely:
                return max(likely, key=lambda child: float(log[guesses[child]]))
        return None

    def _keep(self, past: int, path: list[int], nodes: int):
        """Leave in the cache what was accepted."""
        if path == list(range(nodes)):
            return
        cache: Cache = self.cache.self_attention_cache if isinstance(self.cache, EncoderDecoderCache) else self.cache
        index = torch.tensor([past + node for node in path])
        in_place = path == list(range(len(path)))
        for layer in cache.layers:
            if in_place:
                layer.keys = layer.keys[:, :, : past + len(path)]
                layer.values = layer.values[:, :, : past + len(path)]
            else:
                rows = torch.cat([torch.arange(past), index]).to(layer.keys.device)
                layer.keys, layer.values = layer.keys[:, :, rows], layer.values[:, :, rows]
