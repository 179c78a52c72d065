"""Medusa decoding: the exact mode is greedy decoding, whatever the heads guess and whatever tree they fill."""

import pytest
import torch

from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.medusa_cosmos import guess_tree, medusa_generate

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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("widths", [None, (1,), (4, 3, 2), (30, 1, 30)])
@pytest.mark.parametrize("text", [False, True])
def test_exact_is_greedy(widths, text, attention):
    model = build(**(TEXT if text else {}))
    model.set_attn_implementation(attention)
    context = {}
    if text:
        context = dict(encoder_hidden_states=torch.randn(2, 5, 16))
        context |= dict(encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
    prompt = torch.randint(0, 30, (2, 7))
    greedy = model.generate(prompt, **context)
    out = medusa_generate(model, prompt, widths=widths, **context)
    assert torch.equal(out.sequences, greedy)
    assert out.forward_passes <= greedy[:, 7:].numel() + 2
    if widths == (30, 1, 30):  # a head that guesses every code is always right
        assert out.forward_passes <= 0.6 * greedy[:, 7:].numel()
    some = medusa_generate(model, prompt, max_new_tokens=5, widths=widths, **context)
    assert torch.equal(some.sequences, greedy[:, :12])


def test_typical_acceptance_takes_what_is_likely_enough():
    model = build()
    prompt = torch.randint(0, 30, (1, 7))
    exact = medusa_generate(model, prompt, widths=(4, 3, 2))
    never = medusa_generate(model, prompt, widths=(4, 3, 2), acceptance="typical", epsilon=1.0, delta=1e9)
    always = medusa_generate(model, prompt, acceptance="typical", epsilon=0.0)
    assert torch.equal(never.sequences, exact.sequences) and never.forward_passes == exact.forward_passes
    assert always.forward_passes == 1 + -(-(48 - 7 - 1) // 4) < exact.forward_passes


def test_saved_and_loaded_with_the_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    again = CosmosARForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert sum(name.startswith("medusa_heads") for name in again.state_dict()) == 6


def test_requests_are_checked():
    prompt = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no Medusa heads"):
        medusa_generate(build(medusa_num_heads=0), prompt)
    model = build()
    for arguments, message in (
        (dict(acceptance="greedy"), "acceptance must be one of exact, typical"),
        (dict(widths=(1, 1, 1, 1)), "names 4 heads, the model has 3"),
        (dict(max_new_tokens=45), "the video asked for has 49 tokens"),
        (dict(encoder_hidden_states=torch.zeros(1, 2, 3)), "encoder_hidden_states would be ignored"),
    ):
        with pytest.raises(ValueError, match=message):
            medusa_generate(model, prompt, **arguments)
