"""Actions in the autoregressive model: who sees which, the cache, what a base learns later, guesses."""

import pytest
import torch

from cosmos_hf.models.ar_conditions import added_weights, extend_conditions, withdraw_conditions
from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.condition_adapters import ConditionAdapter
from cosmos_hf.models.medusa_cosmos import speculative_generate

TINY = PRESETS["tiny"] | dict(vocab_size=100, embedding_size=110)
ACTIONS = dict(action_dim=6, actions_per_frame=2)
TEXT = dict(cross_attention_dim=16, bov_token_id=100)
CONTEXT = {"plain": {}, "text": TEXT}


def build(loud: bool = True, **more) -> CosmosARForCausalLM:
    torch.manual_seed(0)
    model = CosmosARForCausalLM(CosmosARConfig(**TINY | more)).eval()
    for name, parameter in model.named_parameters():
        if loud and "o_proj" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs_of(model, length=None, batch=2):
    config = model.config
    tokens = torch.arange(batch * 48).view(batch, 48) * 37 % 100
    if config.bov_token_id is not None:
        tokens = torch.cat([torch.full((batch, 1), 100), tokens], dim=1)
    given = {"actions": torch.arange(batch * 18.0).sin().view(batch, 3, 6)}
    if config.cross_attention_dim:
        given["encoder_hidden_states"] = torch.arange(batch * 5 * 16.0).cos().view(batch, 5, 16)
    return tokens[:, :length], given


@pytest.mark.parametrize("context", CONTEXT)
def test_an_action_acts_on_its_frame_and_what_follows(context):
    """Frame t's codes are predicted from the places one before them: from there on an action that leads to t is seen."""
    model = build(**CONTEXT[context], **ACTIONS)
    tokens, given = inputs_of(model)
    bov = int(model.config.bov_token_id is not None)
    with torch.no_grad():
        before = model(tokens, **given).logits
        for frame in range(3):
            actions = given["actions"].clone()
            actions[:, frame, 5] += 1.0
            change = (model(tokens, **given | {"actions": actions}).logits - before).abs().amax((0, 2))
            first = max(0, frame * 16 - 1 + bov)
            assert change[:first].max() == 0 if first else True
            assert change[first : first + 16].min() > 0, frame


def test_the_order_of_the_actions_of_a_frame_matters():
    model = build(**ACTIONS)
    tokens, given = inputs_of(model)
    swapped = given["actions"].unflatten(-1, (2, 3)).flip(2).flatten(2)
    with torch.no_grad():
        a, b = model(tokens, **given).logits, model(tokens, actions=swapped).logits
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("context", CONTEXT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_codes_one_by_one_are_those_at_once(context, implementation):
    """With the cache, which holds the actions' keys and values beside the text's, in transformers' loop and in ours."""
    model = build(**CONTEXT[context], **ACTIONS)
    model.set_attn_implementation(implementation)
    tokens, given = inputs_of(model)
    with torch.no_grad():
        whole = model(tokens, **given).logits
        past, rest = model(tokens[:, :20], use_cache=True, **given).past_key_values, []
        for i in range(20, tokens.shape[1]):
            rest.append(model(tokens[:, i : i + 1], past_key_values=past, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(rest, dim=1), whole[:, 20:], atol=1e-4, rtol=1e-4)
    greedy = model.generate(tokens[:, :20], do_sample=False, cache_implementation="static", **given)
    again = model.generate(tokens[:, :20], do_sample=False, return_dict_in_generate=True, **given).sequences
    assert torch.equal(greedy, again)
    guessed = speculative_generate(model, tokens[:, :20], draft="previous_frame", **given).sequences
    assert torch.equal(greedy, guessed)
    other = model.generate(tokens[:, :20], do_sample=False, **given | {"actions": -3 * given["actions"]})
    assert not torch.equal(greedy, other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_every_parameter(checkpointing):
    model = build(**TEXT, **ACTIONS).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens, given = inputs_of(model)
    labels = tokens.clone()
    labels[:, 0] = -100
    model(tokens, labels=labels, **given).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("context", CONTEXT)
def test_a_model_with_new_actions_is_its_base_until_they_are_learned(context, tmp_path):
    model = build(**CONTEXT[context])
    tokens, given = inputs_of(model)
    plain = {name: value for name, value in given.items() if name != "actions"}
    before, names = model(tokens, **plain).logits, set(model.state_dict())
    extend_conditions(model, **ACTIONS)
    assert model.conditions == ("actions",)
    assert torch.equal(model(tokens, **given).logits, before)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.action_attn.o_proj.weight, std=0.3)
    learned = model(tokens, **given).logits
    assert (learned - before).abs().max() > 1e-2
    ConditionAdapter.of(model, ACTIONS).save(tmp_path)
    withdraw_conditions(model, **ACTIONS)
    assert set(model.state_dict()) == names and torch.equal(model(tokens, **plain).logits, before)
    adapter = ConditionAdapter.load(tmp_path)
    adapter.add_to(model)
    assert torch.equal(model(tokens, **given).logits, learned)
    adapter.remove_from(model)
    adapter.add_to(model, scale=0.0)
    assert torch.equal(model(tokens, **given).logits, before)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(CosmosARForCausalLM.from_pretrained(tmp_path / "model")(tokens, **given).logits, before)


def test_text_can_be_learned_later_too():
    model = build()
    tokens, _ = inputs_of(model)
    before = model(tokens).logits
    changes = dict(cross_attention_dim=16)
    extend_conditions(model, **changes)
    text = torch.ones(2, 4, 16)
    assert torch.equal(model(tokens, encoder_hidden_states=text).logits, before)
    names = set(added_weights(model, changes))
    assert "model.layers.1.cross_attn.o_proj.weight" in names and "model.layers.1.cross_attn_layernorm.weight" in names
    assert not [name for name in names if "self_attn" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(actions=None), r"actions are missing: this model takes \[2, 3, 6\]"),
        (dict(actions=torch.zeros(2, 2, 6)), r"must be floats \[2, 3, 6\].*got torch.float32 \(2, 2, 6\)"),
        (dict(actions=torch.zeros(2, 3, 6, dtype=torch.long)), "must be floats"),
    ],
)
def test_wrong_actions_are_refused(arguments, message):
    model = build(**ACTIONS)
    tokens, _ = inputs_of(model, 20)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(tokens, **arguments)


def test_what_a_model_cannot_use_is_refused():
    plain, acting = build(), build(**ACTIONS)
    tokens, given = inputs_of(plain, 20)
    with pytest.raises(ValueError, match=r"actions would be ignored: this model takes none \(action_dim\)"):
        plain(tokens, **given)
    with pytest.raises(ValueError, match="the model has action_dim, actions_per_frame already"):
        extend_conditions(acting, **ACTIONS)
    with pytest.raises(ValueError, match="camera_channels cannot be added to a model; conditions are cross_attention"):
        extend_conditions(plain, camera_channels=6)
    with pytest.raises(ValueError, match="action_dim must be a multiple of actions_per_frame, got 7 and 2"):
        CosmosARConfig(**TINY, action_dim=7, actions_per_frame=2)
    adapter = ConditionAdapter.of(acting, ACTIONS)
    with pytest.raises(ValueError, match="another kind of base: bov_token_id 100, needed None"):
        adapter.add_to(build(**TEXT))
    acting.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="needs attn_implementation eager or sdpa, not flex_attention"):
        acting(tokens, **given)
