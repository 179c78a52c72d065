"""Several cameras at once (arXiv 2501.03575, section 6.3): any number of named views of one world, each with its own text, any of
them given."""

import torch

from .conditions import expand_conditions
from .encode import check_text
from .output import CosmosPipelineOutput
from .sampling import Sampling
from .text2world import CosmosText2WorldPipeline, check_callback, generate, resolve
from .video2world import AUGMENT_SIGMA
from .view_inputs import (
    hold_views,
    one_per_video,
    read_given_views,
    read_prompts,
    read_view_conditions,
    split_embeds,
    views_of_call,
)


class CosmosMultiViewPipeline(CosmosText2WorldPipeline):
    """Generates the views of several cameras together. Components and settings: `CosmosText2WorldPipeline`; `views` there, or the
    adapter that is loaded, names the model's views.

    pipe = CosmosMultiViewPipeline.from_pretrained(base)
    pipe.load_lora_weights("runs/nano_views/export")
    frames = pipe(prompt="A car drives through a town.", video={"front": "front.mp4"}).frames["left"][0]
    """

    takes_views = True
    augment_sigma = AUGMENT_SIGMA

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | dict[str, str] | list | None = None,
        image: dict | None = None,
        video: dict | None = None,
        views: list[str] | None = None,
        negative_prompt: str | dict[str, str] | list | None = None,
        num_conditioning_frames: int | dict[str, int] | None = None,
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
        sampling: Sampling | dict | None = None,
        actions=None,
        camera: dict | list[dict] | None = None,
        frame_repeat: dict[str, float] | None = None,
    ) -> CosmosPipelineOutput | tuple:
        """Generate; `frames` of the result is a dict by view, each entry as `output_type` has it.

        Args:
            prompt: a description for all views, a dict with one for each view, or a list of either, one per video. None
                generates without text, and then guidance is off.
            image, video: what is given, dicts by view; any of the views, the others are generated. An image is a view's first
                frame; a video gives its first frames, so that videos of several cameras stay synchronous. Values as
                `CosmosVideo2WorldPipeline` takes them, also lists, one per video.
            views: which of the model's views to generate, in the order of the result; None is all.
            negative_prompt: in the forms of `prompt`.
            num_conditioning_frames: how many frames to take of the videos, 1 + k * the tokenizer's temporal factor up to
                num_frames, for all or by view; None takes all that a video has: a view that is as long as the result is
                given whole.
            height, width, num_frames: of each view; by default those that the model, or the adapter, was trained on.
            latents: unit noise [B, C, V * T', H', W'], the views one after the other.
            prompt_embeds, negative_prompt_embeds: [B, V * N, D], likewise.
            actions: as there; all views are of the same car or robot.
            camera: a dict of a `CameraPath` for each view, all in one world; or a list of such, one per video. Rays are
                relative to the first camera of the first of these views, in the model's order.
            frame_repeat: how often frames repeat, by view, for models that are told; None is what the published inference tells.

        The others are those of `CosmosText2WorldPipeline`. Raises ValueError for contradictions, unknown views, and a model of
        one view.
        """
        places = views_of_call(self, views)
        if prompt is None and prompt_embeds is None:
            if not image and not video:
                raise ValueError("give prompt or prompt_embeds, or frames of some views (image=, video=)")
            if guidance_scale and not Sampling.of(sampling).drop_conditions:
                raise ValueError(
                    "guidance needs a prompt: without one both branches are equal. Give prompt, or guidance_scale=0"
                )
            guidance_scale = guidance_scale if Sampling.of(sampling).drop_conditions else 0
        run = resolve(self, height, width, num_frames, fps, num_inference_steps, guidance_scale, output_type)
        check_callback(self, callback_on_step_end_tensor_inputs)
        texts = dict(
            prompt=read_prompts("prompt", prompt, places),
            negative_prompt=read_prompts("negative_prompt", negative_prompt, places),
            prompt_embeds=split_embeds("prompt_embeds", prompt_embeds, len(places)),
            negative_prompt_embeds=split_embeds("negative_prompt_embeds", negative_prompt_embeds, len(places)),
        )
        given = read_given_views(self, image, video, num_conditioning_frames, places, run)
        conditions = read_view_conditions(self, run, places, actions, camera, frame_repeat)
        items = max(
            len(part) for part in ((1,), *texts.values(), *given.values(), *conditions.values()) if part is not None
        )
        texts = [one_per_video(name, rows, items, num_videos_per_prompt) for name, rows in texts.items()]
        check_text(*texts, run["guidance_scale"])
        return generate(
            self,
            run,
            texts=texts,
            batch_size=items * num_videos_per_prompt,
            generator=generator,
            latents=latents,
            condition=(lambda noise: hold_views(self, given, places, items, num_videos_per_prompt, noise))
            if given
            else None,
            callback=callback_on_step_end,
            callback_tensors=tuple(callback_on_step_end_tensor_inputs),
            output_type=output_type,
            return_dict=return_dict,
            sampling=sampling,
            conditions=expand_conditions(conditions, items, num_videos_per_prompt),
            views=places,
        )
