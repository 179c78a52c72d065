"""Inference by several processes on processors, through gloo; also a program, of which each process checks itself against one.

torchrun --nproc_per_node 2 tests/parallel_problem.py FOLDER
"""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, ParallelConfig, TensorParallelConfig
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D

ROOT = Path(__file__).parents[1]
FRAMES, HEIGHT, WIDTH = 4, 8, 12


def build(**changes) -> CosmosWorldTransformer3D:
    torch.manual_seed(1)
    model = CosmosWorldTransformer3D(**{**PRESETS["tiny-video2world"], **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return model


def inputs(batch=2, views=1, **more) -> dict:
    generator = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(batch, 16, FRAMES, HEIGHT, WIDTH, generator=generator),
        timestep=torch.linspace(-0.5, 0.4, batch),
        encoder_hidden_states=torch.randn(batch, 5 * views, 32, generator=generator),
        condition_mask=torch.zeros(1, 1, FRAMES, HEIGHT, WIDTH),
        padding_mask=(torch.rand(1, 1, 16, 24, generator=generator) > 0.5).float(),
        **more,
    )


# Conditions that differ from position to position, frame to frame and view to view.
CASES = {
    "plain": ({}, dict(fps=10)),
    "noise by frame": ({}, dict(batch=1, timestep=torch.linspace(-0.5, 0.4, FRAMES)[None])),
    "views": (
        dict(num_views=2, view_embed_dim=6, frame_repeat_embed=True, extra_pos_embed_type="sincos"),
        dict(views=2, frame_repeat=torch.tensor([[0.1, 0.3]])),
    ),
    "actions and masked text": (
        dict(action_dim=3),
        dict(actions=torch.linspace(-1, 1, 2 * FRAMES * 3).view(2, FRAMES, 3), attention_mask=torch.ones(2, 5).tril()),
    ),
    "rays": (
        dict(in_channels=23, camera_channels=6, extra_pos_embed_type=None),
        dict(camera=torch.linspace(-1, 1, 6 * FRAMES * HEIGHT * WIDTH).view(1, 6, FRAMES, HEIGHT, WIDTH)),
    ),
}


@torch.no_grad()
def check(name: str, parallel, **changes):
    """All outputs of `parallel(build())` are those of one process, with the text as it is and prepared."""
    config, more = CASES[name]
    given = inputs(**{k: v for k, v in more.items() if k in ("batch", "views")})
    given |= {k: v for k, v in more.items() if k not in ("batch", "views")}
    expected = build(**config, **changes)(**given).sample
    model = build(**config, **changes)
    parallel(model)
    torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=1e-5)
    if model.can_prepare_text:
        given["encoder_hidden_states"] = model.prepare_text(given["encoder_hidden_states"])
        torch.testing.assert_close(model(**given).sample, expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 0.1
    return model


def ulysses(model):
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def heads(model):
    model.enable_parallelism(config=ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2)))


def shards(model):
    if model.learnable_pos_embed is not None:
        fully_shard(model.learnable_pos_embed)
    for block in model.transformer_blocks:
        fully_shard(block)
    fully_shard(model)


def refused(message: str, call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"not refused: {message}")


def check_context():
    for name in CASES:
        check(name, ulysses)
    model = check("plain", ulysses)
    assert model.can_prepare_text
    seen = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    with torch.no_grad():
        model(**inputs())
    assert seen == [(2, FRAMES * HEIGHT * WIDTH // 8, 64)]  # half of the tokens
    given = inputs()
    given |= {key: given[key][..., :6, :6] for key in ("hidden_states", "condition_mask")}
    refused("9 positions of a latent frame .3 x 3 patches. cannot be split into 2", lambda: model(**given))
    refused("cannot be combined with context", lambda: model.enable_cache(FirstBlockCacheConfig()))
    uneven = build()
    uneven.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    refused("gloo gathers equal ones only", lambda: uneven(**given))
    three = build(num_attention_heads=3, attention_head_dim=12)
    refused("must divide the 3 attention heads, got 2", lambda: ulysses(three))
    refused(
        "ring attention adds up parts", lambda: build().enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    )
    cached = build()
    cached.enable_cache(FirstBlockCacheConfig())
    refused("disable_cache", lambda: ulysses(cached))


def check_tensor():
    model = check("plain", heads)
    check("views", heads)
    assert isinstance(model.transformer_blocks[0].attn1.to_q.weight, DTensor)
    assert model.transformer_blocks[0].ff.net[0].proj.weight.to_local().shape == (128, 64)
    refused("already", lambda: heads(model))
    refused("must divide", lambda: heads(build(num_attention_heads=3, attention_head_dim=12)))


def check_shards():
    model = check("plain", shards)
    check("actions and masked text", shards)
    assert not model.can_prepare_text
    half, given = build(), inputs(fps=10)
    half.transformer_blocks.bfloat16()
    for part in (half.patch_embed, half.time_embed, half.norm_out, half.proj_out):
        part.bfloat16()  # as a published model is loaded: positions stay in float32
    with torch.no_grad():
        expected = half(**given).sample
        shards(half)
        assert torch.equal(half(**given).sample, expected)
    weights = list(model.transformer_blocks.parameters())
    assert sum(weight.to_local().nbytes for weight in weights) == pytest.approx(
        sum(w.nbytes for w in weights) / 2, rel=0.01
    )


def check_page(folder: str):
    """The program of docs/hardware.md in its three ways; all of them make the video that one process makes."""
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "hardware.md").read_text(), flags=re.S)
    start, *ways = blocks
    assert len(ways) == 3
    dist.init_process_group = lambda: None  # there is one already
    given = dict(folder=folder, video=torch.arange(3 * 5 * 32 * 48, dtype=torch.uint8).view(3, 5, 32, 48))
    videos = []
    for way in ["frames = pipe(**call).frames", *ways]:
        names = dict(given)
        exec(compile(start + way, "docs/hardware.md", "exec"), names)
        videos.append(torch.as_tensor(names["frames"]))
    for video in videos[1:]:
        torch.testing.assert_close(video, videos[0], atol=1e-3, rtol=0)
    assert videos[0].std() > 0.01


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check_context()
    check_tensor()
    check_shards()
    if len(sys.argv) > 1:
        check_page(sys.argv[1])
    dist.destroy_process_group()
