"""Which latent frames are given: indicators, masks and their checks."""

import pytest
import torch

from cosmos_hf.conditioning.frames import FrameCondition, condition_indicator, condition_mask


def test_indicator_and_mask():
    indicator = condition_indicator(5, 2)
    assert indicator.shape == (1, 1, 5, 1, 1) and indicator.flatten().tolist() == [1, 1, 0, 0, 0]
    each = condition_indicator(3, torch.tensor([0, 3, 1]))
    assert each.flatten(1).tolist() == [[0, 0, 0], [1, 1, 1], [1, 0, 0]]
    mask = condition_mask(each, 4, 6)
    assert mask.shape == (3, 1, 3, 4, 6) and mask[2, 0].flatten(1).mean(1).tolist() == [1, 0, 0]


def test_impossible_counts_and_shapes_are_refused():
    for count in (-1, 6, torch.tensor([1, 6])):
        with pytest.raises(ValueError, match="between 0 and the clip's 5 latent frames"):
            condition_indicator(5, count)
    latents = torch.zeros(2, 16, 5, 4, 4)
    with pytest.raises(ValueError, match="augment_noise must have the shape of latents"):
        FrameCondition(latents, condition_indicator(5, 1), 0.001, latents[:1])
    with pytest.raises(ValueError, match="indicator must be"):
        FrameCondition(latents, condition_indicator(4, 1), 0.001, latents)
