"""The image tokenizer: sizes, refusals, dtypes, gradients, save and load. Parity with the reference: tests/convert."""

import subprocess
import sys

import pytest
import torch

from cosmos_hf.models.autoencoder_cosmos_image import PRESETS, CosmosImageTokenizer
from tiny_tokenizers import DISCRETE, tiny_image, tiny_video

KINDS = {"continuous": dict(), "discrete": DISCRETE}


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return tiny_image()


@pytest.mark.parametrize(
    "geometry",
    [dict(), dict(spatial_compression=16), dict(patch_size=2), dict(patch_size=2, spatial_compression=16)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_geometry_round_trip_of_shapes(kind, geometry):
    model = tiny_image(**KINDS[kind], **geometry)
    factor = model.config.spatial_compression
    image = torch.rand(2, 3, 2 * factor, 3 * factor) * 2 - 1
    out = model.encode(image)
    assert out.latents.shape == (2, model.config.latent_channels, 2, 3)
    assert model.decode(out.latents).sample.shape == image.shape
    if kind == "discrete":
        assert out.indices.dtype == torch.int64 and out.indices.shape == (2, 2, 3)
        assert torch.equal(model.decode_indices(out.indices).sample, model.decode(out.latents).sample)
    else:
        assert out.indices is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        CosmosImageTokenizer(**PRESETS[name])


def test_wrong_inputs_are_refused(tokenizer):
    image = torch.zeros(1, 3, 16, 16)
    for call, argument, message in (
        (
            tokenizer.encode,
            torch.zeros(1, 3, 20, 16),
            "height must be a multiple of 8, got 20; the nearest legal is 16 or 24",
        ),
        (tokenizer.encode, torch.zeros(1, 3, 16, 4), "width must be a multiple of 8, got 4; the nearest legal is 8"),
        (tokenizer.encode, torch.zeros(1, 3, 1, 16, 16), r"image must be \[B, 3, H, W\]"),
        (tokenizer.encode, torch.zeros(1, 4, 16, 16), r"image must be \[B, 3, H, W\]"),
        (tokenizer.encode, torch.zeros(0, 3, 16, 16), "image is an empty batch"),
        (tokenizer.encode, image.to(torch.uint8), r"image must be floating point in \[-1, 1\], got torch.uint8"),
        (
            tokenizer.encode,
            image.bfloat16(),
            "image must have the tokenizer's dtype torch.float32, got torch.bfloat16",
        ),
        (tokenizer.encode, image + 255, r"image must lie in \[-1, 1\], got 255..255"),
        (tokenizer.encode, image * torch.nan, "image must be finite"),
        (tokenizer.decode, torch.zeros(1, 15, 2, 2), r"latents must be \[B, 16, H', W'\]"),
        (tokenizer.decode, torch.zeros(1, 16, 2), r"latents must be \[B, 16, H', W'\]"),
        (tokenizer.decode, torch.zeros(1, 16, 0, 2), "latents are empty"),
        (tokenizer.decode, torch.full((1, 16, 2, 2), torch.inf), "latents must be finite"),
        (tokenizer.decode, torch.zeros(1, 16, 2, 2).double(), "latents must have the tokenizer's dtype"),
        (tokenizer.decode, torch.zeros(1, 2, 2, dtype=torch.long), "decode_indices takes indices"),
        (tokenizer.decode_indices, torch.zeros(1, 2, 2, dtype=torch.long), "continuous"),
    ):
        with pytest.raises(ValueError, match=message):
            call(argument)


def test_wrong_indices_are_refused():
    model = tiny_image(**DISCRETE)
    indices = torch.zeros(1, 2, 2, dtype=torch.long)
    for bad, message in (
        (indices + 64000, r"indices must lie in \[0, 64000\)"),
        (indices - 1, r"indices must lie in \[0, 64000\)"),
        (indices[0], r"indices must be \[B, H', W'\]"),
        (indices.float(), "indices must be integers, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode_indices(bad)
    with pytest.raises(ValueError, match=r"latents must lie in \[-1, 1\], got 3..3: codes of a discrete tokenizer"):
        model.decode(torch.full((1, 6, 2, 2), 3.0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(channels=48), "the width of every level must be a multiple of 32"),
        (dict(channels_mult=(1,), spatial_compression=16), "too few levels for a spatial_compression of 16"),
        (dict(patch_size=3), "patch_size must be 2 or 4, got 3"),
        (dict(spatial_compression=32), "spatial_compression must be 4, 8 or 16"),
        (dict(quantizer="vq"), "quantizer must be None"),
        (dict(quantizer="fsq"), "must equal the number of fsq_levels"),
        (dict(latents_mean=[0.0] * 16), "must be given together"),
        (dict(latents_mean=[0.0] * 15, latents_std=[1.0] * 15), r"must be \[16\], got \[15\]"),
        (dict(latents_mean=[[0.0] * 2] * 16, latents_std=[[1.0] * 2] * 16), r"must be \[16\], got \[16, 2\]"),
        (dict(latents_mean=[0.0] * 16, latents_std=[0.0] * 16), "above zero"),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_image(**config)


def test_normalization():
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    model = tiny_image(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = torch.randn(2, 16, 3, 2)
    torch.testing.assert_close(model.normalize(latents), (latents - mean.view(1, 16, 1, 1)) / std.view(1, 16, 1, 1))
    torch.testing.assert_close(model.denormalize(model.normalize(latents)), latents)
    with pytest.raises(ValueError, match=r"latents must be \[B, 16, H', W'\]"):
        model.normalize(latents[0])


@pytest.mark.parametrize("make", [tiny_image, tiny_video], ids=["image", "video"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_keeps_the_meaning_of_codes(make, dtype):
    """Quantisation is float32 arithmetic whatever the model's dtype: equal inputs give equal indices, and indices equal codes."""
    model = make(**DISCRETE)
    pixels = torch.rand(1, 3, *[1] * (make is tiny_video), 16, 16) * 2 - 1
    expected = model.encode(pixels)
    cast = model.to(dtype).to("cpu")
    out = cast.encode(pixels.to(dtype))
    assert out.latents.dtype == dtype and out.indices.dtype == torch.int64
    assert torch.equal(cast.fsq.decode(out.indices).to(dtype).movedim(-1, 1), out.latents)
    assert torch.equal(cast.decode_indices(out.indices).sample, cast.decode(out.latents).sample)
    z = torch.randn(512, 6, dtype=dtype) * 2
    codes, indices = cast.fsq(z)
    assert torch.equal(indices, cast.fsq(z.float())[1]) and torch.equal(codes.float(), cast.fsq(z.float())[0])
    digits = (cast.fsq.decode(out.indices) - cast.fsq.decode(expected.indices)).abs()
    assert digits.max() <= 0.5  # rounding of the network may move a value over one edge, to the neighbouring code
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast.fsq(z)[1], indices)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    """Wide enough that group normalisation has several channels in each group: with one, it cancels a bias before it."""
    model = tiny_image(**KINDS[kind], channels=64).train()
    model.quant_conv.weight.data *= 5  # spread the codes: equal ones leave nothing for attention to tell apart
    model.enable_gradient_checkpointing()
    (model(torch.rand(2, 3, 16, 16)).sample ** 2).mean().backward()
    # A key's bias cannot matter: softmax is invariant under a shift of all logits.
    dead = [n for n, p in model.named_parameters() if (p.grad is None or not p.grad.any()) and "to_k.bias" not in n]
    assert not dead


def test_gradient_checkpointing_equals_plain():
    image = torch.rand(1, 3, 16, 16)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = tiny_image().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        (model(image).sample ** 2).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_a_new_model_is_a_projection():
    model = CosmosImageTokenizer(**PRESETS["tiny"])
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(model.encoder.mid(x), x)


def test_save_and_load_in_a_fresh_process(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 16, 16)
    torch.save((image, tokenizer.encode(image).latents.detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from cosmos_hf import CosmosImageTokenizer as C; d = sys.argv[1]; m = C.from_pretrained(d).eval();"
        "x, z = torch.load(d + '/expected.pt'); torch.testing.assert_close(m.encode(x).latents, z)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_folder_of_another_class_is_refused(tokenizer, tmp_path):
    tiny_video().save_pretrained(tmp_path / "video")
    tokenizer.save_pretrained(tmp_path / "image")
    with pytest.raises(
        ValueError, match="holds a CosmosVideoTokenizer, CosmosImageTokenizer reads CosmosImageTokenizer"
    ):
        CosmosImageTokenizer.from_pretrained(tmp_path / "video")
    with pytest.raises(ValueError, match="use CosmosImageTokenizer.from_pretrained"):
        type(tiny_video()).from_pretrained(tmp_path / "image")


def test_weights_that_do_not_fit_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_res_blocks": 1', '"num_res_blocks": 2'))
    with pytest.raises(ValueError, match="missing"):
        CosmosImageTokenizer.from_pretrained(tmp_path)
