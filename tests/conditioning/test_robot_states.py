"""Actions derived from states."""

import numpy as np
import pytest

from cosmos_hf.conditioning.robot_states import (
    SCALE,
    actions_from_states,
    euler_from_rotation,
    integrate_actions,
    rotation_from_euler,
)


def wandering_states(rng, steps=33):
    position = np.cumsum(rng.normal(0, 0.02, (steps, 3)), axis=0)
    angles = np.clip(np.cumsum(rng.normal(0, 0.1, (steps, 3)), axis=0), -1.2, 1.2)
    return np.concatenate([position, angles, rng.random((steps, 1))], axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_actions_integrate_back_to_the_states(seed):
    states = wandering_states(np.random.default_rng(seed))
    actions = actions_from_states(states)
    assert actions.shape == (32, 7)
    np.testing.assert_allclose(integrate_actions(states[0], actions), states, atol=1e-9)


def test_an_action_is_in_the_earlier_end_effectors_frame():
    turned = np.array([0.1, 0.2, 0.3, 0, 0, np.pi / 2, 1.0])  # its x axis is the base's y axis
    moved = turned + [0, 0.05, 0, 0, 0, 0.1, -1.0]
    np.testing.assert_allclose(
        actions_from_states(np.stack([turned, moved])), [[SCALE * 0.05, 0, 0, 0, 0, SCALE * 0.1, 0]], atol=1e-12
    )


def test_euler_angles_round_trip():
    angles = np.array([0.4, -0.9, 2.5])
    rotation = rotation_from_euler(angles)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(euler_from_rotation(rotation), angles, atol=1e-12)
