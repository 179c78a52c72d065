"""Sizes by aspect ratio, and inputs that are padded instead of cropped."""

import pytest
import torch
from PIL import Image

from cosmos_hf.data.video import letterbox, read_video, write_video
from cosmos_hf.pipelines.buckets import RATIOS, SIZES, nearest_ratio, size_of
from cosmos_hf.pipelines.encode import content_box

PROMPT = "A robot arm picks up the red cube."


def run(pipe, **arguments):
    usual = dict(prompt=PROMPT, num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(1))
    return pipe(**usual | arguments).frames


def test_published_sizes_are_legal_and_of_their_shape():
    for name, sizes in SIZES.items():
        assert set(sizes) == set(RATIOS)
        for ratio, (height, width) in sizes.items():
            assert height % 16 == 0 and width % 16 == 0 and nearest_ratio(height, width) == ratio, (name, ratio)
    assert size_of("9:16", 704, 1280, 16) == (1280, 704) and size_of("1:1", 704, 1280, 16) == (960, 960)


def test_other_models_keep_their_number_of_pixels():
    """The nano model's 96x128 has no table; every shape has about as many pixels and legal sides."""
    assert size_of("4:3", 96, 128, 16) == (96, 128)
    for ratio in RATIOS:
        height, width = size_of(ratio, 96, 128, 16)
        assert height % 16 == 0 and width % 16 == 0 and 0.75 < height * width / (96 * 128) < 1.35
        assert nearest_ratio(height, width) == ratio


@pytest.mark.parametrize(
    ("size", "ratio"),
    [((1080, 1920), "16:9"), ((1920, 1080), "9:16"), ((480, 640), "4:3"), ((500, 510), "1:1"), ((40, 900), "16:9")],
)
def test_nearest_shape(size, ratio):
    assert nearest_ratio(*size) == ratio


def test_auto_follows_the_input(video2world, tmp_path):
    """The tiny model's usual size is 32x48: a portrait photo becomes a portrait video of about as many pixels."""
    Image.new("RGB", (90, 160), "red").save(tmp_path / "phone.png")
    assert run(video2world, image=str(tmp_path / "phone.png"), resolution="auto").shape[-2:] == (48, 32)
    assert run(video2world, image=Image.new("RGB", (100, 100)), resolution="16:9").shape[-2:] == (32, 48)
    write_video(tmp_path / "wide.mp4", torch.zeros(3, 5, 90, 160, dtype=torch.uint8), fps=5)
    assert run(video2world, video=tmp_path / "wide.mp4", resolution="auto").shape[-2:] == (32, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(resolution="auto", height=32), "give resolution='auto' or height and width, not both"),
        (dict(resolution="21:9"), "resolution must be 'auto' or one of 16:9, 4:3, 1:1, 3:4, 9:16, got '21:9'"),
        (dict(fit="stretch"), "fit must be one of crop, pad, got 'stretch'"),
    ],
)
def test_contradictions_are_refused(video2world, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(video2world, image=Image.new("RGB", (48, 32)), **arguments)


def test_a_shape_far_from_the_trained_ones_is_warned_of(video2world, caplog):
    run(video2world, image=Image.new("RGB", (48, 32)), height=32, width=48)
    assert not caplog.records
    run(video2world, image=Image.new("RGB", (48, 32)), height=16, width=48)
    assert "16x48 (height x width) is far from the shapes" in caplog.text


def test_auto_without_an_input_is_refused(text2world):
    with pytest.raises(ValueError, match="resolution='auto' follows an image or a video"):
        run(text2world, resolution="auto")


# ---- padding -------------------------------------------------------------------------------------------------------


def test_letterbox_keeps_the_whole_picture():
    """A wide red picture with a green left edge, in a square: mirrored above and below, and cut out again."""
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("green", (0, 0, 10, 20))
    box = letterbox(20, 40, 32, 32)
    assert (box.top, box.left, box.height, box.width) == (8, 0, 16, 32)
    padded = read_video(picture, height=32, width=32, fit="pad").frames
    inner = read_video(picture, height=16, width=32).frames
    assert torch.equal(box.cut(padded), inner)
    assert torch.equal(padded[:, :, :8], inner[:, :, :8].flip(2)) and torch.equal(
        padded[:, :, 24:], inner[:, :, 8:].flip(2)
    )
    mask = box.padding_mask(32, 32)
    assert mask.shape == (1, 1, 32, 32) and mask.sum() == 16 * 32 and mask[0, 0, 8:24].sum() == 0


def test_the_network_is_told_what_is_padding(video2world):
    masks = []
    hook = video2world.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: masks.append(kwargs.get("padding_mask")), with_kwargs=True
    )
    square = Image.new("RGB", (40, 40), "red")
    square.paste("green", (0, 0, 20, 20))
    padded = run(video2world, image=square, fit="pad")
    told = masks[-1]
    masks.clear()
    fitting = run(video2world, image=Image.new("RGB", (96, 64), "red"), fit="pad")
    assert masks == [None] * len(masks)
    hook.remove()
    assert padded.shape[-2:] == (32, 32) and fitting.shape[-2:] == (32, 48)
    assert torch.equal(told, letterbox(40, 40, 32, 48).padding_mask(32, 48)) and told.sum() == 32 * 16


def test_the_padding_mask_changes_the_result(video2world):
    """The same padded frame given as it is, so that only the mask differs."""
    square = Image.new("RGB", (40, 40), "red")
    frame = read_video(square, height=32, width=48, fit="pad").frames
    told = run(video2world, image=square, fit="pad", output_type="latent")
    untold = run(video2world, video=frame, output_type="latent")
    assert torch.equal(told[:, :, 0], untold[:, :, 0]) and (told - untold)[:, :, 1:].abs().max() > 1e-3


def test_one_call_pads_one_shape():
    with pytest.raises(ValueError, match="fit='pad' needs inputs of one shape"):
        content_box([(20, 40), (40, 40)], 32, 32)
