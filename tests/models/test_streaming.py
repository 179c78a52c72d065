"""Coding chunk by chunk: equal to coding at once, what is kept, windows, and what a refused chunk leaves behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_hf.models.streaming import KeyValues, StreamState
from tiny_tokenizers import DISCRETE, tiny_video

CHUNKINGS = dict(first=st.integers(0, 3), chunks=st.lists(st.integers(1, 4), max_size=5))


@pytest.fixture(scope="module")
def models():
    """By temporal factor; attention in the levels, too, where several rates have their own keys and values."""
    torch.manual_seed(0)
    return {factor: tiny_video(temporal_compression=factor, attn_resolutions=(128,)) for factor in (4, 8)}


def in_chunks(stream, x, lengths):
    return [stream.push(part) for part in x.split(lengths, 2)]


@settings(max_examples=20, deadline=None)
@given(**CHUNKINGS)
@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_streams_equal_one_shot(models, factor, dtype, tolerance, first, chunks):
    model = models[factor].to(dtype)
    video = torch.rand(1, 3, 1 + factor * (first + sum(chunks)), 16, 24, dtype=dtype) * 2 - 1
    whole = model.encode(video).latents
    lengths = [1 + first * factor, *(count * factor for count in chunks)]
    latents = torch.cat([out.latents for out in in_chunks(model.encoder_stream(), video, lengths)], 2)
    assert (latents - whole).abs().max() <= tolerance * whole.abs().max()
    frames = torch.cat(in_chunks(model.decoder_stream(), whole, [1 + first, *chunks]), 2)
    expected = model.decode(whole).sample
    assert (frames - expected).abs().max() <= tolerance * expected.abs().max()


@settings(max_examples=20, deadline=None)
@given(frames=st.integers(1, 40), chunk=st.integers(1, 6), latent_chunk=st.integers(1, 11))
def test_chunk_arguments_equal_one_shot_for_any_length(models, frames, chunk, latent_chunk):
    model = models[4].to(torch.float64)
    video = torch.rand(1, 3, frames, 8, 16, dtype=torch.float64) * 2 - 1
    whole = model.encode(video, pad_frames=True).latents
    torch.testing.assert_close(
        model.encode(video, pad_frames=True, chunk=4 * chunk).latents, whole, atol=1e-12, rtol=0
    )
    expected = model.decode(whole, num_frames=frames).sample
    result = model.decode(whole, num_frames=frames, chunk=latent_chunk).sample
    assert result.shape == video.shape
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


def test_indices_are_equal_chunk_by_chunk():
    model = tiny_video(**DISCRETE).double()
    video = torch.rand(1, 3, 17, 16, 16, dtype=torch.float64) * 2 - 1
    whole = model.encode(video)
    chunked = model.encode(video, chunk=4)
    assert torch.equal(chunked.indices, whole.indices) and torch.equal(chunked.latents, whole.latents)
    expected = model.decode_indices(whole.indices).sample
    torch.testing.assert_close(model.decode_indices(whole.indices, chunk=2).sample, expected)


def test_chunks_pass_gradients_on(models):
    """Long clips can be trained on in chunks: the gradient is that of one pass."""
    model, grads = models[4].to(torch.float64), []
    video = torch.rand(1, 3, 9, 8, 8, dtype=torch.float64) * 2 - 1
    for chunk in (None, 4):
        model.zero_grad()
        model.encode(video, chunk=chunk).latents.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    torch.testing.assert_close(*grads)


def test_only_keys_and_values_grow(models):
    model = models[4].to(torch.float32)
    encoder, decoder = model.encoder_stream(), model.decoder_stream()
    assert encoder.attention_bytes == encoder.convolution_bytes == 0
    kept = []
    for frames in (5, 4, 4, 4):
        decoder.push(encoder.push(torch.zeros(1, 3, frames, 16, 16)).latents)
        kept.append([(s.convolution_bytes, s.attention_bytes) for s in (encoder, decoder)])
    for which in (0, 1):
        assert len({conv for conv, _ in (step[which] for step in kept)}) == 1
        sizes = [attention for _, attention in (step[which] for step in kept)]
        assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == sizes[3] - sizes[2] > 0


def test_size_of_keys_and_values():
    """2 (keys, values) x channels at the bottleneck x 4 bytes for each latent position; attention there alone, as published."""
    stream = tiny_video().encoder_stream()
    stream.push(torch.zeros(1, 3, 9, 16, 24))
    assert stream.attention_bytes == 2 * 16 * 4 * (3 * 2 * 3)


@settings(max_examples=10, deadline=None)
@given(chunks=st.lists(st.integers(1, 4), min_size=2, max_size=5), window=st.integers(1, 4))
def test_a_window_bounds_the_state_and_does_not_depend_on_chunks(models, chunks, window):
    model = tiny_video().to(torch.float64)
    video = torch.rand(1, 3, 1 + 4 * sum(chunks), 8, 8, dtype=torch.float64) * 2 - 1
    results = []
    for lengths in ([1 + 4 * chunks[0], *(4 * count for count in chunks[1:])], [1, *[4] * sum(chunks)]):
        stream = model.encoder_stream(window=window)
        results.append(torch.cat([out.latents for out in in_chunks(stream, video, lengths)], 2))
        assert stream.attention_bytes <= 2 * 16 * 8 * window
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


def test_what_a_window_costs(models):
    """An approximation: exact while the window holds the clip, measurably different once it does not, less so the wider it is."""
    torch.manual_seed(0)
    model = tiny_video(temporal_compression=4).to(torch.float64)
    video = torch.rand(1, 3, 65, 8, 8, dtype=torch.float64) * 2 - 1
    latents = model.encode(video).latents
    whole = model.decode(latents).sample
    errors = {}
    for window in (2, 8, 16):
        stream = model.decoder_stream(window=window)
        frames = torch.cat(in_chunks(stream, latents, [1, *[4] * 4]), 2)
        errors[window] = ((frames - whole).square().mean().sqrt() / whole.std()).item()
    assert errors[16] < 1e-12 < errors[8] < errors[2] < 0.2, errors


@pytest.mark.parametrize("window", [0, -1])
def test_an_illegal_window_is_refused(models, window):
    with pytest.raises(ValueError, match="window is a number of latent frames, at least 1"):
        models[4].encoder_stream(window=window)


def state_of(stream):
    """Every tensor that a stream keeps, copied."""

    def tensors(state: StreamState):
        for value in state.values():
            if isinstance(value, StreamState):
                yield from tensors(value)
            elif isinstance(value, KeyValues):
                yield from (t.clone() for pair in value for t in pair)
            else:
                yield value.clone()

    return list(tensors(stream._state))


@pytest.mark.parametrize("tiled", [False, True])
def test_a_refused_chunk_leaves_the_stream_as_it_was(tiled):
    model = tiny_video()
    if tiled:
        model.enable_tiling(tile_sample_min_height=8, tile_sample_min_width=8)
    video = torch.rand(1, 3, 13, 16, 16) * 2 - 1
    encoder, decoder = model.encoder_stream(), model.decoder_stream()
    good = encoder.push(video[:, :, :5]).latents
    decoder.push(good)
    before = state_of(encoder), state_of(decoder)
    chunk = video[:, :, 5:9]
    for bad, message in (
        (chunk[:, :, :3], r"must be 0 \+ k \* 4, got 3"),
        (video[:, :, :5], r"must be 0 \+ k \* 4, got 5"),
        (chunk[..., :8], "width 8, but the stream began with 16"),
        (chunk.expand(2, -1, -1, -1, -1), "batch 2, but the stream began with 1"),
        (chunk * torch.nan, "must be finite"),
        (chunk * 100, "must lie in"),
        (chunk[0], "video must be"),
        (chunk.to(torch.uint8), "floating point"),
        (chunk.double(), "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.push(bad)
    for bad, message in (
        (good * torch.nan, "must be finite"),
        (good[:, :8], "latents must be"),
        (good[..., :1], "width 1, but the stream began with 2"),
        (good[:, :, :0], "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.push(bad)
    for stream, kept in zip((encoder, decoder), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state_of(stream), kept, strict=True))
    rest = [encoder.push(chunk).latents, encoder.push(video[:, :, 9:]).latents]
    torch.testing.assert_close(torch.cat([good, *rest], 2), model.encode(video).latents, atol=1e-5, rtol=1e-5)


def test_a_failure_in_the_middle_of_a_chunk_leaves_the_stream_as_it_was():
    """Out of memory, an interrupt: half of the layers have already moved on, the stream has not."""
    model = tiny_video()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    stream = model.encoder_stream()
    first = stream.push(video[:, :, :5]).latents
    hook = model.encoder.mid.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        stream.push(video[:, :, 5:])
    hook.remove()
    latents = torch.cat([first, stream.push(video[:, :, 5:]).latents], 2)
    torch.testing.assert_close(latents, model.encode(video).latents, atol=1e-5, rtol=1e-5)


def test_a_bad_first_chunk_does_not_begin_the_clip():
    model = tiny_video()
    stream = model.encoder_stream()
    with pytest.raises(ValueError, match="the nearest legal is 1 or 5"):
        stream.push(torch.zeros(1, 3, 4, 16, 16))
    assert stream.push(torch.zeros(2, 3, 5, 24, 16)).latents.shape == (2, 16, 2, 3, 2)


def test_tiles_cannot_change_in_the_middle_of_a_clip():
    model = tiny_video()
    stream = model.encoder_stream()
    stream.push(torch.zeros(1, 3, 1, 16, 16))
    model.enable_tiling(tile_sample_min_height=8, tile_sample_min_width=8)
    with pytest.raises(ValueError, match="use one stream per clip"):
        stream.push(torch.zeros(1, 3, 4, 16, 16))


def test_long_clips_keep_keys_and_values_in_few_blocks():
    kept = KeyValues()
    for _ in range(200):
        kept = kept.append(torch.zeros(1, 1, 1, 3, 2), torch.zeros(1, 1, 1, 3, 2))
    assert kept.frames == 600 and len(kept) <= 10
    assert kept.last(100).frames == 100 and kept.last(None) is kept
