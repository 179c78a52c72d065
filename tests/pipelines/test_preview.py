"""The linear latent-to-colour map, on a trained tokenizer and a real clip; and as a callback."""

import pytest
import torch
import torch.nn.functional as F

from cosmos_hf import CosmosVideoTokenizer, nano_path
from cosmos_hf.data.video import read_video, to_float
from cosmos_hf.pipelines.preview import fit_latent_preview


def test_preview_resembles_the_video():
    """Fitted to random colours alone, it shows a clip that it has not seen; fitted to the clip it is closer still."""
    vae = CosmosVideoTokenizer.from_pretrained(f"{nano_path()}/vae").float().eval()
    video = to_float(read_video(f"{nano_path()}/example.mp4", num_frames=9).frames)[None]
    with torch.no_grad():
        latents = vae.normalize(vae.encode(video).latents) * 0.5
    small = F.avg_pool3d(video[:, :, :1] / 2 + 0.5, (1, 8, 8))

    def error(preview):
        shown = preview(latents)
        assert shown.dtype == torch.uint8 and shown.shape == (1, 3, 3, 12, 16)
        return (shown[:, :, :1] / 255 - small).square().mean().sqrt()

    spread = (small - small.mean((3, 4), keepdim=True)).square().mean().sqrt()
    assert error(fit_latent_preview(vae, 0.5)) < 0.7 * spread
    assert error(fit_latent_preview(vae, 0.5, video)) < 0.25 * spread


def test_callback_shows_the_estimate_of_every_kth_step(video2world):
    preview, seen = fit_latent_preview(video2world.vae, 0.5), []
    arguments = dict(image=torch.zeros(3, 1, 32, 48, dtype=torch.uint8), prompt="a cube", num_inference_steps=4)
    arguments["generator"] = torch.Generator().manual_seed(0)
    plain = video2world(output_type="latent", **arguments).frames
    arguments["generator"].manual_seed(0)
    watched = video2world(
        output_type="latent",
        callback_on_step_end=preview.callback(lambda step, frames: seen.append((step, frames)), every=3),
        callback_on_step_end_tensor_inputs=("denoised",),
        **arguments,
    ).frames
    assert torch.equal(plain, watched)
    assert [step for step, _ in seen] == [0, 3] and seen[0][1].shape == (1, 3, 3, 4, 6)
    assert torch.equal(seen[1][1], preview(watched))  # the last estimate is the result
    with pytest.raises(ValueError, match="a preview needs callback_on_step_end_tensor_inputs"):
        video2world(callback_on_step_end=preview.callback(print), **arguments)
