"""The meaning of actions: saved, checked, normalised and grouped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.action import BRIDGE, DRIVING, FILE_NAME, ActionSpec, Gripper, group_actions
from cosmos_hf.conditioning.robot_states import actions_from_states


def drawn(count=500, seed=0):
    rng = np.random.default_rng(seed)
    return np.c_[rng.normal(0.2, [0.5, 1, 0.3, 0.1, 0.1, 2], (count, 6)), rng.random(count)]


def test_saved_and_loaded(tmp_path):
    spec = BRIDGE.with_statistics(drawn())
    spec.save(tmp_path / "checkpoint")
    assert ActionSpec.load(tmp_path / "checkpoint") == spec
    record = json.loads((tmp_path / "checkpoint" / FILE_NAME).read_text())
    assert record["gripper"] == {"name": "gripper", "open": 1.0, "closed": 0.0} and record["units"][0] == "m x 20"


def test_loading_is_strict(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody knows what the model's actions mean"):
        ActionSpec.load(tmp_path)
    path = DRIVING.save(tmp_path)
    good = json.loads(path.read_text())
    for change, message in (
        ({"colour": "red"}, r"unknown fields \['colour'\]"),
        ({"names": ["steer"]}, "units has 2 entries for 1 numbers"),
        ({"kind": "sideways"}, "kind must be one of delta, absolute, trajectory"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            ActionSpec.load(tmp_path)
    path.write_text(json.dumps({key: value for key, value in good.items() if key != "rate"}))
    with pytest.raises(ValueError, match="rate"):
        ActionSpec.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ActionSpec.load(tmp_path)


@pytest.mark.parametrize("normalisation", ["none", "standard", "range", "quantile"])
def test_normalisation_and_back(normalisation):
    actions = drawn()
    spec = BRIDGE.with_statistics([actions[:200], actions[200:]], normalisation)
    normalised = spec.normalise(actions, fps=5)
    torch.testing.assert_close(spec.denormalise(normalised), torch.from_numpy(actions).float(), atol=1e-5, rtol=1e-5)
    if normalisation == "standard":
        torch.testing.assert_close(normalised.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
        torch.testing.assert_close(normalised.std(0, correction=0), torch.ones(7), atol=1e-4, rtol=0)
    if normalisation == "range":
        torch.testing.assert_close(normalised.amax(0), torch.ones(7), atol=1e-4, rtol=0)
        torch.testing.assert_close(normalised.amin(0), -torch.ones(7), atol=1e-4, rtol=0)
    if normalisation == "quantile":
        assert ((normalised.abs() <= 1).float().mean(0) > 0.97).all() and normalised.abs().max() > 1


def test_a_number_that_never_changes_is_not_scaled():
    actions = drawn()
    actions[:, 2] = 0.5
    spec = BRIDGE.with_statistics(actions)
    assert spec.scale[2] == 1 and spec.normalise(actions)[:, 2].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("actions", "fps", "message"),
    [
        (drawn()[:, :6], None, "actions have 6 numbers, 7 are needed for arm with a two-finger gripper: x, y, z"),
        (drawn() * np.nan, None, "NaN"),
        (drawn(), 10, "given at 10 per second, the model was trained at 5"),
        (drawn() * [20, 1, 1, 1, 1, 1, 1], None, "the action 'x' goes from .* m x 20, the data were within"),
        (drawn() * [1, 1, 1, 1, 1, 1, 100], None, "'gripper' goes from"),
        (drawn() * [1, 1, 1, 1, 1, 1, -0.4], None, "1 is open and 0 closed"),
    ],
)
def test_actions_that_do_not_fit_are_refused(actions, fps, message):
    spec = BRIDGE.with_statistics(drawn())
    assert spec.check(drawn(seed=1), 5).shape == (500, 7)
    with pytest.raises(ValueError, match=message):
        spec.check(actions, fps)
    with pytest.raises(ValueError, match=message):
        spec.normalise(actions, fps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rate=10.0), "rate 10.0, needed 5.0"),
        (dict(gripper=Gripper("gripper", 0.0, 1.0)), "gripper Gripper.*open=0.0.*needed"),
        (dict(frame="robot base"), "frame 'robot base', needed 'end effector'"),
        (dict(units=("m",) * 6 + ("share open",)), "units m, m"),
        (dict(kind="absolute", embodiment="hand"), "embodiment 'hand'.*kind 'absolute'"),
    ],
)
def test_another_convention_is_refused_with_words(change, message):
    BRIDGE.check_same(BRIDGE.with_statistics(drawn()))
    with pytest.raises(ValueError, match=message):
        BRIDGE.check_same(replace(BRIDGE, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(names=("x",) * 7), "each once"),
        (dict(rate=0), "rate must be positive"),
        (dict(normalisation="magic"), "normalisation must be one of none, standard"),
        (dict(normalisation="standard"), "offset has 0 entries for 7"),
        (dict(gripper=Gripper("hand", 1, 0)), "'hand' is none of the numbers"),
        (dict(gripper=Gripper("gripper", 1, 1)), "different values"),
        (dict(normalisation="standard", offset=(0,) * 7, scale=(0,) * 7), "scale must be positive"),
    ],
)
def test_a_spec_that_contradicts_itself(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BRIDGE, **change)


def test_actions_of_a_latent_frame_are_those_that_lead_to_its_frames():
    actions = torch.arange(16.0).view(8, 2).expand(3, 8, 2)
    grouped = group_actions(actions, 4)
    assert grouped.shape == (3, 3, 8) and grouped[:, 0].abs().max() == 0
    assert grouped[1, 1].tolist() == list(range(8)) and grouped[1, 2].tolist() == list(range(8, 16))
    with pytest.raises(ValueError, match="8 actions do not fill groups of 3"):
        group_actions(actions, 3)


def test_accumulated_actions_are_the_pose_relative_to_the_first_frame():
    rng = np.random.default_rng(0)
    states = np.cumsum(rng.normal(0, 0.1, (9, 7)), axis=0)
    states[:, 6] = rng.uniform(0, 1, 9)
    actions = actions_from_states(states)
    spec = BRIDGE.with_accumulation([torch.from_numpy(actions)])
    led_to = spec.accumulate(torch.from_numpy(actions)[None])[0].numpy()
    direct = [actions_from_states(states[[0, t]])[0] for t in range(1, 9)]  # from the first frame in one step
    np.testing.assert_allclose(led_to, direct, atol=1e-5)
    assert spec.num_inputs == 14 and spec.check_same(BRIDGE) is None
    inputs = spec.inputs(torch.from_numpy(actions))
    np.testing.assert_allclose(inputs[:, :7], actions, atol=1e-6)
    np.testing.assert_allclose(inputs[:, 7:].square().mean(0), np.ones(7), rtol=1e-4)


def test_accumulated_actions_of_joints_are_sums():
    spec = ActionSpec(names=("a", "grip"), units=("rad", ""), frame="joints", kind="delta", rate=5.0)
    spec = replace(spec, gripper=Gripper("grip", 1.0, 0.0), accumulated_scale=(2.0, 1.0))
    inputs = spec.inputs([[1.0, 1.0], [2.0, 0.5], [-1.0, 0.0]])
    assert inputs.tolist() == [[1.0, 1.0, 0.5, 1.0], [2.0, 0.5, 1.5, 0.5], [-1.0, 0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="only deltas add up"):
        replace(spec, kind="absolute")
    turned = replace(BRIDGE, units=("m",) * 3 + ("deg",) * 3 + ("share open",))
    with pytest.raises(ValueError, match="'rad' or 'rad x <number>'"):
        turned.accumulate(torch.zeros(2, 7))
