"""The autoregressive model as users of transformers know such models; its numbers are in tests/convert/test_autoregressive.py."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.generation.streamers import BaseStreamer

from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.ar_generation import draw
from golden_files import golden

SMALL = PRESETS["tiny"] | dict(vocab_size=100, embedding_size=164)
TEXT = dict(cross_attention_dim=16, absolute_positions="every_layer", bov_token_id=100)


def build(**changes):
    torch.manual_seed(0)
    model = CosmosARForCausalLM(CosmosARConfig(**SMALL | changes)).eval()
    for name, parameter in model.named_parameters():  # large enough that every input matters
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module")
def with_text():
    return build(**TEXT)


def prompt(batch=2, length=8):
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(0))


def context(batch=2, length=5):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1))


# ---- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, TEXT], ids=["plain", "text"])
def test_gradient_reaches_every_parameter_and_checkpointing_changes_nothing(changes):
    model, tokens = build(**changes).train(), prompt(length=20)
    text = dict(encoder_hidden_states=context()) if changes else {}
    model(tokens, labels=tokens, **text).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient.abs().max() == 0]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens, **text).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


def test_initialisation():
    model = CosmosARForCausalLM(CosmosARConfig(**PRESETS["tiny"]))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, abs=0.05)
    first, last = (layer.mlp.down_proj.weight.std().item() for layer in model.model.layers)
    assert first == pytest.approx(0.02 / 2**0.5, rel=0.1) and last == pytest.approx(0.01, rel=0.1)
    assert model.lm_head.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)


def test_causal_and_cache_and_padding(plain):
    tokens = prompt(length=20)
    full = plain(tokens).logits
    other = tokens.clone()
    other[:, 12:] = 0
    assert torch.equal(plain(other).logits[:, :12], full[:, :12])
    cache = DynamicCache(config=plain.config)
    parts = [
        plain(tokens[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 7), (7, 13), (13, 20))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=0)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)], 1)
    torch.testing.assert_close(plain(padded, attention_mask=mask).logits[:, 3:], full, atol=1e-5, rtol=0)


def test_attention_backends_agree(with_text):
    tokens, text = prompt(length=20), context()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    results = {}
    for backend in ("sdpa", "eager"):
        with_text.set_attn_implementation(backend)
        results[backend] = with_text(tokens, encoder_hidden_states=text, encoder_attention_mask=mask).logits
    with_text.set_attn_implementation("sdpa")
    torch.testing.assert_close(results["eager"], results["sdpa"], atol=1e-5, rtol=0)
    unmasked = with_text(tokens, encoder_hidden_states=text).logits
    assert (unmasked[1] - results["sdpa"][1]).abs().max() > 1e-3
    torch.testing.assert_close(unmasked[0], results["sdpa"][0], atol=1e-5, rtol=0)


def test_the_grid_gives_positions_their_meaning(plain):
    tokens = prompt(length=16)
    a, b = (plain(tokens, latent_shape=shape).logits for shape in ((3, 4, 4), (2, 2, 8)))
    assert torch.equal(a[:, 0], b[:, 0]) and (a - b)[:, -1].abs().max() > 1e-3
    long = plain(torch.zeros(1, 120, dtype=torch.long), latent_shape=(5, 4, 6)).logits
    assert long.shape == (1, 120, 100)


@pytest.mark.parametrize("where", ["every_layer", "once"])
def test_absolute_positions_in_every_layer_or_once(where):
    model = build(**TEXT | dict(absolute_positions=where))
    before = model(prompt(), encoder_hidden_states=context()).logits
    model.config.absolute_positions = None
    model.model.positions._tables.clear()
    assert (model(prompt(), encoder_hidden_states=context()).logits - before).abs().max() > 1e-3
    hidden = {}
    for option in ("every_layer", "once"):
        hidden[option] = build(**TEXT | dict(absolute_positions=option))(
            prompt(), encoder_hidden_states=context()
        ).logits
    assert (hidden["every_layer"] - hidden["once"]).abs().max() > 1e-3


def test_save_and_load_in_a_fresh_process(with_text, tmp_path):
    with_text.save_pretrained(tmp_path)
    torch.save(
        (prompt(), context(), with_text(prompt(), encoder_hidden_states=context()).logits), tmp_path / "expected.pt"
    )
    code = (
        "import sys, torch, cosmos_hf.models.ar_cosmos; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t, c, e = torch.load(sys.argv[1] + '/expected.pt');"
        "torch.testing.assert_close(model(t, encoder_hidden_states=c).logits, e, atol=1e-5, rtol=0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CosmosARConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is CosmosARForCausalLM
    with pytest.raises(ValueError, match="missing.*cross_attn"):
        CosmosARForCausalLM.from_pretrained(tmp_path, cross_attention_every=1, num_hidden_layers=3)


def test_lora_and_bfloat16(with_text):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build(**TEXT), LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"], r=2, task_type="CAUSAL_LM")
    )
    text = dict(encoder_hidden_states=context())
    torch.testing.assert_close(model(prompt(), **text).logits, with_text(prompt(), **text).logits)
    model(prompt(), labels=prompt(), **text).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == 9 and all(g.abs().max() > 0 for g in grads)
    out = build(**TEXT).bfloat16()(prompt(), encoder_hidden_states=context().bfloat16()).logits
    assert out.dtype == torch.bfloat16 and (out.float() - with_text(prompt(), **text).logits).abs().max() < 0.5


def test_text_of_another_dtype(with_text):
    """As actions, it is taken in the model's own: what a T5 in float32 gives goes to a model in bfloat16."""
    model, text = build(**TEXT).bfloat16(), context()
    logits = model(prompt(), encoder_hidden_states=text).logits
    assert torch.equal(logits, model(prompt(), encoder_hidden_states=text.bfloat16()).logits)
    rounded = with_text(prompt(), encoder_hidden_states=text.bfloat16()).logits
    assert torch.equal(rounded, with_text(prompt(), encoder_hidden_states=text.bfloat16().float()).logits)


def test_presets_have_the_published_sizes():
    for name, billions in (
        ("4b", 4.014),
        ("5b-video2world", 4.585),
        ("12b", 11.561),
        ("13b-video2world", 13.323),
        ("nano", 0.0058),
    ):
        with torch.device("meta"):
            model = CosmosARForCausalLM(CosmosARConfig(**PRESETS[name]))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-2), name


def test_a_tensor_parallel_plan_names_modules_that_exist():
    names = {name for name, _ in build(**TEXT, action_dim=8).model.named_modules()}
    for pattern in CosmosARConfig.base_model_tp_plan:
        assert pattern.replace("*", "0") in names, pattern


# ---- generation --------------------------------------------------------------------------------------------------------


def test_generation_in_all_its_ways_gives_the_same(with_text):
    text = dict(encoder_hidden_states=context())
    expected = with_text.generate(prompt(), **text)
    assert expected.shape == (2, 49) and expected.max() < 100
    ways = [
        dict(cache_implementation="static"),
        dict(use_cache=False),
        dict(return_dict_in_generate=True),
        dict(past_key_values=StaticCache(with_text.config, max_cache_len=60)),
        dict(past_key_values=DynamicCache(config=with_text.config)),
        dict(encoder_attention_mask=torch.ones(2, 5, dtype=torch.long)),
        dict(max_length=49),
    ]
    for more in ways:
        out = with_text.generate(prompt(), **text, **more)
        assert torch.equal(getattr(out, "sequences", out), expected), more
    with_text.set_attn_implementation("eager")
    for cache in ("dynamic", "static"):
        assert torch.equal(with_text.generate(prompt(), cache_implementation=cache, **text), expected), cache
    with_text.set_attn_implementation("sdpa")
    one = dict(encoder_hidden_states=context(1))
    assisted = with_text.generate(prompt(1) % 20, prompt_lookup_num_tokens=4, **one)
    assert torch.equal(assisted, with_text.generate(prompt(1) % 20, **one))
    early = with_text.generate(prompt(1) % 20, assistant_early_exit=1, **one)
    assert torch.equal(early, assisted) and torch.equal(with_text.generate(prompt(1) % 20, **one), assisted)
    beams = with_text.generate(prompt(), num_beams=2, max_new_tokens=6, **text)
    assert beams.shape == (2, 14)


def test_a_decoding_step_compiles_in_one_graph(with_text):
    """What transformers compiles on accelerators; here its tracing alone."""
    cache = StaticCache(with_text.config, max_cache_len=49)
    out = with_text(prompt(), encoder_hidden_states=context(), past_key_values=cache, use_cache=True)
    cache, codes = out.past_key_values, [out.logits[:, -1].argmax(-1)]
    step = torch.compile(with_text.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        for place in (8, 9):
            position = torch.tensor([[place]])
            out = step(codes[-1][:, None], position_ids=position, past_key_values=cache, use_cache=True)
            codes.append(out.logits[:, -1].argmax(-1))
    expected = with_text.generate(prompt(), encoder_hidden_states=context(), max_new_tokens=3)
    assert torch.equal(torch.stack(codes, 1), expected[:, 8:])


def test_prompts_of_different_length_in_one_batch(plain):
    tokens = prompt(length=12)
    short = tokens[1:, 4:]
    padded = tokens.clone()
    padded[1, :4] = 0
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    out = plain.generate(padded, attention_mask=mask, max_new_tokens=10)
    assert torch.equal(out[:1], plain.generate(tokens[:1], max_new_tokens=10))
    assert torch.equal(out[1:, 4:], plain.generate(short, max_new_tokens=10))


def test_context_keys_are_computed_once_and_the_prompt_has_one_row_of_logits(with_text, monkeypatch):
    calls, rows = [], []
    for layer in with_text.model.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda m, i, o: calls.append(o.shape))
    handle = with_text.lm_head.register_forward_hook(lambda m, i, o: rows.append(o.shape[1]))
    with_text.generate(prompt(), encoder_hidden_states=context(), max_new_tokens=6)
    assert len(calls) == len(with_text.model.layers) and rows == [1] * 6
    handle.remove()
    for layer in with_text.model.layers:
        layer.cross_attn.k_proj._forward_hooks.clear()


def test_no_mask_is_made_while_decoding(plain, monkeypatch):
    from cosmos_hf.models import ar_cosmos

    monkeypatch.setattr(ar_cosmos, "create_causal_mask", lambda **_: pytest.fail("a mask was made"))
    for cache in ("dynamic", "static"):
        assert plain.generate(prompt(), cache_implementation=cache, max_new_tokens=4).shape == (2, 12)


def test_sampling(plain):
    def sample(seeds, batch=2, **more):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return plain.generate(prompt()[:batch], do_sample=True, generator=generator, max_new_tokens=12, **more)

    both = sample([3, 4], top_p=0.9)
    assert torch.equal(sample([3], batch=1, top_p=0.9), both[:1])
    assert torch.equal(sample([3, 4], top_p=0.9, cache_implementation="static"), both)
    four = plain.generate(
        prompt(), do_sample=True, num_return_sequences=2, max_new_tokens=12, top_p=0.9,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 5, 6, 4)],
    )  # fmt: skip
    assert torch.equal(four[[0, 3]], both) and not torch.equal(four[0], four[1])
    assert not torch.equal(sample([3, 4], top_k=2), both)
    assert torch.equal(sample([3, 4], top_p=0.0), plain.generate(prompt(), max_new_tokens=12))
    torch.manual_seed(0)
    a = plain.generate(prompt(), do_sample=True, max_new_tokens=12)
    torch.manual_seed(0)
    assert torch.equal(plain.generate(prompt(), do_sample=True, max_new_tokens=12), a)


def test_top_k_is_off_unless_it_is_set(monkeypatch):
    model, seen = build(), []
    monkeypatch.setattr(TopKLogitsWarper, "__call__", lambda self, _, scores: seen.append(self.top_k) or scores)

    def used(own, **arguments):
        model.generation_config = GenerationConfig(**own)
        seen.clear()
        model.generate(prompt(), max_length=9, **arguments)
        return seen

    sampled = GenerationConfig(do_sample=True)
    assert used({}, do_sample=True) == used({}, generation_config=sampled) == used(dict(do_sample=True)) == []
    assert sampled.top_k is None  # what is passed in stays as it is
    assert used(dict(top_k=7), do_sample=True) == used(dict(top_k=7), generation_config=sampled) == [7]
    assert used({}, generation_config=GenerationConfig(do_sample=True, top_k=6)) == [6]
    assert used(dict(top_k=7), do_sample=True, top_k=5) == [5] and used(dict(top_k=7), do_sample=True, top_k=0) == []


def test_the_length_of_the_generation_config(plain):
    model = build()
    for name, value, new in (("max_new_tokens", 5, 5), ("max_length", 20, 12)):
        expected = plain.generate(prompt(), max_new_tokens=new)
        config = GenerationConfig(**{name: value})
        assert torch.equal(plain.generate(prompt(), generation_config=config), expected)
        model.generation_config = config
        assert torch.equal(model.generate(prompt()), expected)
        assert torch.equal(model.generate(prompt(), generation_config=GenerationConfig()), expected)


def test_padding_is_no_part_of_the_video(plain):
    tokens, mask = prompt(), torch.ones_like(prompt())
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], 1)
    assert torch.equal(plain.generate(padded, attention_mask=mask)[:, 3:], plain.generate(tokens))


def test_draws_of_the_reference():
    tensors, _, _ = golden("autoregressive", "ar_sampling")
    logits = tensors["logits"][:, -1]
    assert torch.equal(logits.argmax(-1, keepdim=True), tensors["greedy.token"])
    for temperature, top_p in ((0.7, 0.5), (1.0, 0.8), (1.0, 1.0)):
        token = draw(logits / temperature, torch.Generator().manual_seed(5), top_p)
        assert torch.equal(token, tensors[f"top_p.t{temperature}.p{top_p}.token_seed5"])
    kept = logits.masked_fill(logits < logits.topk(10).values[:, -1:], -torch.inf)
    torch.testing.assert_close(kept.softmax(-1), tensors["top_k.10.probs"])
    assert torch.equal(draw(kept, torch.Generator().manual_seed(5)), tensors["top_k.10.token_seed5"])


def test_a_short_list_does_not_change_top_p(monkeypatch):
    from cosmos_hf.models import ar_generation

    scores = torch.randn(8, 500) * 2
    for top_p in (0.3, 0.99, 1.0):
        results = []
        for size in (500, 16):
            monkeypatch.setattr(ar_generation, "SHORTLIST", size)
            results.append(draw(scores, torch.Generator().manual_seed(1), top_p))
        assert torch.equal(*results)


class Collect(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("more", [{}, dict(do_sample=True, generator=torch.Generator())])
def test_streamer(plain, more):
    streamer = Collect()
    out = plain.generate(prompt(1), max_new_tokens=5, streamer=streamer, **more)
    assert torch.equal(torch.cat([s.flatten() for s in streamer.seen]), out[0]) and streamer.ended


def test_only_codes_are_generated():
    model = build(codebook_size=60, vocab_size=100)
    out = model.generate(prompt(length=1) % 60, do_sample=True, temperature=100.0)
    assert out.max() < 60 and len(out.unique()) > 30


def test_a_video_from_nothing_but_text(with_text):
    out = with_text.generate(encoder_hidden_states=context())
    assert out.shape == (2, 49) and (out[:, 0] == 100).all() and not torch.equal(out[0], out[1])


# ---- errors ------------------------------------------------------------------------------------------------------------


def refused(message, call, *arguments, **more):
    with pytest.raises(ValueError, match=message):
        call(*arguments, **more)


def test_calls_are_checked_before_anything_is_computed(plain, with_text, monkeypatch):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("it computed"))
    tokens, text = prompt(), context()
    high = tokens.clone()
    high[0, 0] = 164
    for call in (plain, plain.generate):
        refused(r"must lie in the codebook, 0..99, got \[164\]: was the video coded", call, high)
        refused(r"got \[-1\]", call, tokens - 1 - tokens.min())
        refused(r"input_ids has 49 tokens, the latent grid \[3, 4, 4\] holds 48", call, prompt(length=49))
        refused(r"latent grid \[1, 2, 2\] holds 4", call, tokens, latent_shape=(1, 2, 2))
        refused("three positive sizes", call, tokens, latent_shape=(1, 2))
        refused("encoder_hidden_states would be ignored", call, tokens, encoder_hidden_states=text)
        small = StaticCache(plain.config, max_cache_len=6)
        refused(r"past_key_values holds 6 tokens, \d+ are needed", call, tokens, past_key_values=small)
        refused(r"attention_mask must be \[2, 8\]", call, tokens, attention_mask=torch.ones(2, 7))
    for call in (with_text, with_text.generate):
        refused(r"0..99 or <bov> \(100\), got \[101\]", call, high.clamp_max(101), encoder_hidden_states=text)
        refused("encoder_hidden_states is missing", call, tokens)
        refused(r"must be \[B, L, 16\], got \(2, 5, 15\)", call, tokens, encoder_hidden_states=text[..., :15])
        refused("has 1 items, input_ids 2", call, tokens, encoder_hidden_states=text[:1])
        mask = torch.ones(2, 4)
        refused(
            r"encoder_attention_mask must be \[2, 5\]",
            call,
            tokens,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
        )
    refused(r"codebook, 0..99, got \[164\]", plain, high[:1, :1])
    refused(r"must be integers \[B, S\], got torch.int64 \(2, 1, 4, 2\)", plain, tokens.view(2, 1, 4, 2))
    refused(r"must be integers \[B, S\], got torch.int64 \(8,\)", plain, tokens[0])
    refused("position_ids go up to 49", plain, tokens, position_ids=torch.arange(42, 50)[None])
    refused("exactly one of input_ids and inputs_embeds", plain)
    refused("the video asked for has 49 tokens", plain.generate, tokens, max_new_tokens=41)
    refused("ask for -2 codes behind a prompt of 8", plain.generate, tokens, max_length=6)
    refused("a whole video already", plain.generate, prompt(length=48))
    refused("no <bov>", plain.generate)
    padded = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    refused(r"5 to 8 tokens, so .* max_new_tokens \(at most 40\)", plain.generate, tokens, attention_mask=padded)
    refused("zeros on the left", plain.generate, tokens, attention_mask=torch.tensor([[1] * 8, [1] * 7 + [0]]))
    refused(
        "generator would be ignored with custom_generate",
        plain.generate,
        tokens,
        generator=torch.Generator(),
        custom_generate="x",
    )


def test_generators_that_would_be_ignored(plain, monkeypatch):
    one, config = torch.Generator(), GenerationConfig(num_beams=2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("it computed"))
        for do_sample in (False, True):
            call = partial(plain.generate, prompt(1), do_sample=do_sample, max_new_tokens=2)
            refused("2 generators for 1 sequences", call, generator=[one, one])
            refused("must be a torch.Generator or a list of such, got int", call, generator=(1,))
            refused("must be a torch.Generator or a list of such, got int", call, generator=1)
            refused("ignored with num_beams", call, generator=one, num_beams=3)
            refused("ignored with prompt_lookup_num_tokens", call, generator=one, prompt_lookup_num_tokens=3)
            refused("ignored with assistant_model", call, generator=one, assistant_model=plain)
        refused("ignored with num_beams", plain.generate, prompt(), generator=one, generation_config=config)
    refused(
        "generator works with", plain.generate, prompt(), do_sample=True, generator=torch.Generator(), use_cache=False
    )


def test_more_tokens_than_the_cache_or_the_grid_while_decoding(plain):
    cache = DynamicCache(config=plain.config)
    plain(prompt(length=47), past_key_values=cache, use_cache=True)
    plain(prompt(length=1), past_key_values=cache, use_cache=True)
    refused("1 tokens after 48 in the cache", plain, prompt(length=1), past_key_values=cache)
    static = StaticCache(plain.config, max_cache_len=9)
    plain(prompt(length=9), past_key_values=static, use_cache=True)
    refused("holds 9 tokens, 10 are needed", plain, prompt(length=1), past_key_values=static, use_cache=True)


def test_configs_are_checked():
    refused("multiple of num_key_value_heads", CosmosARConfig, num_attention_heads=6, num_key_value_heads=4)
    refused("tie_word_embeddings=True: input and output", CosmosARConfig, tie_word_embeddings=True)
    refused("absolute_positions must be", CosmosARConfig, absolute_positions="first")
    refused("three positive sizes", CosmosARConfig, latent_shape=(5, 0, 3))
    refused("yarn_original_shape must be three", CosmosARConfig, yarn_scale=2.0)
    refused("bov_token_id=5 must be a row", CosmosARConfig, bov_token_id=5)
    refused("pad_token_id=64002 must be a row", CosmosARConfig, pad_token_id=64002)
    refused("codebook_size <= vocab_size", CosmosARConfig, vocab_size=10, codebook_size=11)
