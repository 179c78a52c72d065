"""Tiles: how often the network runs, what the seams cost, and what is refused. Measured with the bundled tokenizer."""

import pytest
import torch

from cosmos_hf import CosmosVideoTokenizer, nano_path
from cosmos_hf.data.video import read_video, to_float
from cosmos_hf.models.tiling import tile_starts
from tiny_tokenizers import DISCRETE, tiny_image, tiny_video


@pytest.fixture(scope="module")
def nano():
    return CosmosVideoTokenizer.from_pretrained(f"{nano_path('video2world')}/vae").eval()


@pytest.fixture(scope="module")
def video():
    return to_float(read_video(f"{nano_path('video2world')}/example.mp4", num_frames=5).frames)[None]


class Calls:
    """Counts how often a module runs, and on how large an input."""

    def __init__(self, module):
        self.sizes = []
        self._hook = module.register_forward_hook(lambda _, args, __: self.sizes.append(args[0].shape[2:4]))

    def stop(self) -> list:
        self._hook.remove()
        return self.sizes


def test_starts():
    assert tile_starts(512, 512, 448) == [0]
    assert tile_starts(513, 512, 448) == [0, 1]
    assert tile_starts(1280, 512, 448) == [0, 448, 768]
    for size in range(64, 400, 8):
        starts = tile_starts(size, 64, 48)
        assert starts[-1] + 64 == size and all(b - a <= 48 for a, b in zip(starts[:-1], starts[1:], strict=True))


@torch.no_grad()
def test_tiling_changes_the_number_and_size_of_network_calls(nano, video):
    latents = nano.encode(video).latents
    plain = nano.decode(latents).sample
    for part, call, argument, full, tile in (
        (nano.encoder, nano.encode, video, (96, 128), (64, 64)),
        (nano.decoder, nano.decode, latents, (12, 16), (8, 8)),
    ):
        calls = Calls(part)
        call(argument)
        assert [tuple(size) for size in calls.stop()] == [full]
        nano.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64, tile_sample_stride_width=48)
        calls = Calls(part)
        call(argument)
        assert [tuple(size) for size in calls.stop()] == [tile] * 2 * 3
        nano.disable_tiling()
    assert torch.equal(nano.decode(latents).sample, plain)


@torch.no_grad()
def test_frames_no_larger_than_a_tile_are_not_touched(nano, video):
    expected = nano.encode(video).latents
    nano.enable_tiling()
    assert torch.equal(nano.encode(video).latents, expected)
    nano.disable_tiling()


def jump(frames, x):
    """Mean step from the column before x to x."""
    return (frames[..., x] - frames[..., x - 1]).abs().mean().item()


@torch.no_grad()
def test_seams(nano, video):
    """Blended tiles are closer to the whole frame than tiles side by side, and show no edge where one begins."""
    latents = nano.encode(video).latents
    whole = nano.decode(latents).sample
    figures = {}
    for name, stride in (("side by side", 64), ("blended", 32)):
        nano.enable_tiling(96, 64, 96, stride)
        tiled = nano.decode(latents).sample
        error = (tiled - whole).square().mean()
        # Columns 32 and 64: with a stride of 32 a tile begins or ends there, with a stride of 64 at column 64.
        edge = max(abs(jump(tiled, x) - jump(whole, x)) for x in (32, 64))
        figures[name] = (-10 * torch.log10(error / 4)).item(), edge
    nano.disable_tiling()
    assert figures["blended"][0] > 30 and figures["blended"][0] > figures["side by side"][0] + 1, figures
    assert figures["blended"][1] < 0.01 and figures["side by side"][1] > 2 * figures["blended"][1], figures


@torch.no_grad()
def test_tiles_and_chunks_together(nano, video):
    """A stream keeps a state for every tile: chunk by chunk equals tile by tile at once."""
    nano.enable_tiling(64, 64, 48, 48)
    latents = nano.encode(video).latents
    torch.testing.assert_close(nano.encode(video, chunk=4).latents, latents, atol=1e-4, rtol=1e-4)
    frames = nano.decode(latents).sample
    torch.testing.assert_close(nano.decode(latents, chunk=1).sample, frames, atol=1e-4, rtol=1e-4)
    stream = nano.encoder_stream()
    stream.push(video)
    assert stream.attention_bytes == 6 * 2 * 96 * 4 * (2 * 8 * 8)
    nano.disable_tiling()


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_image, tiny_video], ids=["image", "video"])
def test_discrete_codes_are_rounded_after_blending(make):
    model = make(**DISCRETE)
    pixels = torch.rand(1, 3, *[1] * (make is tiny_video), 32, 40) * 2 - 1
    model.enable_tiling(16, 16, 8, 8)
    out = model.encode(pixels)
    assert torch.equal(model.fsq.decode(out.indices).movedim(-1, 1), out.latents)
    assert model.decode_indices(out.indices).sample.shape == pixels.shape


@torch.no_grad()
def test_tiles_of_images():
    model = tiny_image()
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    calls = Calls(model.encoder)
    model.encode(image)
    model.enable_tiling(16, 32, 16, 16)
    latents = model.encode(image).latents
    assert len(calls.stop()) == 1 + 2 * 2 and latents.shape == (1, 16, 4, 6)
    assert model.decode(latents).sample.shape == image.shape


def test_illegal_tiles_are_refused():
    model = tiny_video()
    for arguments, message in (
        (dict(tile_sample_min_height=100), "tile_sample_min_height must be a positive multiple of 8, got 100"),
        (dict(tile_sample_stride_width=0), "tile_sample_stride_width must be a positive multiple of 8, got 0"),
        (
            dict(tile_sample_min_width=64, tile_sample_stride_width=72),
            "tile_sample_stride_width must be at most tile_sample_min_width=64, got 72",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.enable_tiling(**arguments)
    assert model.tiling is None
