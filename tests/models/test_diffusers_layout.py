"""The video tokenizer in the layout of diffusers' `AutoencoderKLCosmos`: read, written, and what is refused."""

import json

import pytest
import torch
from diffusers import AutoencoderKLCosmos

from cosmos_hf import CosmosVideoTokenizer
from cosmos_hf.models.diffusers_layout import config_from_diffusers, config_to_diffusers, save_for_diffusers
from tiny_tokenizers import DISCRETE, tiny_video

TINY = dict(encoder_block_out_channels=(8, 8, 16, 16), decode_block_out_channels=(8, 16, 16, 16), num_layers=1)
VARIANTS = {
    "published statistics": dict(),
    "attention in levels": dict(attention_resolutions=(128,)),
    "8x16x16": dict(spatial_compression_ratio=16),
    "4x8x8, plain statistics": dict(
        temporal_compression_ratio=4, latents_mean=[i / 10 for i in range(16)], latents_std=[0.5] * 16
    ),
    "no statistics": dict(latents_mean=None, latents_std=None),
}


def theirs(**changes):
    model = AutoencoderKLCosmos(**{**TINY, **changes}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def their_normalisation(model, latents):
    """As diffusers' pipelines do it."""
    if model.config.latents_mean is None:
        return latents
    mean, std = (
        torch.tensor(values).view(1, model.config.latent_channels, -1, 1, 1)[:, :, : latents.shape[2]]
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    return (latents - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_that_diffusers_saved_gives_equal_outputs(variant, tmp_path):
    reference = theirs(**VARIANTS[variant])
    reference.save_pretrained(tmp_path)
    ours = CosmosVideoTokenizer.from_pretrained(tmp_path)
    assert not ours.training
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latents = reference.encode(video).latent_dist.mode()
    torch.testing.assert_close(ours.encode(video).latents, latents, atol=1e-6, rtol=1e-5)
    expected = reference.decode(latents).sample
    torch.testing.assert_close(ours.decode(latents).sample, expected, atol=1e-5 * expected.std().item(), rtol=1e-4)
    torch.testing.assert_close(ours.normalize(latents), their_normalisation(reference, latents))


@torch.no_grad()
def test_statistics_are_kept_per_channel_and_latent_frame(tmp_path):
    theirs().save_pretrained(tmp_path)
    ours = CosmosVideoTokenizer.from_pretrained(tmp_path)
    assert [len(ours.config.latents_mean), len(ours.config.latents_mean[0])] == [16, 16]
    assert ours.config.latents_mean[1][0] == pytest.approx(0.19125476)  # the 17th number of the published list
    with pytest.raises(ValueError, match="statistics are kept for 16 latent frames, got 17"):
        ours.normalize(torch.zeros(1, 16, 17, 1, 1))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        dict(temporal_compression=8),
        dict(decoder_channels_mult=(2, 2), channels_mult=(2, 2, 2)),
        dict(latents_mean=[[0.1, 0.2]] * 16, latents_std=[[1.0, 2.0]] * 16),
    ],
    ids=["plain", "another decoder", "statistics"],
)
def test_diffusers_reads_what_we_write_and_so_do_we(changes, tmp_path):
    ours = tiny_video(**changes)
    save_for_diffusers(ours, tmp_path)
    reference = AutoencoderKLCosmos.from_pretrained(tmp_path).eval()
    video = torch.rand(1, 3, 1 + ours.config.temporal_compression, 16, 16) * 2 - 1
    latents = ours.encode(video).latents
    torch.testing.assert_close(reference.encode(video).latent_dist.mode(), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(reference.decode(latents).sample, ours.decode(latents).sample, atol=1e-4, rtol=1e-4)
    again = CosmosVideoTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    torch.testing.assert_close(again.normalize(latents), ours.normalize(latents))


def test_dtype_and_subfolder_are_handed_on(tmp_path):
    theirs().save_pretrained(tmp_path / "vae")
    ours = CosmosVideoTokenizer.from_pretrained(tmp_path, subfolder="vae", torch_dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device_map cannot be used"):
        CosmosVideoTokenizer.from_pretrained(tmp_path, subfolder="vae", device_map="auto")


def test_missing_and_unknown_weights_are_refused(tmp_path):
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layers, kind in ((2, "missing_keys"), (1, "unexpected_keys")):
        theirs(num_layers=3 - layers).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": layers}))
        with pytest.raises(ValueError, match=f"not those of an AutoencoderKLCosmos.*{kind}"):
            CosmosVideoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(patch_type="rearrange"), "patch_type='rearrange' is not supported, only 'haar'"),
        (dict(scaling_factor=2.0), "scaling_factor=2.0 is not supported"),
        (dict(surprise=1), "config surprise=1 is not known"),
        (dict(decode_block_out_channels=(8, 16, 16, 32)), "the decoder's last two equal"),
        (dict(encoder_block_out_channels=(8, 12, 16, 16)), "multiples of the first"),
        (dict(latents_mean=[0.0] * 17), "17 statistics for 16 latent channels"),
    ],
)
def test_configs_that_are_not_understood_are_refused(changes, message):
    config = dict(AutoencoderKLCosmos(**TINY).config) | changes
    with pytest.raises(ValueError, match=message):
        config_from_diffusers(config)


@pytest.mark.parametrize("changes", [DISCRETE, dict(z_channels=32)])
def test_tokenizers_that_diffusers_lacks_are_not_written(changes):
    with pytest.raises(ValueError, match="is continuous with z_channels equal to latent_channels"):
        config_to_diffusers(tiny_video(**changes).config)
