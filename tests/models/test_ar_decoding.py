"""Decoding with packed weights says what the model says, is used where it can be, and only there; and its cache."""

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from cosmos_hf.models import ar_generation
from cosmos_hf.models.ar_cache import ReservedCache
from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.ar_decoding import PackedDecoder, can_pack
from cosmos_hf.models.ar_layers import with_context_cache

SMALL = PRESETS["tiny"] | dict(vocab_size=100, embedding_size=164, medusa_num_heads=2)
KINDS = {
    "plain": {},
    "text": dict(cross_attention_dim=16, absolute_positions="every_layer", bov_token_id=100),
    "some text": dict(cross_attention_dim=16, cross_attention_every=2, absolute_positions="once", bov_token_id=100),
}


def build(kind="plain", **changes):
    torch.manual_seed(0)
    model = CosmosARForCausalLM(CosmosARConfig(**SMALL | KINDS[kind] | changes)).eval()
    for name, parameter in model.named_parameters():  # large enough that every input matters
        torch.nn.init.normal_(parameter, std=0.2)
        if "norm" in name:
            parameter.data += 1
    return model


def prompt(batch=2, length=8):
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(0))


def context(model, batch=2):
    if model.config.cross_attention_dim is None:
        return {}
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])[:batch]
    return dict(encoder_hidden_states=torch.randn(batch, 5, 16), encoder_attention_mask=mask)


def filled(model, tokens, text, kind):
    """A cache that has seen the tokens."""
    made = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(model.config, max_cache_len=40),
        "reserved": lambda: ReservedCache(model.config, 12),
    }
    cache = with_context_cache(made[kind](), model.config)
    model(tokens, past_key_values=cache, use_cache=True, **text)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", "reserved"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_code_after_the_other(kind, cache):
    model = build(kind)
    text, tokens = context(model), prompt(length=14)
    expected = model(tokens, latent_shape=(2, 4, 6), **text).logits
    decoder, past = PackedDecoder(model), filled(model, tokens[:, :8], text | dict(latent_shape=(2, 4, 6)), cache)
    text.pop("encoder_hidden_states", None)
    for place in range(8, 14):
        states = decoder.states(tokens[:, place : place + 1], place, past, latent_shape=(2, 4, 6), **text)
        scores = decoder.scores(states)
        torch.testing.assert_close(scores[:, 0], expected[:, place], atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_of_guesses(kind):
    model = build(kind)
    text, tokens = context(model, 1), prompt(1, 9)
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    mask = torch.cat([torch.ones(4, 9, dtype=torch.bool), seen], dim=1)
    more = dict(encoder_attention_mask=text.get("encoder_attention_mask"))
    guesses, positions = prompt(1, 4), torch.tensor([[9, 10, 10, 11]])
    expected = model.model(
        guesses, attention_mask=mask[None, None], position_ids=positions,
        past_key_values=filled(model, tokens, text, "dynamic"), use_cache=True, **more,
    ).last_hidden_state  # fmt: skip
    decoder = PackedDecoder(model)
    states = decoder.states(
        guesses, 9, filled(model, tokens, text, "reserved"), positions=positions, mask=mask, **more
    )
    torch.testing.assert_close(states, expected, atol=2e-4, rtol=1e-4)
    heads = [model.lm_head(head(states[:, -1:])) for head in model.medusa_heads]
    torch.testing.assert_close(decoder.guesses(states[:, -1:], 2), torch.cat(heads, 1), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(decoder.guesses(states[:, -1:], 1), heads[0], atol=2e-4, rtol=1e-4)


def calls_of(model, call) -> tuple[torch.Tensor, int]:
    """The result, and how often the network itself ran."""
    count, forward = [], type(model.model).forward
    try:
        type(model.model).forward = lambda self, *a, **k: count.append(1) or forward(self, *a, **k)
        return call(), len(count)
    finally:
        type(model.model).forward = forward


@pytest.mark.parametrize("more", [{}, dict(do_sample=True, top_p=0.9), dict(cache_implementation="static")])
@pytest.mark.parametrize("kind", ["plain", "text"])
def test_generate_uses_it_and_gives_the_same(kind, more):
    model = build(kind)
    text = context(model)
    results = []
    for packs in (True, False):
        model.packs_weights = packs
        if more.get("do_sample"):
            more["generator"] = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        out, count = calls_of(model, lambda: model.generate(prompt(), max_new_tokens=20, **text, **more))
        assert count == (1 if packs else 20)
        results.append(out)
    assert torch.equal(*results)
    model.packs_weights = True
    assert calls_of(model, lambda: model.generate(prompt(), max_new_tokens=15, **text))[1] == 15  # not worth the copy


def test_weights_may_change_between_generations():
    model = build()
    before = model.generate(prompt(), max_new_tokens=20)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    after = model.generate(prompt(), max_new_tokens=20)
    model.packs_weights = False
    assert torch.equal(after, model.generate(prompt(), max_new_tokens=20)) and not torch.equal(before, after)


def test_it_stands_in_only_for_what_it_knows():
    from peft import LoraConfig, get_peft_model

    assert can_pack(build("text"))
    hooked, replaced, eager = build(), build(), build()
    seen = []
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    replaced.model.layers[0].forward = replaced.model.layers[0].forward
    eager.set_attn_implementation("eager")
    adapted = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    assert not can_pack(adapted.base_model.model)
    parametrized = build()
    torch.nn.utils.parametrizations.weight_norm(parametrized.lm_head)
    for model in (hooked, replaced, eager, build().bfloat16(), build().train(), parametrized):
        assert not can_pack(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_pack(build())
    hooked.generate(prompt(), max_new_tokens=20)
    assert len(seen) == 20


# ---- the cache ---------------------------------------------------------------------------------------------------------


def states(length, start=0, batch=2):
    made = torch.arange(start, start + length, dtype=torch.float32)[None, None, :, None]
    return made.expand(batch, 2, length, 4).contiguous()


def test_a_reserved_cache_holds_what_a_growing_one_does():
    ours, theirs = ReservedCache(build().config, 8), DynamicCache(config=build().config)
    assert ours.get_seq_length() == 0
    places = []
    for start, length in ((0, 3), (3, 1), (4, 4), (8, 5)):  # the last is more than was reserved
        expected = theirs.update(states(length, start), -states(length, start), 1)
        got = ours.update(states(length, start), -states(length, start), 1)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        places.append(got[0].data_ptr())
        assert ours.layers[1].get_seq_length() == start + length
    assert len(set(places[:3])) == 1 != len(set(places))  # nothing was copied but for the last
    for change in (
        lambda cache: cache.layers[1].crop(-6),
        lambda cache: cache.layers[1].batch_select_indices(torch.tensor([1])),
        lambda cache: cache.layers[1].batch_repeat_interleave(3),
        lambda cache: cache.layers[1].reset(),
    ):
        change(ours), change(theirs)
        batch = 2 if theirs.layers[1].keys is None else len(theirs.layers[1].keys)
        expected = theirs.update(states(2, 50, batch), states(2, 60, batch), 1)
        got = ours.update(states(2, 50, batch), states(2, 60, batch), 1)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_reserved_cache_keeps_a_branch():
    cache = ReservedCache(build().config, 10)
    cache.update(states(9), -states(9), 0)
    cache.layers[0].keep(4, torch.tensor([4, 6, 8]))
    keys, values = cache.update(states(1, 20), -states(1, 20), 0)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 6, 8, 20] and torch.equal(values, -keys)


@pytest.mark.parametrize("more, kind", [({}, ReservedCache), (dict(num_beams=2), DynamicCache)])
def test_generate_reserves_what_it_will_need(monkeypatch, more, kind):
    made = []
    monkeypatch.setattr(ar_generation, "ReservedCache", lambda *a: made.append(ReservedCache(*a)) or made[-1])
    out = build().generate(prompt(), max_new_tokens=20, return_dict_in_generate=True, **more)
    assert type(out.past_key_values) is kind and len(made) == (kind is ReservedCache)
    if made:
        layer = out.past_key_values.layers[0]
        assert layer.keys.shape[2] == 27 and layer._reserved[0].shape[2] in (27, 28)
