"""Worlds longer than a window: what each chunk is given, that nothing is lost or repeated, and that a cut run goes on equally."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosmos_hf.data.video import read_metadata, read_video, write_video
from cosmos_hf.pipelines.drift import DriftMeter
from cosmos_hf.pipelines.rollout import _World, rollout

PROMPT = "A robot arm picks up the red cube."
QUICK = dict(num_inference_steps=1, guidance_scale=0, sampling={"solver": "euler"}, height=16, width=16)


def clip(frames, height=32, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def chunks_in(folder):
    from safetensors.torch import load_file

    return [load_file(path)["latents"] for path in sorted(folder.glob("chunk-*"))]


# ---- windows -------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    window=st.integers(2, 4),
    overlap=st.integers(1, 3),
    num_frames=st.integers(1, 30),
    history=st.sampled_from(("latents", "pixels")),
)
def test_any_length_and_overlap(video2world, tmp_path, window, overlap, num_frames, history):
    """As many frames as were asked for, from as many chunks as it takes; each but the first adds window - overlap latents."""
    overlap = min(overlap, window - 1)
    seen = []
    result = rollout(
        video2world,
        tmp_path / "world.mp4",
        num_frames,
        prompt=PROMPT,
        overlap=overlap,
        history=history,
        num_frames_per_chunk=1 + 4 * (window - 1),
        on_chunk=lambda k, entry: seen.append(entry["frames"]),
        **QUICK,
    )
    latents = video2world.vae.latent_frames(num_frames)
    assert len(seen) == 1 + max(0, -(-(latents - window) // (window - overlap)))
    ends = [1 + 4 * (window - 1 + k * (window - overlap)) for k in range(len(seen))]
    starts = [0, *ends[:-1]]
    assert seen == [[start, min(end, num_frames)] for start, end in zip(starts, ends, strict=True)]
    assert read_video(result.path).frames.shape == (3, num_frames, 16, 16)
    assert not (tmp_path / "world.mp4.chunks").exists() and not (tmp_path / "world.mp4.part").exists()


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_history_in_latents(video2world, overlap):
    """The last latents go on as they are, behind one that codes the single frame before them; the decoder sees one clip."""
    vae = video2world.vae
    latents = torch.randn(1, 16, 9, 4, 6)
    windows = [latents[:, :, :4]]
    world = _World(vae, overlap, "latents")
    frames = [*world.append(windows[0], first=True)]
    end = 4
    while end < 9:
        history = world.given()
        assert history.shape[2] == overlap
        assert torch.equal(history[:, :, 1:], latents[:, :, end - overlap + 1 : end])
        before = torch.cat(frames, 2)[:, :, -vae.num_frames(overlap)][:, :, None]
        torch.testing.assert_close(history[:, :, :1], vae.encode(before).latents)
        fresh = latents[:, :, end : end + 4 - overlap]
        frames += world.append(torch.cat([history, fresh], 2), first=False)
        end += fresh.shape[2]
        # what is kept does not grow with the world
        assert world._latents.shape[2] == overlap and world._frames.shape[2] == vae.num_frames(overlap)
    torch.testing.assert_close(torch.cat(frames, 2), vae.decode(latents).sample.clamp(-1, 1), atol=1e-4, rtol=0)


def test_history_in_pixels(video2world):
    """The last frames are encoded again, and what a window repeats is dropped."""
    vae = video2world.vae
    first, second = torch.randn(2, 1, 16, 4, 4, 6)
    world = _World(vae, 2, "pixels")
    frames = torch.cat([*world.append(first, first=True)], 2)
    torch.testing.assert_close(world.given(), vae.encode(frames[:, :, -5:]).latents)
    fresh = torch.cat([*world.append(second, first=False)], 2)
    torch.testing.assert_close(fresh, vae.decode(second).sample[:, :, 5:].clamp(-1, 1), atol=1e-4, rtol=0)


def test_first_chunk_is_the_pipelines_and_the_second_goes_on_from_it(video2world, tmp_path):
    video = clip(5)
    rollout(video2world, tmp_path / "w.mp4", 13, video=video, prompt=PROMPT, seed=3, keep_chunks=True)
    first, second = chunks_in(tmp_path / "w.mp4.chunks")
    plain = video2world(video=video, prompt=PROMPT, generator=torch.Generator().manual_seed(3), output_type="latent")
    torch.testing.assert_close(first, video2world.vae.denormalize(plain.frames / 0.5))
    torch.testing.assert_close(second[:, :, 1], first[:, :, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("argument", ["prompt", "seed", "history_noise", "history", "overlap", "video", "sampling"])
def test_every_argument_matters(video2world, tmp_path, argument):
    usual = dict(prompt=PROMPT, video=clip(5), seed=0)
    other = dict(
        prompt=[PROMPT, "A blue ball."],
        seed=1,
        history_noise=1.0,
        history="pixels",
        overlap=1,
        video=clip(5, seed=9),
        sampling={"solver": "euler"},
    )
    last = []
    for name, arguments in (("a", usual), ("b", usual | {argument: other[argument]})):
        rollout(video2world, tmp_path / f"{name}.mp4", 17, keep_chunks=True, **arguments)
        last.append(chunks_in(tmp_path / f"{name}.mp4.chunks")[1][:, :, -1])
    assert (last[0] - last[1]).abs().max() > 1e-4


# ---- cut and continued ---------------------------------------------------------------------------------------------


def test_a_cut_run_goes_on_and_ends_equal(video2world, tmp_path):
    arguments = dict(prompt=PROMPT, video=clip(5), overlap=2, keep_chunks=True)
    whole = rollout(video2world, tmp_path / "whole.mp4", 21, **arguments)

    def stop(k, entry):
        if k == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout(video2world, tmp_path / "cut.mp4", 21, on_chunk=stop, **arguments)
    assert not (tmp_path / "cut.mp4").exists() and len(chunks_in(tmp_path / "cut.mp4.chunks")) == 2
    (tmp_path / "cut.mp4.chunks" / "chunk-00002.safetensors.tmp").write_bytes(b"half a file")
    made = []
    transformer = video2world.transformer
    hook = transformer.register_forward_hook(lambda *_: made.append(1))
    again = rollout(video2world, tmp_path / "cut.mp4", 21, **arguments)
    hook.remove()
    calls = 2 * 2  # two steps, two branches
    assert len(made) == (len(whole.drift) - 2) * calls
    for a, b in zip(*(chunks_in(tmp_path / f"{name}.mp4.chunks") for name in ("whole", "cut")), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(read_video(tmp_path / "whole.mp4").frames, read_video(tmp_path / "cut.mp4").frames)
    assert whole.drift == again.drift
    # more frames add to what is there
    made.clear()
    hook = transformer.register_forward_hook(lambda *_: made.append(1))
    longer = rollout(video2world, tmp_path / "cut.mp4", 25, **arguments)
    hook.remove()
    assert len(made) == calls and longer.drift[: len(whole.drift)] == whole.drift


def test_chunks_of_other_arguments_are_refused(video2world, tmp_path):
    rollout(video2world, tmp_path / "w.mp4", 13, prompt=PROMPT, keep_chunks=True, **QUICK)
    with pytest.raises(ValueError, match="chunks of another run \\(it differs in seed\\): delete it"):
        rollout(video2world, tmp_path / "w.mp4", 13, prompt=PROMPT, keep_chunks=True, seed=1, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(overlap=3), "overlap counts latent frames and must be in 1..2 .* got 3"),
        (dict(overlap=0), "must be in 1..2"),
        (dict(history="frames"), "history must be one of latents, pixels, got 'frames'"),
        (dict(history_noise=-1.0), "history_noise must be a noise level >= 0"),
        (dict(num_frames=0), "num_frames must be at least 1, got 0"),
        (dict(num_frames_per_chunk=8), "num_frames must be 1 \\+ k \\* 4, got 8"),
        (dict(steps=3), "rollout has no argument steps"),
        (dict(prompt=None, guidance_scale=2.0), "guidance needs a prompt"),
        (dict(video=[clip(5), clip(5)]), "continues one image or video, got 2"),
    ],
)
def test_contradictions_are_refused(video2world, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        rollout(video2world, tmp_path / "w.mp4", **{"num_frames": 13, "prompt": PROMPT, **arguments})
    assert not (tmp_path / "w.mp4").exists()


def test_a_text_to_world_network_is_refused(text2world, tmp_path):
    with pytest.raises(ValueError, match="needs a video-to-world transformer"):
        rollout(text2world, tmp_path / "w.mp4", 13, prompt=PROMPT)


def test_damaged_weights_are_named_though_a_file_is_open(video2world, tmp_path):
    weight = video2world.transformer.proj_out.weight
    saved = weight.detach().clone()
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        rollout(video2world, tmp_path / "w.mp4", 13, prompt=PROMPT, **QUICK)
    weight.data.copy_(saved)


# ---- drift ---------------------------------------------------------------------------------------------------------


def test_drift_of_known_changes():
    """Blur lowers the sharpness, a tint is a colour shift of its size, a jump is a seam, equal frames have 100 dB."""
    base = torch.randint(50, 200, (3, 1, 32, 32), dtype=torch.uint8)
    moving = torch.cat([base.roll(i, 3) for i in range(4)], 1)
    meter = DriftMeter()
    first = meter.add(moving, moving)
    assert first["psnr"] == pytest.approx(100) and "seam" not in first
    smooth = meter.add(torch.cat([base.roll(i, 3) for i in range(4, 8)], 1))
    assert smooth["seam"] == pytest.approx(1, abs=0.1) and smooth["colour_shift"] < 1e-5
    assert smooth["sharpness_ratio"] == pytest.approx(1, abs=0.02) and smooth["frames"] == [4, 8]
    tinted = meter.add(moving + torch.tensor([25, 0, 0], dtype=torch.uint8).view(3, 1, 1, 1), moving[:, :2])
    assert tinted["colour_shift"] == pytest.approx(25 / 255, abs=1e-3)
    assert tinted["psnr"] == pytest.approx(20 * torch.tensor(255 * 3**0.5 / 25).log10().item(), abs=0.01)
    blurred = meter.add(torch.nn.functional.avg_pool2d(moving.float(), 5, 1, 2).to(torch.uint8))
    assert blurred["sharpness_ratio"] < 0.3
    still = meter.add(base.expand(-1, 4, -1, -1))
    assert "seam" not in still


def test_a_seam_is_compared_with_the_other_first_frames():
    """A video that jumps at every fourth frame has no seam where chunks of eight meet, unless one looks at every frame."""
    steps = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8).repeat_interleave(4, 0).transpose(0, 1)
    for period, expected in ((4, 1.0), (1, 7.0)):
        meter = DriftMeter(period)
        meter.add(steps[:, :8])
        assert meter.add(steps[:, 8:])["seam"] == pytest.approx(expected, rel=0.15)


def test_truth_and_metadata(video2world, tmp_path):
    """A true video as a file, shorter than the rollout: measured as long as it lasts."""
    write_video(tmp_path / "truth.mp4", clip(11, 16, 16), fps=5)
    result = rollout(
        video2world,
        tmp_path / "w.mp4",
        17,
        prompt=PROMPT,
        truth=tmp_path / "truth.mp4",
        metadata={"made": "here"},
        **QUICK,
    )
    assert read_metadata(result.path) == {"made": "here"}
    assert ["psnr" in entry for entry in result.drift] == [True, True, False] and result.drift[0]["psnr"] < 30
    json.dumps(result.drift)
