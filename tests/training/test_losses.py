"""The tokenizer's losses term by term, and what of a clip they see."""

import pytest
import torch

from cosmos_hf.training.config import TokenizerConfig
from cosmos_hf.training.losses import ReconstructionLoss


def loss_with(**weights):
    return ReconstructionLoss(TokenizerConfig(output_dir="x", data=["x"], **({"l1_weight": 0.0} | weights)))


@pytest.fixture
def video():
    return torch.rand(2, 3, 5, 32, 32) * 2 - 1


def test_pixel_terms(video):
    loss, logs = loss_with(l1_weight=2.0, l2_weight=3.0).compare(video + 0.1, video)
    assert loss.item() == pytest.approx(2 * 0.1 + 3 * 0.01, rel=1e-4)
    assert logs["psnr"].item() == pytest.approx(26.02, abs=0.01)


def test_temporal_term_sees_flicker_but_no_constant_error(video):
    temporal = loss_with(temporal_weight=1.0)
    assert temporal.compare(video + 0.1, video)[0].item() == pytest.approx(0, abs=1e-6)
    flicker = torch.tensor([0.1, -0.1, 0.1, -0.1, 0.1]).view(1, 1, 5, 1, 1)
    assert temporal.compare(video + flicker, video)[0].item() == pytest.approx(0.2, rel=1e-4)
    assert temporal.compare(video[:, :, :1] + 0.1, video[:, :, :1])[0].item() == 0  # an image


def test_perceptual_and_gram_terms_have_gradients(video):
    result = (video * 0.8).requires_grad_()
    for name in ("perceptual_weight", "gram_weight"):
        loss, _ = loss_with(**{name: 1.0}).compare(result, video)
        (gradient,) = torch.autograd.grad(loss, result)
        touched = gradient.abs().amax((0, 1, 3, 4)) > 0
        assert touched.sum() == 2  # perceptual_frames
        assert loss_with(**{name: 1.0}).compare(video, video)[0].item() == pytest.approx(0, abs=1e-4)


def test_image_steps_take_frames_of_the_clips(video):
    loss = loss_with(l1_weight=1.0, image_share=1.0, images_per_clip=3)
    images = loss.draw(video)
    assert images.shape == (6, 3, 1, 32, 32)
    frames = video.transpose(1, 2).flatten(0, 1)
    assert all(any(torch.equal(image[:, 0], frame) for frame in frames) for image in images)
    share = loss_with(l1_weight=1.0, image_share=0.25)
    drawn = sum(share.draw(video).shape[2] == 1 for _ in range(400))
    assert 60 < drawn < 140
    assert loss_with(l1_weight=1.0).draw(video) is video


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(), "one of them above 0"),
        (dict(l1_weight=1.0, gram_weight=-1.0), "must be >= 0"),
        (dict(l1_weight=1.0, image_share=1.5), r"image_share must be in \[0, 1\]"),
        (dict(l1_weight=1.0, adversarial_weight=0.1), "give init_from"),
        (dict(l1_weight=1.0, freeze_encoder=True), "freeze_encoder belongs to the adversarial stage"),
        (dict(perceptual_weight=1.0, perceptual_backbone="vgg16"), "needs vgg_weights"),
    ],
)
def test_mistakes_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        loss_with(**more)
