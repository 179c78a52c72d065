"""Conditions of the diffusion transformer: each reaches the output, none is ignored, new ones start without effect."""

import pytest
import torch

from cosmos_hf.models.dit_conditions import TextRefiner, add_conditions
from cosmos_hf.models.dit_layers import sincos_positions
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D

TINY = PRESETS["tiny-video2world"]
VIEWS = dict(num_views=2, view_embed_dim=3, frame_repeat_embed=True, extra_pos_embed_type="sincos")
EVERYTHING = dict(
    in_channels=17 + 6 + 4, camera_channels=6, condition_channels=4, condition_vocab_size=9, action_dim=5, **VIEWS
)
FRAMES, HEIGHT, WIDTH = 4, 4, 6


def randomized(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
    return model.eval()


def make(**changes):
    return CosmosWorldTransformer3D(**{**TINY, **changes})


def plain_inputs(batch=2, frames=FRAMES, tokens=6):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    mask = torch.zeros(batch, 1, frames, HEIGHT, WIDTH)
    mask[:, :, 0] = 1
    return dict(
        hidden_states=draw(batch, 16, frames, HEIGHT, WIDTH),
        timestep=torch.linspace(-0.5, 0.4, batch),
        encoder_hidden_states=draw(batch, tokens, 32),
        fps=10,
        condition_mask=mask,
    )


def all_inputs():
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return plain_inputs() | dict(
        camera=draw(2, 6, FRAMES, HEIGHT, WIDTH),
        condition=torch.randint(9, (2, 1, FRAMES, 2, 3), generator=generator),
        actions=draw(2, FRAMES, 5),
        frame_repeat=torch.tensor([[0.0, 1.0], [0.3, 0.0]]),
    )


@pytest.fixture(scope="module")
def model():
    return randomized(make(**EVERYTHING))


@torch.no_grad()
def run(model, inputs, **changes):
    return model(**{**inputs, **changes}).sample


def test_every_condition_reaches_the_output(model):
    given = all_inputs()
    out = run(model, given)
    assert model.conditions == ("condition_mask", "camera", "condition", "actions")
    for name in ("condition_mask", "camera", "condition", "actions", "frame_repeat"):
        changed = torch.zeros_like(given[name])
        assert (run(model, given, **{name: changed}) - out).abs().max() > 1e-3, name
    torch.testing.assert_close(
        run(model, given, frame_repeat=None), run(model, given, frame_repeat=torch.zeros(1, 2)), atol=0, rtol=0
    )


def test_gradients_reach_every_parameter_and_checkpointing_changes_nothing(model):
    given, gradients = all_inputs(), []
    given["condition"] = torch.arange(9).repeat(6)[: 2 * FRAMES * 6].view(2, 1, FRAMES, 2, 3)  # every token
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        model.zero_grad()
        model(**given).sample.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.disable_gradient_checkpointing()
    assert not [name for name, gradient in gradients[0].items() if gradient.abs().max() < 1e-9]
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("name", ["condition_mask", "camera", "condition", "actions"])
def test_a_needed_condition_is_missed_and_a_strange_one_refused(model, name):
    with pytest.raises(ValueError, match=f"{name} is missing"):
        run(model, all_inputs(), **{name: None})
    plain = randomized(CosmosWorldTransformer3D(**PRESETS["tiny"]))
    inputs = plain_inputs()
    inputs.pop("condition_mask")
    with pytest.raises(ValueError, match=f"this model takes no {name}"):
        plain(**inputs, **{name: all_inputs()[name]})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(camera=torch.zeros(2, 5, 4, 4, 6)), r"camera must be \[2 or 1, 6, 4, 4, 6\]"),
        (dict(actions=torch.zeros(2, 3, 5)), r"actions must be \[2 or 1, 1 or 4, 5\]"),
        (dict(actions=torch.zeros(2, 1, 4)), r"actions must be \[2 or 1, 1 or 4, 5\]"),
        (
            dict(condition=torch.zeros(2, 1, 3, 2, 3, dtype=torch.long)),
            r"condition must be \[2 or 1, 1, 4, any, any\]",
        ),
        (dict(condition=torch.full((2, 1, 4, 2, 3), 9)), "token ids 9..9, the model knows 0..8"),
        (dict(condition=torch.full((2, 1, 4, 2, 3), -1)), "token ids -1..-1"),
        (dict(condition=torch.zeros(2, 1, 4, 2, 3)), "must be integer token ids, got torch.float32"),
        (dict(frame_repeat=torch.zeros(2, 3)), r"frame_repeat must be \[2 or 1, 2\]"),
        (dict(num_views=3), "num_views must be between 1 and 2"),
        (dict(view_indices=(0, 0)), r"view_indices must be different views of 0..1"),
        (dict(view_indices=(2,)), r"view_indices must be different views of 0..1"),
        (dict(view_indices=(1,), num_views=1), "in place of num_views; got .* num_views=1"),
        (dict(encoder_hidden_states=torch.zeros(2, 5, 32)), "5 positions, which is no multiple of the 2 views"),
        (dict(timestep=torch.zeros(2, 3)), r"or \[2, 4\] .one per latent frame"),
    ],
)
def test_wrong_conditions_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, all_inputs(), **change)


def test_views_must_fill_the_time_axis():
    model = make(**VIEWS)
    with pytest.raises(ValueError, match="3 latent frames must be a multiple of the 2 views"):
        model(**plain_inputs(frames=3))
    with pytest.raises(ValueError, match="latent frames of a view must be at most 16"):
        model(**plain_inputs(frames=34))
    with pytest.raises(ValueError, match="takes no frame_repeat"):
        make(num_views=2, view_embed_dim=3)(**plain_inputs(), frame_repeat=torch.zeros(1, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(in_channels=18), "or one more for the condition mask"),
        (dict(camera_channels=6), "in_channels must be out_channels . camera_channels"),
        (dict(condition_vocab_size=9), "condition_vocab_size needs condition_channels"),
        (dict(num_views=0), "num_views must be at least 1"),
        (dict(frame_repeat_embed=True), "frame_repeat_embed needs view_embed_dim"),
        (dict(action_dim=0), "action_dim must be None"),
        (dict(action_dim=5, action_hidden_dim=0), "action_hidden_dim must be None"),
        (dict(text_refiner_layers=-1), "text_refiner_layers must be 0"),
        (dict(action_form="typo"), "action_form must be one of intended, as_written"),
        (dict(extra_pos_embed_type="typo"), "must be None, 'learnable' or 'sincos'"),
    ],
)
def test_contradicting_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


# ---- what the mechanisms mean ---------------------------------------------------------------------------------------


def test_one_view_is_the_model_without_views():
    base = randomized(make())
    model = add_conditions(base, num_views=2, view_embed_dim=3)
    torch.nn.init.normal_(model.view_embed.views.weight)
    assert torch.equal(run(model, plain_inputs(), num_views=1), run(base, plain_inputs()))


def test_a_call_may_hold_any_of_the_views(model):
    given = all_inputs()
    assert torch.equal(run(model, given, view_indices=(0, 1)), run(model, given))
    assert (run(model, given, view_indices=(1, 0)) - run(model, given)).abs().max() > 1e-3
    first = {name: given[name] for name in given if name != "frame_repeat"}
    one, other = (run(model, first, view_indices=(view,)) for view in (0, 1))
    assert torch.equal(one, run(model, first, num_views=1)) and (one - other).abs().max() > 1e-3


def test_a_view_reads_its_own_text_only():
    """Without self-attention's output the views do not meet: changing the second view's text leaves the first as it was."""
    model = randomized(make(num_views=2, view_embed_dim=3))
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    given = plain_inputs()
    other = given["encoder_hidden_states"].clone()
    other[:, 3:] += 1
    first, second = (run(model, given, encoder_hidden_states=e) for e in (given["encoder_hidden_states"], other))
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert (first[:, :, 2:] - second[:, :, 2:]).abs().max() > 1e-3
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]]).expand(2, -1)
    mask = mask + torch.tensor([0, 0, 0, 1, 0, 0])
    masked = run(model, given, attention_mask=mask)
    torch.testing.assert_close(masked[:, :, :2], first[:, :, :2])
    assert (masked[:, :, 2:] - first[:, :, 2:]).abs().max() > 1e-3


def test_positions_start_again_in_every_view():
    """Two views with equal content, text and view vectors give equal outputs."""
    model = randomized(make(num_views=2))
    given = plain_inputs()
    for name in ("hidden_states", "condition_mask"):
        given[name] = given[name][:, :, :2].repeat(1, 1, 2, 1, 1)
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :3].repeat(1, 2, 1)
    out = run(model, given)
    torch.testing.assert_close(out[:, :, :2], out[:, :, 2:], atol=1e-5, rtol=1e-5)


def test_noise_levels_and_actions_of_single_frames(model):
    given = all_inputs()
    out = run(model, given)
    each = given["timestep"][:, None].expand(-1, FRAMES)
    torch.testing.assert_close(run(model, given, timestep=each), out, atol=1e-5, rtol=1e-5)
    other = each.clone()
    other[:, 2] += 0.3
    assert (run(model, given, timestep=other) - out).abs().max() > 1e-3

    # Without attention between tokens a frame sees its own action only
    alone = randomized(make(action_dim=5))
    for block in alone.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    actions = given["actions"].clone()
    first = run(alone, plain_inputs(), actions=actions)
    actions[:, 2] += 1
    changed = (run(alone, plain_inputs(), actions=actions) - first).abs().amax((0, 1, 3, 4)) > 0
    assert changed.tolist() == [False, False, True, False]
    same = given["actions"][:, :1]
    torch.testing.assert_close(
        run(alone, plain_inputs(), actions=same),
        run(alone, plain_inputs(), actions=same.expand(-1, FRAMES, -1)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_the_form_as_written_leaves_one_embedder_unused():
    model = randomized(make(action_dim=5, action_form="as_written"))
    model(**plain_inputs(), actions=torch.ones(2, 1, 5)).sample.square().mean().backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert dead and all(name.startswith("action_embed.sinusoid.") for name in dead)
    with pytest.raises(ValueError, match=r"actions must be \[2 or 1, 1, 5\]"):  # it knows one action for a clip
        model(**plain_inputs(), actions=torch.ones(2, FRAMES, 5))


def test_real_channels_as_condition():
    model = randomized(make(in_channels=17 + 2, condition_channels=2))
    condition = torch.randn(2, 2, FRAMES, HEIGHT, WIDTH)
    assert (
        run(model, plain_inputs(), condition=condition) - run(model, plain_inputs(), condition=-condition)
    ).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"condition must be \[2 or 1, 2, 4, 4, 6\]"):
        run(model, plain_inputs(), condition=condition[..., :3])


def test_fixed_positions_differ_everywhere():
    table = sincos_positions(64, (3, 4, 5))
    assert table.shape == (60, 64) and torch.cdist(table, table).add(torch.eye(60)).min() > 0.1


# ---- a base with new conditions ---------------------------------------------------------------------------------------

ADDED = {
    "actions": dict(action_dim=5),
    "camera": dict(camera_channels=6),
    "condition": dict(condition_channels=4, condition_vocab_size=9),
}


@pytest.mark.parametrize("name", ADDED)
def test_new_conditions_start_without_effect(name):
    base = randomized(make())
    model = add_conditions(base, **ADDED[name])
    given = {**plain_inputs(), name: all_inputs()[name]}
    out = run(base, plain_inputs())
    torch.testing.assert_close(run(model, given), out, atol=2e-6, rtol=1e-5)  # more rows may round differently
    if name == "actions":
        given[name] = given[name][:, :1]
    assert torch.equal(run(model, given), out)
    assert name in model.conditions and not model.training
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**given).sample.square().mean().backward()
    optimizer.step()
    changed = {**given, name: torch.zeros_like(given[name])}
    assert (run(model, given) - run(model, changed)).abs().max() > 1e-6  # and it learns from them
    assert torch.equal(run(base, plain_inputs()), run(add_conditions(base, **ADDED[name]), given))


def test_a_text_refiner_starts_without_effect_and_learns():
    base = randomized(make())
    model = add_conditions(base, text_refiner_layers=2)
    given = plain_inputs()
    assert torch.equal(run(model, given), run(base, given)) and model.conditions == base.conditions
    model(**given).sample.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    before = run(base, given), run(model, given)
    assert (before[0] - before[1]).abs().max() > 1e-6
    prepared = model.prepare_text(given["encoder_hidden_states"])
    torch.testing.assert_close(run(model, given, encoder_hidden_states=prepared), before[1])
    named = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("text_refiner")}
    assert named == {"norm_in", "blocks", "norm_out", "proj_out"}


def test_a_text_refiner_reads_words_in_their_order_and_nothing_past_the_end():
    refiner = randomized(TextRefiner(64, 2))
    text = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    text[:, 6:] = 0
    with torch.no_grad():
        out, shorter, none = refiner(text), refiner(text[:, :7]), refiner(torch.zeros(1, 4, 64))
        moved = refiner(text[:, [1, 0, *range(2, 9)]])
    assert out[:, 6:].abs().max() == 0 and none.abs().max() == 0
    torch.testing.assert_close(shorter[:, :6], out[:, :6])
    assert (moved[:, [1, 0]] - out[:, :2]).abs().max() > 1e-3


def test_several_conditions_and_a_mask_are_added_at_once(tmp_path):
    base = randomized(CosmosWorldTransformer3D(**PRESETS["tiny"]))
    added = add_conditions(
        base, condition_mask=True, num_views=2, view_embed_dim=3, **ADDED["actions"], **ADDED["camera"]
    )
    assert added.config.in_channels == 16 + 1 + 6 and added.takes_condition_mask
    given = all_inputs()
    given = {name: given[name] for name in (*plain_inputs(), "camera", "actions")}
    plain = plain_inputs()
    plain.pop("condition_mask")
    given["actions"] = given["actions"][:, :1]
    assert torch.equal(run(added, given, num_views=1), run(base, plain))
    added.save_pretrained(tmp_path)
    again = CosmosWorldTransformer3D.from_pretrained(tmp_path)
    assert torch.equal(run(again, given), run(added, given))


def test_additions_that_make_no_sense_are_refused():
    base = make(action_dim=5)
    with pytest.raises(
        ValueError, match="num_layers cannot be added to a model; conditions are condition_mask, camera"
    ):
        add_conditions(base, num_layers=3)
    with pytest.raises(ValueError, match="takes a condition_mask already"):
        add_conditions(base, condition_mask=True)
    with pytest.raises(ValueError, match="action_dim is 5 in this model and cannot become 7"):
        add_conditions(base, action_dim=7)
