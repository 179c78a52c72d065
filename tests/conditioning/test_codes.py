"""Which code frame belongs to which latent frame, against the pixel frames that each of them codes."""

import pytest
import torch

from cosmos_hf.conditioning.codes import CodeGrid, mirror_frames


def pixels(frame, compression):
    """The pixel frames that a latent frame codes."""
    return {0} if frame == 0 else set(range((frame - 1) * compression + 1, frame * compression + 1))


@pytest.mark.parametrize(("codes", "latents"), [(8, 8), (8, 4), (4, 4), (16, 4)])
def test_a_latent_frame_has_the_codes_of_its_pixels(codes, latents):
    grid = CodeGrid.of((codes, 16), (latents, 8))
    indices = torch.arange(4).view(1, 4, 1, 1).expand(2, 4, 3, 5)
    spread = grid.spread(indices)
    size = grid.latent_size(4, 3, 5)
    assert spread.shape == (2, size[0], 3, 5) and size[1:] == (6, 10)
    assert 1 + 3 * codes == 1 + (size[0] - 1) * latents  # both end at the same pixel frame
    for frame in range(size[0]):
        assert pixels(frame, latents) <= pixels(int(spread[0, frame, 0, 0]), codes)


@pytest.mark.parametrize(
    ("codes", "latents", "message"),
    [
        ((4, 16), (8, 8), "temporal compression of 4, the latents of 8"),
        ((8, 8), (8, 16), "spatial compression of 8, the latents of 16"),
        ((6, 16), (4, 8), "whole number of latents"),
    ],
)
def test_finer_codes_are_refused(codes, latents, message):
    with pytest.raises(ValueError, match=message):
        CodeGrid.of(codes, latents)


@pytest.mark.parametrize(("count", "expected"), [(5, [0, 1, 2, 3, 4, 3, 2, 1]), (1, [0] * 8), (3, [0, 1, 2, 1] * 2)])
def test_a_short_clip_goes_forwards_and_backwards(count, expected):
    clip = torch.arange(count).view(1, 1, count, 1, 1)
    assert mirror_frames(clip, 8).flatten().tolist() == expected


def test_a_long_clip_stays():
    clip = torch.arange(9).view(1, 1, 9, 1, 1)
    assert mirror_frames(clip, 8) is clip
