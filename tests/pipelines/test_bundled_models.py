"""What the bundled adapters and heads are for."""

import numpy as np
import pytest
import torch

from cosmos_hf import CosmosAutoregressivePipeline, CosmosMultiViewPipeline, CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.conditioning.camera import CameraPath
from cosmos_hf.conditioning.camera_paths import named_trajectory
from cosmos_hf.conditioning.trajectory import trajectory_points
from cosmos_hf.data.annotated import read_actions
from cosmos_hf.data.video import read_video, to_float
from cosmos_hf.models.medusa_cosmos import speculative_generate


def first_frame(name):
    return read_video(f"{nano_path(name)}/example.mp4", num_frames=1).frames


def test_the_camera_adapter_follows_the_camera():
    pipe = CosmosVideo2WorldPipeline.from_pretrained(nano_path())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(nano_path("camera"), adapter_name="camera")
    with pytest.raises(ValueError, match="needs camera="):
        pipe(video=first_frame("video2world"))
    intrinsics = torch.tensor([[110.0, 0, 64], [0, 110, 48], [0, 0, 1]])

    def seen(name):
        camera = CameraPath(intrinsics, named_trajectory(name, num_frames=17, angle=15), 96, 128)
        given = dict(video=first_frame("video2world"), camera=camera, generator=torch.Generator().manual_seed(0))
        return pipe(**given, num_inference_steps=1, output_type="pt")

    left, right = seen("pan_left"), seen("pan_right")
    assert left.fps == 10 and left.frames.shape == (1, 17, 3, 96, 128)
    change = (left.frames - right.frames).abs().mean((0, 2, 3, 4))
    assert change[0] < 0.01 and change[16] > change[4] > 2 * change[0]


def test_the_action_adapter_follows_the_actions():
    """What it expects is nearer to what happened with the actions that led there than with others, and than a still picture."""
    pipe = CosmosVideo2WorldPipeline.from_pretrained(nano_path())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(nano_path("action"))
    true = to_float(read_video(f"{nano_path('action')}/example.mp4").frames)
    actions = read_actions(f"{nano_path('action')}/example.npz", 17)

    def error(plan):
        given = dict(video=first_frame("action"), prompt="", actions=plan, num_inference_steps=1, output_type="pt")
        frames = pipe(**given, generator=torch.Generator().manual_seed(0)).frames[0].transpose(0, 1) * 2 - 1
        return (frames - true).square().mean().item()

    right, wrong = error(actions), error(actions * [-1, -1, 1, 1, 1, 1, 1])
    still = (true[:, :1] - true).square().mean().item()
    assert right < 0.75 * wrong and right < 0.6 * still


def test_the_instruction_adapter_does_what_it_is_told():
    """What it expects is nearer to what happened when it is told so than with another object or another direction."""
    pipe = CosmosVideo2WorldPipeline.from_pretrained(nano_path())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(nano_path("instruction"))
    true = to_float(read_video(f"{nano_path('instruction')}/example.mp4").frames)

    def error(prompt):
        given = dict(video=first_frame("instruction"), prompt=prompt, num_inference_steps=1, output_type="pt")
        frames = pipe(**given, generator=torch.Generator().manual_seed(0)).frames[0].transpose(0, 1) * 2 - 1
        return (frames - true).square().mean().item()

    told = error("Pick up the red ball and put it down towards the camera.")
    others = [f"Pick up the {thing} and put it down towards the camera." for thing in ("pink cube", "purple cylinder")]
    others += [f"Pick up the red ball and put it down {way}." for way in ("to the left", "to the right")]
    assert all(error(other) > 1.15 * told for other in others)
    assert told < 0.5 * (true[:, :1] - true).square().mean().item()


def test_the_views_adapter_keeps_the_views_apart():
    """Each view of what it expects is nearer to what its own camera saw than to what the others did."""
    pipe, folder = CosmosMultiViewPipeline.from_pretrained(nano_path()), nano_path("views")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder)
    true = {view: to_float(read_video(f"{folder}/example.{view}.mp4").frames) for view in pipe.views}
    with np.load(f"{folder}/example.npz") as archive:
        way = trajectory_points(torch.from_numpy(archive["extrinsics"][0]), fps=5)
    first = {view: read_video(f"{folder}/example.{view}.mp4", num_frames=1).frames for view in pipe.views}
    result = pipe(image=first, prompt="", actions=way, num_inference_steps=1, output_type="pt")
    made = {view: frames[0].transpose(0, 1) * 2 - 1 for view, frames in result.frames.items()}
    for view in pipe.views:
        errors = {other: (made[view] - true[other]).square().mean().item() for other in pipe.views}
        assert min(errors, key=errors.get) == view


def test_medusa_heads_save_half_of_the_passes_and_change_nothing():
    pipe = CosmosAutoregressivePipeline.from_pretrained(nano_path("autoregressive"))
    codes = pipe.vae.encode(to_float(first_frame("autoregressive"))[None]).indices.flatten(1)
    fast = speculative_generate(pipe.transformer, codes, latent_shape=(3, 12, 16))
    assert torch.equal(fast.sequences, pipe.transformer.generate(codes, latent_shape=(3, 12, 16)))
    assert fast.forward_passes < 0.5 * 2 * 12 * 16
