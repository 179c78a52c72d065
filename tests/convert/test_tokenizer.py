"""Parity of the video tokenizers with the reference's fixtures, and the converter's refusals."""

import pytest
import torch

from cosmos_hf.convert import load_original
from cosmos_hf.convert.tokenizer import convert_tokenizer_keys, tokenizer_class, tokenizer_config
from cosmos_hf.models.image_layers import image_patch, image_unpatch
from cosmos_hf.models.quantizers import FiniteScalarQuantizer
from cosmos_hf.models.video_layers import haar_patch, haar_unpatch
from golden_files import FULL, golden, golden_json, weights

CORE = ("cv8x8x8_p4", "cv4x8x8_p2", "ci16x16_p4", "di8x8_p4")
NAMES = CORE
if FULL:
    NAMES = sorted(
        p.stem
        for pattern in ("[cd]v*", "[cd]i*", "v01_*")
        for p in (FULL / "tokenizers").glob(pattern + ".safetensors")
    )


def load(name, **more):
    tensors, metadata, config = golden("tokenizers", name, **more)
    class_name = metadata["cls"].rsplit(".", 1)[-1]
    return tensors, class_name, config


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    tensors, class_name, config = load(name, outputs=True)
    model = load_original(class_name, config, weights(tensors))
    assert not model.training and model.dtype == torch.float32
    for case in sorted(key.removeprefix("input") for key in tensors if key.startswith("input")):
        out = model.encode(tensors[f"input{case}"])
        if out.indices is None:
            torch.testing.assert_close(out.latents, tensors[f"latent{case}"], atol=5e-5, rtol=0)
            video = model.decode(tensors[f"latent{case}"]).sample
        else:
            assert torch.equal(out.indices, tensors[f"indices{case}"].long())
            assert torch.equal(out.latents, tensors[f"codes{case}"])
            video = model.decode_indices(tensors[f"indices{case}"]).sample
        expected = tensors[f"output{case}"]
        torch.testing.assert_close(video, expected, atol=1e-4 * expected.std().item(), rtol=0)


@pytest.mark.parametrize("patch", [2, 4])
def test_wavelets(patch):
    tensors, _, _ = golden("tokenizers", "units")

    def last(x):
        return x.permute(0, 2, 3, 4, 1)

    video = tensors["haar3d.input"]
    patches = haar_patch(last(video), patch)
    torch.testing.assert_close(patches, last(tensors[f"haar3d.p{patch}.output"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(haar_unpatch(patches, patch), last(video), atol=1e-6, rtol=0)
    coefficients = last(tensors[f"haar3d.p{patch}.rand_coeffs"])
    torch.testing.assert_close(haar_unpatch(coefficients, patch), last(tensors[f"haar3d.p{patch}.rand_inverse"]))


@pytest.mark.parametrize("patch", [2, 4])
def test_wavelets_of_images(patch):
    tensors, _, _ = golden("tokenizers", "units")
    image = tensors["haar2d.input"]
    patches = image_patch(image, patch)
    torch.testing.assert_close(patches, tensors[f"haar2d.p{patch}.output"], atol=1e-6, rtol=0)
    torch.testing.assert_close(image_unpatch(patches, patch), image, atol=1e-6, rtol=0)


def test_finite_scalar_quantisation():
    tensors, _, _ = golden("tokenizers", "units")
    fsq = FiniteScalarQuantizer(tuple(tensors["fsq.levels"].tolist()))
    for kind in ("", "bf16."):
        codes, indices = fsq(tensors[f"fsq.{kind}z"].movedim(1, -1))
        assert torch.equal(indices, tensors[f"fsq.{kind}indices"].long())
        assert torch.equal(codes, tensors[f"fsq.{kind}codes"].movedim(1, -1))
    decoded = fsq.decode(tensors["fsq.decode_ids"])
    assert torch.equal(decoded, tensors["fsq.decode_codes"].movedim(1, -1))
    with pytest.raises(ValueError, match="indices must lie in"):
        fsq.decode(torch.tensor([64000]))


def test_every_key_is_accounted_for():
    tensors, class_name, config = load("cv4x8x8_p2")
    state = weights(tensors)
    with pytest.raises(ValueError, match=r"unknown keys \['encoder.extra'\]"):
        load_original(class_name, config, {**state, "encoder.extra": torch.zeros(1)})
    lacking = {key: value for key, value in state.items() if key != "quant_conv.conv3d.bias"}
    with pytest.raises(ValueError, match=r"missing \(our names\) \['quant_conv.bias'\]"):
        load_original(class_name, config, lacking)
    with pytest.raises(ValueError, match="quant_conv.conv3d.bias has shape"):
        load_original(class_name, config, {**state, "quant_conv.conv3d.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="not this architecture"):
        load_original(class_name, config, {**state, "encoder.patcher3d.wavelets": torch.ones(2)})
    with pytest.raises(ValueError, match="argument surprise=1 is not known"):
        load_original(class_name, {**config, "surprise": 1}, state)
    with pytest.raises(ValueError, match="legacy_mode=True is not supported"):
        load_original(class_name, {**config, "legacy_mode": True}, state)


def test_every_key_of_an_image_tokenizer_is_accounted_for():
    tensors, class_name, config = load("di8x8_p4")
    state = weights(tensors)
    codes = FiniteScalarQuantizer((8, 8, 8, 5, 5, 5)).decode(torch.arange(64000))
    load_original(class_name, config, {**state, "quantizer.implicit_codebook": codes.bfloat16()})
    for changed, message in (
        ({"quantizer.implicit_codebook": codes.flip(0)}, "implicit_codebook is .*not this architecture"),
        ({"quantizer._levels": torch.tensor([8, 8, 8, 5, 5, 6])}, "_levels is .*not this architecture"),
        ({"encoder.patcher.wavelets": torch.ones(2)}, "wavelets is .*not this architecture"),
        ({"encoder.down.1.downsample.conv1.conv3d.weight": torch.zeros(1)}, "downsample.conv1"),
        ({"encoder.down.0.extra": torch.zeros(1)}, r"unknown keys \['encoder.down.0.extra'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_original(class_name, config, {**state, **changed})
    for changed, message in (
        ({"quantizer": "LFQ"}, "quantizer 'LFQ' .* only FSQ"),
        ({"formulation": "VAE"}, "formulation='VAE' is not supported"),
        ({"temporal_compression": 8}, "argument temporal_compression=8 is not known"),
        ({"channels_mult": [2, 1, 2]}, "the decoder's widths are"),
    ):
        with pytest.raises(ValueError, match=message):
            load_original(class_name, {**config, **changed}, state)
    for lacking in ("channels", "embedding_dim"):
        with pytest.raises(ValueError, match=f"argument {lacking} is missing"):
            load_original(class_name, {key: value for key, value in config.items() if key != lacking}, state)


def test_unused_convolutions_of_the_first_release_are_dropped():
    """0.1 files carry resampling convolutions of levels that do not resample."""
    tensors, class_name, config = load("cv8x8x8_p4")
    state = weights(tensors)
    unused = {"encoder.down.1.downsample.conv1.conv3d.weight": torch.zeros(32, 32, 1, 3, 3)}
    a, b = (load_original(class_name, config, s) for s in (state, {**state, **unused}))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_published_sizes_convert_on_the_meta_device():
    index = golden_json("manifests", "_index")
    names = [
        name for name, entry in index.items() if entry.get("cls", "").endswith(("VideoTokenizer", "ImageTokenizer"))
    ]
    assert len(names) == 20
    for name in names:
        shapes = golden_json("manifests", name)
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, (shape, _) in shapes.items()}
            config = tokenizer_config(index[name]["cls"], index[name]["config"], state)
            model = tokenizer_class(index[name]["cls"])(**config)
        converted = convert_tokenizer_keys(state, model)
        assert converted.keys() == model.state_dict().keys(), name
