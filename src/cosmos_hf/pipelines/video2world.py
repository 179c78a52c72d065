"""Video to world: the future of an image or a video, steered by a description (arXiv 2501.03575, section 5.1.3)."""

import logging

import torch

from ..conditioning.frames import FrameCondition, condition_indicator
from ..data.video import to_float
from .buckets import bucket_size
from .conditions import expand_conditions, read_conditions
from .encode import check_text, content_box, count_prompts, read_conditioning, repeat_to_batch, source_sizes
from .output import CosmosPipelineOutput
from .sampling import Sampling
from .text2world import CosmosText2WorldPipeline, check_callback, generate, resolve

logger = logging.getLogger(__name__)

# Noise on the given frames as the network sees them (the reference's inference value).
AUGMENT_SIGMA = 0.001
# The published models were trained with one and with nine frames given, so more than nine are not taken unasked.
DEFAULT_CONDITIONING_FRAMES = 9


class CosmosVideo2WorldPipeline(CosmosText2WorldPipeline):
    """Continues an image or the last frames of a video. Components and settings: `CosmosText2WorldPipeline`.

    pipe = CosmosVideo2WorldPipeline.from_pretrained(cosmos_hf.nano_path("video2world"))
    frames = pipe(video="robot.mp4", prompt="A robot arm picks up the red cube.").frames[0]
    """

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        video=None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_conditioning_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        resolution: str | None = None,
        fit: str = "crop",
        sampling: Sampling | dict | None = None,
        actions=None,
        camera=None,
    ) -> CosmosPipelineOutput | tuple:
        """Generate; the result begins with the given frames, as the tokenizer reconstructs them.

        Args:
            image, video: exactly one of them: a path, PIL image (a list of them is a video), array or tensor as
                `cosmos_hf.data.video.read_video` takes it, or a list of such, one per prompt. Resized and cropped to the
                size of the output; a file is resampled to `fps`, anything else is taken to have it.
            prompt: a description, or a list; None continues without text, and then guidance is off.
            num_conditioning_frames: how many of the video's last frames to continue from, 1 + k * the tokenizer's temporal
                factor and less than num_frames; None takes the most that the video has, at most 9.
            resolution: as there, or "auto": of the model's shapes the one nearest to the input's.
            fit: how the input comes to the output's size: "crop" covers it and cuts the rest; "pad" keeps the whole picture,
                tells the network which part of the frame is padding, and returns the picture without it.

        The others are those of `CosmosText2WorldPipeline`. Raises ValueError for contradictions.
        """
        no_text = prompt is None and prompt_embeds is None
        if no_text and not Sampling.of(sampling).drop_conditions:
            if guidance_scale:
                raise ValueError(
                    "guidance needs a prompt: without one both branches are equal. Give prompt, or guidance_scale=0"
                )
            guidance_scale = 0
        needs_size = resolution == "auto" or fit == "pad"
        sizes = source_sizes(image, video) if needs_size else []
        height, width = bucket_size(self, resolution, height, width, sizes[0] if sizes else None)
        run = resolve(self, height, width, num_frames, fps, num_inference_steps, guidance_scale, output_type)
        check_text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, run["guidance_scale"])
        check_callback(self, callback_on_step_end_tensor_inputs)
        if not self.transformer.takes_condition_mask:
            raise ValueError(
                "this transformer is text-to-world and cannot be given frames: use CosmosText2WorldPipeline"
            )
        factor = self.vae.config.temporal_compression
        most = run["num_frames"] - factor
        if most < 1:
            raise ValueError(f"num_frames={run['num_frames']} leaves nothing to generate: use at least {1 + factor}")
        if num_conditioning_frames is None:
            most = min(most, DEFAULT_CONDITIONING_FRAMES)
        size = run["height"], run["width"]
        given = read_conditions(self, run, actions, camera)
        if fit == "pad" and "camera" in given:
            raise ValueError(
                "fit='pad' moves the picture within the frame, which a camera cannot follow: use fit='crop'"
            )
        frames = read_conditioning(image, video, num_conditioning_frames, most, factor, *size, run["fps"], fit)
        items = max([count_prompts(prompt, prompt_embeds), len(frames), *map(len, given.values())])
        frames = repeat_to_batch(frames, items, num_videos_per_prompt)
        return generate(
            self,
            run,
            texts=(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds),
            batch_size=items * num_videos_per_prompt,
            generator=generator,
            latents=latents,
            condition=lambda noise: self.hold_frames(frames, noise),
            callback=callback_on_step_end,
            callback_tensors=tuple(callback_on_step_end_tensor_inputs),
            output_type=output_type,
            return_dict=return_dict,
            sampling=sampling,
            letterbox=content_box(sizes, *size) if fit == "pad" else None,
            conditions=expand_conditions(given, items, num_videos_per_prompt),
        )

    def hold_frames(self, frames: torch.Tensor, noise: torch.Tensor) -> FrameCondition:
        """uint8 frames [B, 3, n, H, W] -> what the sampler holds on to. The tokenizer is causal: later frames do not matter."""
        video = to_float(frames).to(noise.device, self.vae.dtype)
        given = torch.cat([self.vae.encode(item[None]).latents for item in video])  # item by item: bounded memory
        return self.hold_latents(given, noise)

    def hold_latents(
        self, given: torch.Tensor, noise: torch.Tensor, augment_sigma: float = AUGMENT_SIGMA
    ) -> FrameCondition:
        """The tokenizer's latents [B, C, n, H', W'] of a clip's beginning -> what the sampler holds on to."""
        given = self.vae.normalize(given.float()) * self.scheduler.config.sigma_data
        latents = torch.zeros_like(noise)
        latents[:, :, : given.shape[2]] = given
        # The reference draws this noise from the same seed as the initial noise, so the two are equal.
        return FrameCondition(
            latents=latents,
            indicator=condition_indicator(noise.shape[2], given.shape[2], noise.device),
            augment_sigma=augment_sigma,
            augment_noise=noise,
        )
