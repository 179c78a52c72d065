"""What the actions of a run mean, said by LeRobot data sets or not, and data that do not fit it."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.action import ActionSpec, Gripper
from cosmos_hf.data.lerobot_writer import LeRobotWriter
from cosmos_hf.training.action_specs import find_action_spec
from cosmos_hf.training.cache import LatentDataset

SPEC = ActionSpec(
    names=("x", "y", "gripper"),
    units=("m", "m", "share open"),
    frame="robot base",
    kind="delta",
    rate=5,
    embodiment="my arm",
    gripper=Gripper("gripper", open=1, closed=0),
)


@pytest.fixture
def write(tmp_path):
    def write(name, spec=SPEC, stated=True):
        with LeRobotWriter(tmp_path / name, 5, spec) as writer:
            writer.add(torch.zeros(3, 9, 16, 16, dtype=torch.uint8), np.full((8, 3), 0.1))
        if not stated:
            (tmp_path / name / "meta" / "action_spec.json").unlink()
        return str(tmp_path / name)

    return write


def configured(*data, **more):
    known = dict(conditions=["action"], action_spec="", data=list(data), val_data=[], action_normalisation="quantile")
    return SimpleNamespace(**known | dict(accumulate_actions=False) | more)


def clips(*arrays, fps=5.0):
    keys = [f"clip{i}" for i in range(len(arrays))]
    data = LatentDataset([{}] * len(arrays), keys, keys, arrays=[{"actions": part} for part in arrays])
    data.kinds = [((16, 3, 2, 2), fps)] * len(arrays)
    return data


def drawn(largest=0.1):
    return np.random.default_rng(0).uniform(0, largest, (8, 3))


def test_a_data_set_says_what_its_actions_mean(write, caplog):
    spec = find_action_spec(configured(write("arm")), clips(drawn()))
    spec.check_same(SPEC)
    assert spec.gripper == SPEC.gripper and spec.normalisation == "quantile" and not caplog.text


def test_what_is_assumed_of_a_silent_one_is_told(write, caplog):
    silent = write("silent", stated=False)
    spec = find_action_spec(configured(silent), clips(drawn()))
    assert spec.kind == "absolute" and spec.gripper is None
    assert f"{silent} does not say what its actions mean" in caplog.text
    assert "kind 'absolute', frame 'joints', no gripper" in caplog.text and "action_spec: FOLDER" in caplog.text
    caplog.clear()
    spec = find_action_spec(configured(silent, write("arm")), clips(drawn()))
    assert spec.kind == "delta" and "Assumed: kind 'delta', frame 'robot base', 'gripper' the gripper" in caplog.text


def test_data_sets_of_the_hub_are_asked_too(write, monkeypatch):
    arm = write("arm")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: arm)
    assert find_action_spec(configured("hf://someone/arm"), clips(drawn())).frame == "robot base"


def test_data_sets_that_say_something_else_are_refused(write, tmp_path):
    arm, joints = write("arm"), write("joints", replace(SPEC, frame="joints", units=("rad", "rad", "share open")))
    SPEC.save(tmp_path)
    message = "joints says in meta/action_spec.json .* units rad, .*needed m, .*frame 'joints', needed 'robot base'"
    for config in (
        configured(arm, joints),
        configured(arm, val_data=[joints]),
        configured(joints, action_spec=str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=message):
            find_action_spec(config, clips(drawn()))


def test_held_out_actions_out_of_range_are_a_warning_before_the_first_step(write, caplog):
    """What a clip cannot be read by is an error that names it, and so is training data beyond a range that was given."""
    config, far = configured(write("arm")), drawn()
    far[3, 0] = 0.4
    with caplog.at_level(logging.WARNING):
        spec = find_action_spec(config, clips(drawn()), {"held_out": clips(drawn(), far)})
    assert "clip 'clip1' of held_out: the action 'x' goes from" in caplog.text and "to 0.4 m" in caplog.text
    assert spec.high[0] < 0.1 and "clip0" not in caplog.text
    with pytest.raises(ValueError, match="clip 'clip1' of held_out: the gripper 'gripper' goes from"):
        find_action_spec(config, clips(drawn()), {"held_out": clips(drawn(), 20 * far)})
    with pytest.raises(ValueError, match="clip 'clip0' of the training data: actions are given at 10 per second"):
        find_action_spec(config, clips(drawn(), fps=10.0))
    with pytest.raises(ValueError, match="clip 'clip1' of the training data: actions have 2 numbers, 3 are needed"):
        find_action_spec(config, clips(drawn(), drawn()[:, :2]))
