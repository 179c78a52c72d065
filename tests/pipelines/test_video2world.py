"""Both diffusion pipelines, with tiny real components."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from cosmos_hf.conditioning.frames import FrameCondition
from cosmos_hf.convert import load_original
from cosmos_hf.data.video import to_float, write_video
from cosmos_hf.pipelines.denoise import denoise_latents
from cosmos_hf.pipelines.encode import encode_text
from cosmos_hf.pipelines.text2world import CosmosText2WorldPipeline
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from golden_files import golden, weights

PROMPT = "A robot arm picks up the red cube."


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def clip(frames, height=32, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def run(pipe, **arguments):
    return pipe(**{"prompt": PROMPT, "output_type": "pt", "generator": seeds(1)[0], **arguments}).frames


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_output_types(video2world):
    video = clip(5)
    pt = run(video2world, video=video)
    assert pt.shape == (1, 9, 3, 32, 48) and pt.min() >= 0 and pt.max() <= 1
    array = run(video2world, video=video, output_type="np")
    np.testing.assert_allclose(array, pt.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    pil = run(video2world, video=video, output_type="pil")
    assert len(pil[0]) == 9 and pil[0][0].size == (48, 32)
    latents = run(video2world, video=video, output_type="latent")
    assert latents.shape == (1, 16, 3, 4, 6)
    result = video2world(video=video, prompt=PROMPT, return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1


def test_given_frames_are_kept(video2world):
    """The result begins with the given frames as the tokenizer codes them, whatever the seed; the rest depends on it."""
    video = clip(5)
    a, b = (run(video2world, video=video, generator=g, output_type="latent") for g in seeds(1, 2))
    expected = video2world.vae.normalize(video2world.vae.encode(to_float(video)[None]).latents) * 0.5
    torch.testing.assert_close(a[:, :, :2], expected)
    assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert (a[:, :, 2] - b[:, :, 2]).abs().max() > 0.1


@pytest.mark.parametrize(
    "argument", ["prompt", "video", "fps", "guidance_scale", "negative_prompt", "num_conditioning_frames"]
)
def test_every_input_matters(video2world, argument):
    other = {
        "prompt": "A blue ball.",
        "video": clip(5, seed=3),
        "fps": 10,
        "guidance_scale": 3.0,
        "negative_prompt": "blurry",
        "num_conditioning_frames": 1,
    }
    a = run(video2world, video=clip(5), output_type="latent")
    b = run(video2world, **{"video": clip(5), "output_type": "latent", argument: other[argument]})
    assert (a - b)[:, :, -1].abs().max() > 1e-4


def test_text_to_world_with_either_network(text2world, video2world):
    assert run(text2world).shape == (1, 9, 3, 32, 48)
    pipe = CosmosText2WorldPipeline(
        **video2world.components, **{k: video2world.config[k] for k in ("height", "width")}
    )
    pipe.set_progress_bar_config(disable=True)
    assert run(pipe, num_frames=5, num_inference_steps=1).shape == (1, 5, 3, 32, 48)
    with pytest.raises(ValueError, match="text-to-world"):
        type(video2world)(**text2world.components)(image=Image.new("RGB", (48, 32)), num_frames=5, height=32, width=48)


# ---- seeds and batches ---------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_video_alone_or_in_a_batch(video2world):
    prompts, video = [PROMPT, "Another."], clip(5)
    batch = run(video2world, prompt=prompts, video=video, generator=seeds(7, 8), output_type="latent")
    for i, prompt in enumerate(prompts):
        alone = run(video2world, prompt=prompt, video=video, generator=seeds(7 + i)[0], output_type="latent")
        torch.testing.assert_close(batch[i : i + 1], alone, atol=2e-4, rtol=0)


def test_num_videos_per_prompt(video2world):
    out = run(video2world, video=clip(5), num_videos_per_prompt=3, generator=seeds(1, 2, 1), output_type="latent")
    assert len(out) == 3
    torch.testing.assert_close(out[0], out[2], atol=2e-4, rtol=0)
    assert (out[0] - out[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="2 generators for 3 videos"):
        run(video2world, video=clip(5), num_videos_per_prompt=3, generator=seeds(1, 2))


def test_one_video_per_prompt(video2world):
    videos = [clip(5), clip(5, seed=4)]
    both = run(video2world, prompt=[PROMPT] * 2, video=videos, generator=seeds(1, 1), output_type="latent")
    second = run(video2world, video=videos[1], output_type="latent")
    torch.testing.assert_close(both[1:], second, atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="2 images or videos for 3 prompts"):
        run(video2world, prompt=[PROMPT] * 3, video=videos)


# ---- inputs --------------------------------------------------------------------------------------------------------


def test_image_and_video_files(video2world, tmp_path):
    """Any size and rate: resized, cropped and resampled; the last frames are continued."""
    Image.new("RGB", (100, 70), "red").save(tmp_path / "image.png")
    assert run(video2world, image=str(tmp_path / "image.png")).shape == (1, 9, 3, 32, 48)
    write_video(tmp_path / "video.mp4", clip(40, 50, 90), fps=30)
    assert run(video2world, video=tmp_path / "video.mp4").shape == (1, 9, 3, 32, 48)


def test_default_number_of_conditioning_frames(video2world):
    """The largest legal number that the video has, and at least one latent frame is left to generate."""
    for length, latent_frames in ((1, 1), (4, 1), (5, 2), (8, 2), (20, 2)):
        seen = []
        video2world(
            video=clip(length),
            callback_on_step_end=lambda pipe, i, t, kw, seen=seen: seen.append(kw["latents"]),
            num_inference_steps=1,
            generator=seeds(1)[0],
        )
        other = run(
            video2world, video=clip(length), output_type="latent", num_inference_steps=1, generator=seeds(2)[0]
        )
        kept = [i for i in range(3) if torch.equal(seen[-1][:, :, i], other[:, :, i])]
        assert kept == list(range(latent_frames)), length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "exactly one of image and video"),
        (dict(video=clip(5), image=Image.new("RGB", (48, 32))), "exactly one of image and video"),
        (
            dict(video=clip(5), num_conditioning_frames=4),
            "num_conditioning_frames must be 1 \\+ k \\* 4, got 4: use 1 or 5",
        ),
        (dict(video=clip(9), num_conditioning_frames=9), "at most 5 here, got 9"),
        (dict(video=clip(3), num_conditioning_frames=5), "3 frames.*5 are needed"),
        (dict(image=Image.new("RGB", (48, 32)), num_conditioning_frames=5), "an image is one frame"),
        (dict(video=clip(5), num_frames=10), "num_frames must be 1 \\+ k \\* 4, got 10: use 9 or 13"),
        (dict(video=clip(5), num_frames=1), "leaves nothing to generate"),
        (dict(video=clip(5), height=40), "height must be a multiple of 16, got 40: use 32 or 48"),
        (dict(video=clip(5), output_type="gif"), "output_type must be one of"),
        (dict(video=clip(5), prompt=None, guidance_scale=2.0), "guidance needs a prompt"),
        (dict(video=clip(5), guidance_scale=-1.0), "guidance_scale must be >= 0"),
        (dict(video=clip(5), negative_prompt="x", guidance_scale=0), "a negative prompt needs guidance_scale > 0"),
        (dict(video=clip(5), negative_prompt=PROMPT), "guidance would do nothing"),
        (dict(video=clip(5), prompt_embeds=torch.zeros(1, 4, 32)), "give prompt or prompt_embeds, not both"),
        (dict(video=clip(5), prompt=None, prompt_embeds=torch.zeros(1, 4, 9)), "must be \\[batch, tokens, 32\\]"),
        (dict(video=clip(5), latents=torch.zeros(1, 16, 2, 4, 6)), "latents must be unit noise of shape"),
        (dict(video=clip(5), callback_on_step_end_tensor_inputs=("noise",)), "callbacks can have"),
        (dict(video="no/such.mp4"), "no such file"),
        (dict(video=torch.full((3, 5, 32, 48), 3.0)), "must lie in \\[-1, 1\\]"),
    ],
)
def test_contradictions_are_refused(video2world, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(video2world, **arguments)


def test_no_prompt_is_no_text_and_no_guidance(video2world):
    a = run(video2world, prompt=None, video=clip(5), output_type="latent")
    zeros = torch.zeros(1, 16, 32)
    b = run(video2world, prompt=None, prompt_embeds=zeros, guidance_scale=0, video=clip(5), output_type="latent")
    assert torch.equal(a, b)


def test_text_is_zero_past_its_end_and_cuts_are_reported(video2world, caplog):
    tokenizer, encoder = video2world.tokenizer, video2world.text_encoder
    embeds = encode_text(tokenizer, encoder, ["red cube", PROMPT], 32, "cpu")
    length = len(tokenizer("red cube").input_ids)
    assert embeds[0, length:].abs().max() == 0 and embeds[0, :length].abs().min(-1).values.max() > 0
    encode_text(tokenizer, encoder, [PROMPT], 4, "cpu")
    assert "prompt cut to 4 tokens; lost:" in caplog.text


# ---- running -------------------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_may_change_latents(video2world):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, float(timestep)))
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"latents": tensors["latents"] * 0}

    out = run(
        video2world,
        video=clip(5),
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=("latents", "prompt_embeds"),
    )
    assert [step for step, _ in steps] == [0, 1]
    assert out.abs().max() == 0


def test_interrupt(video2world):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        pipe.interrupt = True
        return {}

    run(video2world, video=clip(5), callback_on_step_end=callback)
    assert seen == [0]


def test_broken_weights_are_noticed(text2world):
    weight = text2world.transformer.proj_out.weight
    saved = weight.detach().clone()
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        run(text2world)
    weight.data.copy_(saved)


def test_save_and_load_in_a_fresh_process(video2world, tmp_path):
    video2world.save_pretrained(tmp_path)
    torch.save((clip(5), run(video2world, video=clip(5), output_type="latent")), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from cosmos_hf import CosmosVideo2WorldPipeline as P; d = sys.argv[1];"
        "pipe = P.from_pretrained(d); assert pipe.config.num_frames == 9; video, expected = torch.load(d + '/expected.pt');"
        f"out = pipe(video=video, prompt={PROMPT!r}, output_type='latent', generator=torch.Generator().manual_seed(1)).frames;"
        "torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# ---- parity --------------------------------------------------------------------------------------------------------


class Sampler:
    """What `denoise_latents` needs of a pipeline."""

    interrupt = False

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler

    def progress_bar(self, total):
        return tqdm(total=total, disable=True)


def test_guided_run_of_the_reference():
    """Its `generate_samples_from_batch`: guidance 7, two given latent frames, six steps of RES 2ab and the clean one."""
    tensors, metadata, config = golden("diffusion", "v2w_7b_tiny", outputs=True)
    assert tensors["inputs.model.padding_mask"].abs().max() == 0
    model = load_original("VideoExtendGeneralDIT", config, weights(tensors))
    noise = tensors["inputs.sample_res2ab.unit_noise"]
    condition = FrameCondition(
        latents=tensors["inputs.model.gt_latent"],
        indicator=tensors["inputs.model.condition_video_indicator"],
        augment_sigma=float(metadata["augment_sigma"]),
        augment_noise=noise,
    )
    result = denoise_latents(
        Sampler(model, CosmosEDMScheduler(solver="res_2ab")),
        noise,
        tensors["inputs.model.crossattn_emb"],
        tensors["inputs.model.neg_crossattn_emb"],
        fps=tensors["inputs.model.fps"],
        num_inference_steps=int(metadata["num_steps"]),
        guidance_scale=float(metadata["guidance"]),
        condition=condition,
    )
    torch.testing.assert_close(result, tensors["outputs.sample_res2ab.final"], atol=2e-3, rtol=0)
