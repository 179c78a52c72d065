"""The tokenizer's losses term by term, and what of a clip they see."""

import pytest
import torch

from cosmos_hf.data.video import to_float
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


def test_flow_term_sees_shimmer_along_motion():
    """A texture that moves by two pixels a frame; an error that stays in place, and one that changes its sign."""
    texture = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 12) * 2 - 1, (32, 48), mode="bicubic").clamp(-1, 1)
    video = torch.stack([texture[0].roll(2 * t, 2) for t in range(5)], 1)[None]
    flow = loss_with(flow_weight=1.0, flow_frames=3)
    sign = torch.tensor([1.0, -1, 1, -1, 1]).view(1, 1, 5, 1, 1)
    assert flow.compare(video, video)[0].item() == 0
    assert flow.compare(video + 0.1, video)[0].item() == pytest.approx(0, abs=1e-6)
    assert flow.compare(video + 0.1 * sign, video)[0].item() == pytest.approx(0.2, rel=0.02)
    result = (video[:, :, :1] * 0.9).requires_grad_()
    loss, logs = flow.compare(result, video[:, :, :1])  # an image
    loss.backward()
    assert logs["flow"] == 0 and not result.grad.any()


def test_flow_term_sees_a_stretch_of_flow_frames():
    video = torch.rand(1, 3, 6, 32, 32) * 2 - 1
    result = (video * 0.8).requires_grad_()
    loss_with(flow_weight=1.0, flow_frames=2).compare(result, video)[0].backward()
    assert (result.grad.abs().amax((0, 1, 3, 4)) > 0).sum() == 2


def test_image_steps_take_frames_of_the_clips():
    video = torch.randint(256, (2, 3, 5, 32, 32), dtype=torch.uint8)
    loss = loss_with(l1_weight=1.0, image_share=1.0, images_per_clip=3)
    images = loss.draw({"video": video})
    assert images.shape == (6, 3, 1, 32, 32)
    frames = to_float(video).transpose(1, 2).flatten(0, 1)
    assert all(any(torch.equal(image[:, 0], frame) for frame in frames) for image in images)
    share = loss_with(l1_weight=1.0, image_share=0.25)
    drawn = sum(share.draw({"video": video}).shape[2] == 1 for _ in range(400))
    assert 60 < drawn < 140
    clips = loss_with(l1_weight=1.0)
    assert torch.equal(clips.draw({"video": video}), to_float(video))
    assert clips.draw({"video": video}, only_images=True).shape == (8, 3, 1, 32, 32)


def test_image_steps_take_pictures_where_there_are_some():
    batch = {"video": torch.zeros(2, 3, 5, 16, 16, dtype=torch.uint8)}
    batch["pictures"] = torch.full((2, 4, 3, 16, 16), 255, dtype=torch.uint8)
    images = loss_with(l1_weight=1.0, image_share=1.0).draw(batch)
    assert images.shape == (8, 3, 1, 16, 16) and (images == 1).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(), "one of them above 0"),
        (dict(l1_weight=1.0, gram_weight=-1.0), "must be >= 0"),
        (dict(l1_weight=1.0, image_share=1.5), r"image_share must be in \[0, 1\]"),
        (dict(l1_weight=1.0, adversarial_weight=0.1), "give init_from"),
        (dict(l1_weight=1.0, adversarial_weight=0.1, init_from="x", mixed_precision="fp16"), "take bf16 or no"),
        (dict(l1_weight=1.0, freeze_encoder=True), "freeze_encoder keeps .* give init_from"),
        (dict(l1_weight=1.0, kind="audio"), "kind must be video, image"),
        (dict(flow_weight=1.0, flow_frames=1), "flow_frames must be at least 2"),
        (dict(flow_weight=1.0, flow_estimator="raft"), "flow_estimator must be 'dis' or 'module:name'"),
        (dict(perceptual_weight=1.0, perceptual_backbone="vgg16"), "needs vgg_weights"),
    ],
)
def test_mistakes_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        loss_with(**more)
