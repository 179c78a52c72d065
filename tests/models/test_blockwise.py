"""Block by block in inference: the result of one pass, in a fraction of its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cosmos_hf.models import blockwise
from cosmos_hf.models.blockwise import add, by_frames, by_rows
from cosmos_hf.models.video_layers import CausalConv3d
from tiny_tokenizers import DISCRETE, tiny_video


@pytest.fixture
def small_blocks(monkeypatch):
    """One frame or one row at a time."""
    monkeypatch.setattr(blockwise, "CPU_BLOCK", 1)


def recorded(function):
    shapes = []

    def call(*tensors):
        shapes.append(tuple(tensors[0].shape))
        return function(*tensors)

    return call, shapes


@pytest.mark.parametrize(
    ("way", "block"), [(by_frames, (1, 2, 6, 5, 4)), (by_rows, (2, 3, 2, 5, 4))], ids=["frames", "rows"]
)
@pytest.mark.parametrize("reused", [False, True])
def test_blocks_give_the_result_of_one_pass(monkeypatch, way, block, reused):
    x, y = torch.randn(2, 3, 6, 5, 4), torch.randn(2, 3, 6, 5, 4)
    expected = x * 2 + y
    monkeypatch.setattr(blockwise, "CPU_BLOCK", x[0, 0].nbytes * 2)
    function, shapes = recorded(lambda x, y: x * 2 + y)
    with torch.no_grad():
        out = way(function, x, y, into=x if reused else None)
    assert torch.equal(out, expected) and shapes == [block] * 3
    assert (out.data_ptr() == x.data_ptr()) == reused


@pytest.mark.parametrize("way", [by_frames, by_rows])
def test_one_pass_where_a_gradient_is_wanted(small_blocks, way):
    x = torch.randn(2, 3, 6, 5, 4, requires_grad=True)
    function, shapes = recorded(torch.square)
    h = x * 1
    way(function, h, into=h).sum().backward()
    assert shapes == [tuple(x.shape)] and torch.equal(x.grad, 2 * x)


def test_growth_makes_blocks_smaller(monkeypatch):
    x = torch.randn(1, 4, 2, 2, 3)
    monkeypatch.setattr(blockwise, "CPU_BLOCK", x.nbytes)
    for growth, count in ((1, 1), (2, 2), (4, 4)):
        function, shapes = recorded(lambda x, growth=growth: x.repeat_interleave(growth, 3))
        with torch.no_grad():
            out = by_frames(function, x, growth=growth)
        assert torch.equal(out, x.repeat_interleave(growth, 3)) and len(shapes) == count


def test_sums_are_made_in_place_only_where_that_changes_nothing():
    low, high = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    assert add(high, low) is not high  # a gradient might be wanted
    with torch.no_grad():
        assert add(high, low) is high and add(low, high).dtype == torch.float32
    assert torch.equal(high, torch.full((2,), 2.0)) and torch.equal(low, torch.ones(2, dtype=torch.bfloat16))


def passes(model, video, chunk):
    encoded = model.encode(video, chunk=chunk and 8 * chunk)
    return encoded.latents, model.decode(encoded.latents, chunk=chunk).sample


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("kind", [{}, DISCRETE], ids=["continuous", "discrete"])
def test_coding_in_blocks_equals_one_pass(small_blocks, kind, chunk):
    """With a gradient the network does one pass and overwrites nothing: the reference."""
    torch.manual_seed(0)
    model = tiny_video(temporal_compression=8, attn_resolutions=(128,), **kind).double()
    video = torch.rand(2, 3, 17, 16, 24, dtype=torch.float64) * 2 - 1
    before = video.clone()
    expected = passes(model, video, chunk)
    with torch.no_grad():
        results = passes(model, video, chunk)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference.detach(), atol=1e-12, rtol=1e-12)
    assert torch.equal(video, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_keep_the_precision(small_blocks, dtype):
    """That of the model, and under autocast that of its mixture."""
    torch.manual_seed(0)
    video = torch.rand(1, 3, 5, 16, 16, dtype=dtype) * 2 - 1
    for autocast in (False, True):
        model = tiny_video(temporal_compression=4).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = model.decode(model.encode(video).latents.to(dtype)).sample
            with torch.no_grad():
                result = model.decode(model.encode(video).latents.to(dtype)).sample
        assert result.dtype == expected.dtype
        tolerance = 0.1 if torch.bfloat16 in (dtype, result.dtype) else 1e-4
        assert (result - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 3)])
def test_doubled_pictures(size):
    """Four kernels of 2x2 on the picture equal the kernel of 3x3 on the picture whose rows and columns are repeated."""
    conv = CausalConv3d(4, 6, (1, 3, 3)).double()
    x = torch.randn(2, 3, *size, 4, dtype=torch.float64)
    repeated = F.interpolate(x.flatten(0, 1).movedim(-1, 1), scale_factor=2, mode="nearest").movedim(1, -1)
    expected = conv(repeated.unflatten(0, (2, 3)))
    result = conv(x, doubled=True).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


MEMORY = """
import re, torch
from cosmos_hf import CosmosVideoTokenizer
torch.manual_seed(0)
model = CosmosVideoTokenizer(temporal_compression=4, channels=64, channels_mult=(1, 1), num_res_blocks=1).eval()
status = lambda key: int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**10
def peak(call):
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    call()
    return status("VmHWM") - before
video = torch.rand(1, 3, 33, 192, 256) * 2 - 1
with torch.no_grad():
    latents = model.encode(video).latents  # libraries and kernels load now
    model.decode(latents)
    print(peak(lambda: model.encode(video)), peak(lambda: model.decode(latents)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_of_a_layer_is_that_of_its_input_and_output():
    """In units of the widest tensors between patches and latents, 64 channels of 9x48x64 positions. Patches and pixels take six of
    these units, a block of frames less than one; every layer in one pass, or whole temporaries of the wavelets, twelve.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, check=True, text=True, env=env).stdout
    encode, decode = (float(figure) / 6.75 for figure in out.split())
    assert encode < 8 and decode < 8, (encode, decode)
