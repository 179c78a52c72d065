"""Guessing and checking: the exact mode is greedy decoding, whatever is guessed; draws have the network's distribution."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers.generation.streamers import BaseStreamer

from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.ar_generation import nucleus
from cosmos_hf.models.medusa_cosmos import _Rule, guess_tree, speculative_generate

SMALL = PRESETS["tiny"] | dict(vocab_size=30, embedding_size=94, medusa_num_heads=3)
TEXT = dict(cross_attention_dim=16, absolute_positions="every_layer", bov_token_id=30)


def build(**changes):
    torch.manual_seed(1)
    model = CosmosARForCausalLM(CosmosARConfig(**SMALL | changes)).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name or "medusa" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_trees():
    chain = guess_tree((1, 1, 1))
    assert chain.parents == (0, 0, 1, 2) and chain.depths == (0, 1, 2, 3)
    assert torch.equal(chain.ancestors(), torch.ones(4, 4, dtype=torch.bool).tril())
    tree = guess_tree((2, 3))
    assert (
        tree.parents == (0, 0, 0, 1, 1, 1) and tree.depths == (0, 1, 1, 2, 2, 2) and tree.choices == (0, 0, 1, 0, 1, 2)
    )
    assert tree.ancestors()[5].tolist() == [True, True, False, False, False, True]
    with pytest.raises(ValueError, match="at least one guess per head"):
        guess_tree((2, 0))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sdpa as it is"])
@pytest.mark.parametrize("widths", [None, (1,), (4, 3, 2), (30, 1, 30)])
@pytest.mark.parametrize("text", [False, True])
def test_exact_is_greedy(widths, text, attention):
    model = build(**(TEXT if text else {}))
    model.set_attn_implementation(attention.split()[0])
    model.packs_weights = attention == "sdpa"
    context = {}
    if text:
        context = dict(encoder_hidden_states=torch.randn(2, 5, 16))
        context |= dict(encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
    prompt = torch.randint(0, 30, (2, 7))
    greedy = model.generate(prompt, **context)
    out = speculative_generate(model, prompt, widths=widths, **context)
    assert torch.equal(out.sequences, greedy)
    assert out.forward_passes <= greedy[:, 7:].numel() + 2
    if widths == (30, 1, 30):  # a head that guesses every code is always right
        assert out.forward_passes <= 0.6 * greedy[:, 7:].numel()
    some = speculative_generate(model, prompt, max_new_tokens=5, widths=widths, **context)
    assert torch.equal(some.sequences, greedy[:, :12])


def test_typical_acceptance_takes_what_is_likely_enough():
    model = build()
    prompt = torch.randint(0, 30, (1, 7))
    exact = speculative_generate(model, prompt, widths=(4, 3, 2))
    never = speculative_generate(model, prompt, widths=(4, 3, 2), acceptance="typical", epsilon=1.0, delta=1e9)
    always = speculative_generate(model, prompt, acceptance="typical", epsilon=0.0)
    assert torch.equal(never.sequences, exact.sequences) and never.forward_passes == exact.forward_passes
    assert always.forward_passes == 1 + -(-(48 - 7 - 1) // 4) < exact.forward_passes


@pytest.mark.parametrize("text", [False, True])
def test_copies_of_the_previous_frame(text):
    """Needs no heads, and finds a still picture in a few passes."""
    model = build(medusa_num_heads=0, **(TEXT if text else {}))
    context = dict(encoder_hidden_states=torch.randn(1, 5, 16)) if text else {}
    for length in (3, 20):
        prompt = torch.randint(0, 30, (1, length))
        out = speculative_generate(model, prompt, draft="previous_frame", widths=(1,) * 5, **context)
        assert torch.equal(out.sequences, model.generate(prompt, **context))
    model.lm_head.weight.data.zero_()  # every code is the first: the picture stands still
    still = speculative_generate(model, torch.zeros(1, 16 + text, dtype=torch.long), draft="previous_frame", **context)
    assert still.forward_passes == 8 and still.sequences.max() == 0  # the prompt, and 31 codes by 5 a pass


def test_draws_have_the_distribution_of_the_network():
    torch.manual_seed(0)
    scores, guesses = torch.randn(8) * 1.5, [3, 0, 5]
    for top_p in (1.0, 0.7):
        rule = _Rule("exact", temperature=0.8, top_p=top_p, epsilon=0, delta=0)
        expected = nucleus((scores / 0.8).softmax(-1)[None], top_p)[0]
        expected = expected / expected.sum()
        generator = torch.Generator().manual_seed(1)
        counts = torch.zeros(8)
        for _ in range(4000):
            stands, code = rule.follow(scores, guesses, generator)
            assert stands is None or guesses[stands] == code
            counts[code] += 1
        error = (counts / 4000 - expected).abs()
        assert (error <= 4 * (expected * (1 - expected) / 4000).sqrt()).all(), (counts / 4000, expected)


def test_draws_depend_on_the_seed_alone():
    model, prompt = build(), torch.randint(0, 30, (2, 7))

    def run(seeds, rows=slice(None), **more):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return speculative_generate(model, prompt[rows], temperature=1.0, generator=generator, **more).sequences

    both = run([1, 2], top_p=0.9)
    assert torch.equal(run([2], slice(1, 2), top_p=0.9), both[1:]) and not torch.equal(run([3, 4], top_p=0.9), both)
    assert torch.equal(run([1, 2], top_p=0.0), model.generate(prompt))


def test_saved_and_loaded_with_the_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    again = CosmosARForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert sum(name.startswith("medusa_heads") for name in again.state_dict()) == 6


class Told(BaseStreamer):
    """What a streamer is given, and after how many forward passes."""

    def __init__(self, model):
        self.tokens, self.passes, self.ends, self._count = [], [], 0, 0
        model.model.register_forward_hook(self._pass)

    def _pass(self, *_):
        self._count += 1

    def put(self, value):
        self.tokens.append(value)
        self.passes.append(self._count)

    def end(self):
        self.ends += 1


def test_codes_are_told_as_they_are_accepted():
    model, prompt = build(), torch.randint(0, 30, (2, 7))
    told = Told(model)
    out = speculative_generate(model, prompt, widths=(30, 1, 30), max_new_tokens=9, streamer=told)
    assert told.tokens[0].shape == (1, 7) and told.ends == 2
    assert torch.equal(torch.cat([value.flatten() for value in told.tokens]), out.sequences.flatten())
    assert told.passes[0] == 0 and told.passes[1] == 1 and len(set(told.passes)) == out.forward_passes + 1


@pytest.mark.parametrize(("name", "value", "new"), [("max_length", 20, 13), ("max_new_tokens", 5, 5)])
def test_the_length_of_the_generation_config(name, value, new):
    model, prompt = build(), torch.randint(0, 30, (2, 7))
    setattr(model.generation_config, name, value)
    out = speculative_generate(model, prompt)
    assert out.sequences.shape == (2, 7 + new) and torch.equal(out.sequences, model.generate(prompt))
    assert speculative_generate(model, prompt, max_new_tokens=3).sequences.shape == (2, 10)


@pytest.mark.parametrize("draft", ["heads", "previous_frame"])
def test_an_offloaded_model_is_woken(draft):
    """enable_model_cpu_offload brings a model to its device when it is called; here its parts are."""

    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, counter = build(), Counter()
    add_hook_to_module(model, counter)
    speculative_generate(model, torch.randint(0, 30, (2, 7)), draft=draft)
    assert counter.calls == 1


def test_attention_that_takes_no_mask_of_a_tree_is_refused(monkeypatch):
    model = build()
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("it computed"))
    for backend in ("flex_attention", "flash_attention_2"):
        model.config._attn_implementation = backend
        with pytest.raises(ValueError, match=rf'{backend} does not take: .*set_attn_implementation\("sdpa"\)'):
            speculative_generate(model, torch.zeros(1, 4, dtype=torch.long))


def test_requests_are_checked():
    prompt = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no Medusa heads"):
        speculative_generate(build(medusa_num_heads=0), prompt)
    model = build()
    for arguments, message in (
        (dict(acceptance="greedy"), "acceptance must be one of exact, typical"),
        (dict(draft="copy"), "draft must be one of heads, previous_frame"),
        (dict(draft="previous_frame", widths=(2, 1)), "one guess per code"),
        (dict(top_p=2.0), r"top_p in \[0, 1\]"),
        (dict(generator=[torch.Generator()] * 2), "2 generators for 1 sequences"),
        (dict(generator=[7]), "must be a torch.Generator or a list of such, got int"),
        (dict(max_new_tokens=0), "ask for 0 codes"),
        (dict(widths=(1, 1, 1, 1)), "names 4 heads, the model has 3"),
        (dict(max_new_tokens=45), "the video asked for has 49 tokens"),
        (dict(encoder_hidden_states=torch.zeros(1, 2, 3)), "encoder_hidden_states would be ignored"),
    ):
        with pytest.raises(ValueError, match=message):
            speculative_generate(model, prompt, **arguments)
