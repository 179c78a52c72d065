"""The video tokenizer: sizes, causality, streaming, statistics, save and load. Parity with the reference: tests/convert."""

import subprocess
import sys

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from tiny_tokenizers import tiny_video

GEOMETRIES = {
    "4x8x8": dict(temporal_compression=4),
    "8x8x8": dict(),
    "8x16x16": dict(spatial_compression=16),
    "4x8x8 patch 2": dict(temporal_compression=4, patch_size=2),
}


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return tiny_video()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry_round_trip_of_shapes(geometry):
    model = tiny_video(**{"temporal_compression": 8, **GEOMETRIES[geometry]})
    time, space = model.config.temporal_compression, model.config.spatial_compression
    video = torch.rand(2, 3, 1 + 2 * time, 2 * space, 3 * space) * 2 - 1
    latents = model.encode(video).latents
    assert latents.shape == (2, 16, 3, 2, 3)
    assert model.decode(latents).sample.shape == video.shape


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        CosmosVideoTokenizer(**PRESETS[name])


@pytest.mark.parametrize("num_frames", range(1, 34))
def test_any_frame_count_comes_back(tokenizer, num_frames):
    """n frames in, n frames out: padded once before encoding, cropped once after decoding."""
    video = torch.rand(1, 3, num_frames, 8, 8) * 2 - 1
    latents = tokenizer.encode(video, pad_frames=True).latents
    assert latents.shape[2] == tokenizer.latent_frames(num_frames)
    assert tokenizer.decode(latents, num_frames=num_frames).sample.shape == video.shape
    if (num_frames - 1) % 4:
        with pytest.raises(ValueError, match=rf"got {num_frames}; the nearest legal is .*pad_frames=True"):
            tokenizer.encode(video)
    else:
        assert torch.equal(tokenizer.encode(video).latents, latents)


def test_wrong_inputs_are_refused(tokenizer):
    video, latents = torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 16, 2, 2, 2)
    encode, decode = tokenizer.encode, tokenizer.decode
    for call, argument, message in (
        (encode, video[..., :12, :], "height must be a multiple of 8, got 12; the nearest legal is 8 or 16"),
        (encode, video[..., :7], "width must be a multiple of 8, got 7; the nearest legal is 8"),
        (encode, torch.zeros(1, 3, 8, 16, 16), "the nearest legal is 5 or 9"),
        (encode, video[:, :, :0], "the nearest legal is 1"),
        (encode, video[:0], "video is an empty batch"),
        (encode, video[0], r"video must be \[B, 3, T, H, W\]"),
        (encode, video.transpose(1, 2), r"video must be \[B, 3, T, H, W\]"),
        (encode, video.to(torch.uint8), "floating point in .*use video / 127.5 - 1"),
        (encode, video.double(), "video must have the tokenizer's dtype torch.float32, got torch.float64"),
        (encode, video + 128, r"video must lie in \[-1, 1\], got 128..128"),
        (encode, video * torch.nan, "video must be finite"),
        (decode, latents[0], r"latents must be \[B, 16, T', H', W'\]"),
        (decode, latents[:, :, :0], "latents are empty"),
        (decode, latents.bfloat16(), "latents must have the tokenizer's dtype"),
        (decode, latents.long(), "decode_indices takes indices"),
        (decode, latents / 0, "latents must be finite"),
        (tokenizer.decode_indices, torch.zeros(1, 1, 2, 2, dtype=torch.long), "continuous"),
        (tokenizer.normalize, latents[0], None),  # identity without statistics
        (lambda x: encode(x, chunk=6), video, "chunk must be a positive multiple of 4 pixel frames, got 6"),
        (lambda x: encode(x, chunk=0), video, "chunk must be a positive multiple of 4 pixel frames, got 0"),
        (lambda z: decode(z, chunk=0), latents, "chunk must be at least 1 latent frame, got 0"),
        (lambda z: decode(z, num_frames=6), latents, "not held by 2 latent frames"),
        (lambda z: decode(z, num_frames=0), latents[:, :, :1], "not held by 1 latent frames"),
    ):
        if message is None:
            assert torch.equal(call(argument), argument)
            continue
        with pytest.raises(ValueError, match=message):
            call(argument)


def test_wrong_indices_are_refused():
    model = tiny_video(quantizer="fsq", latent_channels=6)
    indices = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    for bad, message in (
        (indices + 64000, r"indices must lie in \[0, 64000\)"),
        (indices - 1, r"indices must lie in \[0, 64000\)"),
        (indices[0], r"indices must be \[B, T', H', W'\]"),
        (indices.float(), "indices must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode_indices(bad)


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="patch_size=2 with 3 decoder levels cannot reach"):
        tiny_video(patch_size=2, temporal_compression=8)
    with pytest.raises(ValueError, match="must equal the number of fsq_levels"):
        tiny_video(quantizer="fsq")
    with pytest.raises(ValueError, match=r"must be \[16\] or \[16\]\[latent frames\], got \[15\]"):
        tiny_video(latents_mean=[0.0] * 15, latents_std=[1.0] * 15)


def test_causal(tokenizer):
    """Later frames do not touch earlier latents, nor later latents earlier frames."""
    video = torch.rand(1, 3, 9, 16, 16)
    changed = video.clone()
    changed[:, :, 5:] = torch.rand(1, 3, 4, 16, 16)
    a, b = (tokenizer.encode(v).latents for v in (video, changed))
    torch.testing.assert_close(a[:, :, :2], b[:, :, :2], atol=5e-7, rtol=0)
    assert (a[:, :, 2] - b[:, :, 2]).abs().max() > 1e-5
    c = a.clone()
    c[:, :, 2] += 1
    torch.testing.assert_close(tokenizer.decode(a).sample[:, :, :5], tokenizer.decode(c).sample[:, :, :5])


@pytest.mark.parametrize("per_frame", [False, True])
def test_normalization(per_frame):
    mean, std = torch.randn(16, 3), torch.rand(16, 3) + 0.5
    if not per_frame:
        mean, std = mean[:, 0], std[:, 0]
    model = tiny_video(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = torch.randn(1, 16, 3, 2, 2)
    view = (1, 16, 3 if per_frame else 1, 1, 1)
    torch.testing.assert_close(model.normalize(latents), (latents - mean.view(view)) / std.view(view))
    torch.testing.assert_close(model.denormalize(model.normalize(latents)), latents)
    assert model.normalize(latents[:, :, :1]).shape[2] == 1
    if per_frame:
        with pytest.raises(ValueError, match="statistics are kept for 3 latent frames, got 4"):
            model.normalize(torch.randn(1, 16, 4, 2, 2))


def test_discrete_in_bf16_equals_float32_quantisation():
    model = tiny_video(quantizer="fsq", latent_channels=6)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    out = model.encode(video)
    assert out.indices.dtype == torch.int64 and out.indices.shape == (1, 2, 2, 2)
    z = torch.randn(4, 6)
    codes, indices = model.fsq(z.bfloat16())
    assert torch.equal(indices, model.fsq(z.bfloat16().float())[1])
    assert torch.equal(model.fsq.decode(indices), codes.float())
    torch.testing.assert_close(model.decode_indices(out.indices).sample, model.decode(out.latents).sample)


@pytest.mark.parametrize("kind", [dict(), dict(quantizer="fsq", latent_channels=6)])
def test_gradient_reaches_every_parameter(kind):
    model = tiny_video(**kind).train()
    # Of smaller frames some seeds, and some processors, find no two latent frames with different codes.
    video = torch.rand(2, 3, 9, 32, 32) * (torch.rand(2, 3, 9, 1, 1) * 2 - 1)
    with torch.no_grad():  # spread the codes: equal ones leave nothing for attention to tell apart
        features = model.encoder(video.permute(0, 2, 3, 4, 1))
        model.quant_conv.weight /= features.std(1).mean()
        model.quant_conv.bias.copy_(-model.quant_conv(features).mean((0, 1, 2, 3)) + model.quant_conv.bias)
    model.enable_gradient_checkpointing()
    (model(video).sample ** 2).mean().backward()
    # A key's bias cannot matter: softmax is invariant under a shift of all logits.
    dead = [n for n, p in model.named_parameters() if (p.grad is None or not p.grad.any()) and "to_k.bias" not in n]
    assert not dead


def test_gradient_checkpointing_equals_plain():
    video = torch.rand(1, 3, 5, 16, 16)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = tiny_video().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        (model(video).sample ** 2).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_save_and_load_in_a_fresh_process(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    video = torch.rand(1, 3, 5, 16, 16)
    torch.save((video, tokenizer.encode(video).latents.detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from cosmos_hf import CosmosVideoTokenizer as C; d = sys.argv[1]; m = C.from_pretrained(d).eval();"
        "x, z = torch.load(d + '/expected.pt'); torch.testing.assert_close(m.encode(x).latents, z)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_offloading_hooks_run_before_coding():
    """enable_model_cpu_offload brings a model to its device when it is called; encode and decode are calls, too."""

    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, counter = tiny_video(), Counter()
    add_hook_to_module(model, counter)
    latents = model.encode(torch.rand(1, 3, 1, 16, 16)).latents
    model.decode(latents)
    assert counter.calls == 2


def test_weights_of_another_size_do_not_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_res_blocks": 1', '"num_res_blocks": 2'))
    with pytest.raises(ValueError, match="missing"):
        CosmosVideoTokenizer.from_pretrained(tmp_path)


def test_a_new_model_is_a_projection():
    """No residual branch speaks yet, so a grey video comes back grey and gradients reach the ends at full strength."""
    model = CosmosVideoTokenizer(**PRESETS["tiny"])
    x = torch.randn(1, 2, 4, 4, 16)
    block = model.encoder.mid
    torch.testing.assert_close(block(x), x)
    (model(torch.rand(1, 3, 5, 16, 16)).sample ** 2).mean().backward()
    norms = [p.grad.norm() for p in (model.encoder.conv_in[0].weight, model.decoder.conv_out[0].weight)]
    assert 1e-2 < norms[0] / norms[1] < 1e2
