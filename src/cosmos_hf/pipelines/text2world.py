"""Text to world: a video from a description (arXiv 2501.03575, section 5.1)."""

from dataclasses import asdict

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase, T5EncoderModel, T5TokenizerFast

from ..conditioning.action import ActionSpec
from ..conditioning.views import check_view_names
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.transformer_cosmos import CosmosWorldTransformer3D
from ..schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from .adapters import ConditionAdaptersMixin
from .buckets import bucket_size
from .conditions import expand_conditions, read_conditions
from .denoise import denoise_latents
from .encode import check_size, check_text, count_prompts, draw_noise, encode_prompts
from .output import OUTPUT_TYPES, CosmosPipelineOutput, decode_views
from .presets import PresetsMixin
from .published_layout import translate_index
from .sampling import Sampling


class CosmosText2WorldPipeline(PresetsMixin, ConditionAdaptersMixin, DiffusionPipeline):
    """Generates a video from a prompt.

    Args:
        tokenizer, text_encoder: T5; its embeddings are zeroed past the prompt's end and attended without a mask.
        transformer: a text-to-world network, or a video-to-world one, which is then given no frames.
        vae: the continuous video tokenizer.
        scheduler: the noise levels and the solver.
        height, width, num_frames, fps, num_inference_steps, guidance_scale: what a call uses unless it, or an adapter that is
            loaded, says otherwise; what the model was trained for.
        max_sequence_length: text tokens that the transformer was trained with; shorter prompts are padded with zeros.
        action_spec: what actions mean, of a transformer that takes them; an `ActionSpec` or its fields.
        views: names of the views, of a transformer that has several (`CosmosMultiViewPipeline`).
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "denoised", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: T5TokenizerFast | PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        transformer: CosmosWorldTransformer3D,
        vae: CosmosVideoTokenizer,
        scheduler: CosmosEDMScheduler,
        height: int = 704,
        width: int = 1280,
        num_frames: int = 121,
        fps: float = 24,
        num_inference_steps: int = 35,
        guidance_scale: float = 7.0,
        max_sequence_length: int = 512,
        action_spec: ActionSpec | dict | None = None,
        views: list[str] | None = None,
    ):
        super().__init__()
        self.start_adapters()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.register_to_config(
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            action_spec=None if action_spec is None else asdict(ActionSpec.of(action_spec)),
            views=None
            if views is None
            else list(check_view_names(views, transformer and transformer.config.num_views)),
        )
        self.interrupt = False

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Also reads the index of a folder published for diffusers; `from_pretrained` then loads our classes from its files."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, tuple):
            return translate_index(config[0]), *config[1:]
        return translate_index(config)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
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
        sampling: Sampling | dict | None = None,
        actions=None,
        camera=None,
    ) -> CosmosPipelineOutput | tuple:
        """Generate.

        Args:
            prompt: a description, or a list of them.
            negative_prompt: what to steer away from; None steers away from "no text", as the models were trained.
            height, width: pixels, multiples of the tokenizer's factor times the patch (16 for the published models).
            num_frames: pixel frames, 1 + k * the tokenizer's temporal factor.
            fps: frames per second that the model is told and that the result carries.
            num_inference_steps: steps of the solver.
            guidance_scale: w in cond + w (cond - uncond); 0 is off. A scale of 1 + w in the more common convention.
            num_videos_per_prompt: videos for each prompt.
            generator: a torch generator, or one per video: then a seed gives the same video alone or in a batch.
            latents: unit noise [B, C, T', H', W'] to start from, instead of the generator's.
            prompt_embeds, negative_prompt_embeds: text embeddings [B, N, D] instead of texts.
            output_type: "pil", "np", "pt" or "latent"; see `CosmosPipelineOutput`.
            callback_on_step_end: called as callback(pipe, step, timestep, tensors) after every step.
            resolution: an aspect ratio ("16:9", "4:3", "1:1", "3:4", "9:16") in place of height and width: the size of this
                shape that the model was trained with, or of its usual number of pixels.
            sampling: solver, noise levels, details of guidance; see `cosmos_hf.pipelines.sampling.Sampling`.
            actions: [num_frames - 1, A], for a model that takes them: action t leads from frame t to frame t + 1, in the units
                of `action_spec`, which checks them. One for all videos, or [B, num_frames - 1, A] or a list. Or for a model that
                takes a trajectory its points, [N, 3] (`cosmos_hf.conditioning.trajectory`), for one of the paper's next-frame form
                (`action_form` "as_written") one action, [1, A].
            camera: a `CameraPath` of num_frames poses, a dict with its "intrinsics" and "extrinsics", or a list of such.

        Raises ValueError for contradictions and sizes that the model cannot represent.
        """
        height, width = bucket_size(self, resolution, height, width)
        run = resolve(self, height, width, num_frames, fps, num_inference_steps, guidance_scale, output_type)
        check_text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, run["guidance_scale"])
        check_callback(self, callback_on_step_end_tensor_inputs)
        if prompt is None and prompt_embeds is None:
            raise ValueError("give prompt or prompt_embeds")
        given = read_conditions(self, run, actions, camera)
        items = max([count_prompts(prompt, prompt_embeds), *map(len, given.values())])
        return generate(
            self,
            run,
            texts=(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds),
            batch_size=items * num_videos_per_prompt,
            generator=generator,
            latents=latents,
            condition=None,
            callback=callback_on_step_end,
            callback_tensors=tuple(callback_on_step_end_tensor_inputs),
            output_type=output_type,
            return_dict=return_dict,
            sampling=sampling,
            conditions=expand_conditions(given, items, num_videos_per_prompt),
        )


# ---- shared with the other pipelines -------------------------------------------------------------------------------


def resolve(pipe, height, width, num_frames, fps, num_inference_steps, guidance_scale, output_type) -> dict:
    """The arguments of a call, over what its adapters were trained at and the pipeline's own settings; checked."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    given = dict(
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    run = {name: pipe.call_default(name) if value is None else value for name, value in given.items()}
    check_size(pipe, run["height"], run["width"], run["num_frames"])
    return run


def check_callback(pipe, names):
    unknown = set(names) - set(pipe._callback_tensor_inputs)
    if unknown:
        raise ValueError(
            f"callbacks can have {', '.join(pipe._callback_tensor_inputs)}, not {', '.join(sorted(unknown))}"
        )


def latent_shape(pipe, batch_size: int, run: dict, num_views: int = 1) -> tuple[int, ...]:
    vae = pipe.vae
    factor = vae.config.spatial_compression
    frames = num_views * vae.latent_frames(run["num_frames"])
    return batch_size, vae.config.latent_channels, frames, run["height"] // factor, run["width"] // factor


def generate(
    pipe,
    run,
    texts,
    batch_size,
    generator,
    latents,
    condition,
    callback,
    callback_tensors,
    output_type,
    return_dict,
    sampling=None,
    letterbox=None,
    conditions=None,
    views=None,
):
    """Text and noise to the pipeline's output; `condition(noise)` makes the `FrameCondition` of frames that are given.

    `conditions`: what the network is given besides, [batch_size, ...] by the names of its arguments.
    `letterbox`: the `data.video.Box` of the picture within its padding, which the network is told and the output is rid of.
    `views`: of several views their names and places in the model, in the order of the time axis; texts are then those of all of
    them, [batch_size * V], view by view, and the frames in the output are a dict by name.
    """
    sampling = Sampling.of(sampling)
    pipe.interrupt = False
    device = pipe._execution_device
    count = len(views or (1,))
    shape = latent_shape(pipe, batch_size, run, count)
    guided = run["guidance_scale"] > 0
    conditions = {name: value.to(device) for name, value in (conditions or {}).items()}
    sampling.check_dropped(conditions, guided)
    has_text = any(text is not None for text in texts)
    text, negative_text = encode_prompts(pipe, *texts, batch_size * count, guided and has_text, device)
    if views:
        conditions["view_indices"] = tuple(views.values())
        text, negative_text = (
            t if t is None else t.unflatten(0, (-1, count)).flatten(1, 2) for t in (text, negative_text)
        )
    if guided and not has_text:
        negative_text = text
    latents = _starting_noise(latents, shape, generator, device)
    result = denoise_latents(
        pipe,
        latents,
        text,
        negative_text,
        fps=run["fps"],
        num_inference_steps=run["num_inference_steps"],
        guidance_scale=run["guidance_scale"],
        condition=None if condition is None else condition(latents),
        callback=callback,
        callback_tensors=callback_tensors,
        sampling=sampling,
        padding_mask=None if letterbox is None else letterbox.padding_mask(run["height"], run["width"], device),
        conditions=conditions,
    )
    frames = decode_views(pipe, result, views, output_type, letterbox)
    pipe.maybe_free_model_hooks()
    return CosmosPipelineOutput(frames=frames, fps=run["fps"]) if return_dict else (frames,)


def _starting_noise(latents: torch.Tensor | None, shape: tuple[int, ...], generator, device) -> torch.Tensor:
    if latents is None:
        return draw_noise(shape, generator, device)
    if latents.shape != shape:
        raise ValueError(f"latents must be unit noise of shape {shape}, got {tuple(latents.shape)}")
    return latents.to(device, torch.float32)
