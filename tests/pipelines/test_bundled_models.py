"""What the bundled adapter and heads are for."""

import pytest
import torch

from cosmos_hf import CosmosAutoregressivePipeline, CosmosVideo2WorldPipeline, nano_path
from cosmos_hf.conditioning.camera import CameraPath
from cosmos_hf.conditioning.camera_paths import named_trajectory
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


def test_medusa_heads_save_half_of_the_passes_and_change_nothing():
    pipe = CosmosAutoregressivePipeline.from_pretrained(nano_path("autoregressive"))
    codes = pipe.vae.encode(to_float(first_frame("autoregressive"))[None]).indices.flatten(1)
    fast = speculative_generate(pipe.transformer, codes, latent_shape=(3, 12, 16))
    assert torch.equal(fast.sequences, pipe.transformer.generate(codes, latent_shape=(3, 12, 16)))
    assert fast.forward_passes < 0.5 * 2 * 12 * 16
