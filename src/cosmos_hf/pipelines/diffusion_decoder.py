"""The diffusion decoder (arXiv 2501.03575, section 5.2.5): codes of a discrete tokenizer to a video of better quality.

Codes that compress much lose detail. A diffusion transformer that is conditioned on them generates the latents of a continuous
tokenizer, which compresses less, and that tokenizer's decoder makes the video.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from diffusers.video_processor import VideoProcessor

from ..conditioning.codes import CodeGrid, mirror_frames
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.quantizers import FiniteScalarQuantizer
from ..models.stored_prompt import CosmosStoredPrompt
from ..models.transformer_cosmos import CosmosWorldTransformer3D
from ..schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from .denoise import denoise_latents
from .encode import draw_noise
from .output import OUTPUT_TYPES, CosmosPipelineOutput
from .sampling import Sampling
from .windows import Windows

LATENTS_PER_PUSH = 2  # what the tokenizer decodes at a time


class CosmosDiffusionDecoderPipeline(DiffusionPipeline):
    """Makes a video of codes.

    Args:
        transformer: a network that takes token ids (`condition_vocab_size`), and nothing else but text.
        vae: the continuous video tokenizer whose latents it generates.
        scheduler: the noise levels and the solver; the published model was made for sigma 80 to 0.02 and Euler steps.
        stored_prompt: the embedding of the text that the network gets unless a call gives one; None is zeros.
        fsq_levels, code_temporal_compression, code_spatial_compression: the discrete tokenizer whose codes it decodes.
        window_latent_frames: latent frames that the transformer was trained with.
        overlap_latent_frames: what a call uses unless it says otherwise; None is half of a window. (The published code takes 2
            of 8, which leaves more of a seam: docs/autoregressive.md.)
        fps, num_inference_steps, guidance_scale: what a call uses unless it says otherwise.
        takes_text: whether the transformer was trained with texts; else it gets zeros, and a text is refused.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["stored_prompt"]
    _exclude_from_cpu_offload = ["stored_prompt"]  # it has no forward that could bring it to the device

    def __init__(
        self,
        transformer: CosmosWorldTransformer3D,
        vae: CosmosVideoTokenizer,
        scheduler: CosmosEDMScheduler,
        stored_prompt: CosmosStoredPrompt | None = None,
        fsq_levels: list | tuple = (8, 8, 8, 5, 5, 5),
        code_temporal_compression: int = 8,
        code_spatial_compression: int = 16,
        window_latent_frames: int = 8,
        overlap_latent_frames: int | None = None,
        fps: float = 24,
        num_inference_steps: int = 15,
        guidance_scale: float = 1.8,
        takes_text: bool = True,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, stored_prompt=stored_prompt)
        self.register_to_config(
            fsq_levels=list(fsq_levels),
            code_temporal_compression=code_temporal_compression,
            code_spatial_compression=code_spatial_compression,
            window_latent_frames=window_latent_frames,
            overlap_latent_frames=overlap_latent_frames,
            fps=float(fps),
            num_inference_steps=num_inference_steps,
            guidance_scale=float(guidance_scale),
            takes_text=takes_text,
        )
        self.interrupt = False
        self.fsq = FiniteScalarQuantizer(self.config.fsq_levels)
        self.code_grid = CodeGrid.of((code_temporal_compression, code_spatial_compression), _compressions(vae))
        self._check_parts()

    @torch.no_grad()
    def __call__(
        self,
        codes: torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        overlap_latent_frames: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        sampling: Sampling | dict | None = None,
    ) -> CosmosPipelineOutput | tuple:
        """Decode.

        A clip that is shorter than the window is completed forwards and backwards in turn, and cut again; a longer one is
        covered by windows that are denoised together (`pipelines.windows`).

        Args:
            codes: indices [B, T', H', W'], or the codes [B, C, T', H', W'] themselves.
            prompt_embeds: text embeddings [B or 1, N, D]; None is the stored prompt.
            fps: frames per second that the network is told and that the result carries.
            num_inference_steps: steps of the solver.
            guidance_scale: w in cond + w (cond - uncond), where uncond has neither text nor codes (all ids 0); 0 is off.
            overlap_latent_frames: latent frames that neighbouring windows have in common, at least.
            generator: a torch generator, or one per video: then a seed gives the same video alone or in a batch.
            latents: unit noise [B, C, T, H, W] to start from, T at least a window, instead of the generator's.
            output_type: "pil", "np", "pt", or "latent" for the sampler's result, which `stream` decodes.
            callback_on_step_end: called as callback(pipe, step, timestep, {"latents", "denoised"}) after every step.
            sampling: solver, noise levels, details of guidance; see `cosmos_hf.pipelines.sampling.Sampling`.

        Raises ValueError for codes of another codebook or of a grid that the network cannot represent.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        run = self.resolve(num_inference_steps, guidance_scale, overlap_latent_frames, fps, sampling)
        self.interrupt, device = False, self._execution_device
        indices = self._indices(codes).to(device)
        size = self.check_grid(*indices.shape[1:])
        window = self.config.window_latent_frames
        condition = mirror_frames(self.code_grid.spread(indices)[:, None], window)  # [B, 1, T, H', W']
        windows = Windows(condition.shape[2], window, run["overlap_latent_frames"])
        shape = (len(indices), self.vae.config.latent_channels, condition.shape[2], *size[1:])
        text = self._text(prompt_embeds, len(indices), device)
        if latents is None:
            latents = draw_noise(shape, generator, device)
        elif latents.shape != shape:
            raise ValueError(f"latents must be unit noise of shape {shape}, got {tuple(latents.shape)}")
        result = denoise_latents(
            self,
            latents.to(device, torch.float32),
            text,
            torch.zeros_like(text) if run["guidance_scale"] > 0 else None,
            fps=run["fps"],
            num_inference_steps=run["num_inference_steps"],
            guidance_scale=run["guidance_scale"],
            callback=callback_on_step_end,
            callback_tensors=("latents", "denoised"),
            sampling=replace(run["sampling"], drop_conditions=("condition",)),
            conditions={"condition": condition},
            windows=windows,
        )[:, :, : size[0]]
        frames = result if output_type == "latent" else self._decode(result, output_type)
        self.maybe_free_model_hooks()
        return CosmosPipelineOutput(frames=frames, fps=run["fps"]) if return_dict else (frames,)

    @torch.no_grad()
    def stream(self, latents: torch.Tensor, chunk: int = LATENTS_PER_PUSH) -> Iterator[torch.Tensor]:
        """The sampler's result [B, C, T, H, W] -> its video, [B, 3, t, height, width] in [-1, 1] at a time.

        `chunk` latent frames are decoded at a time, with the result of decoding all at once: memory does not grow with the video
        but for the keys and values of the tokenizer's temporal attention.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 latent frame, got {chunk}")
        latents = self.vae.denormalize(latents / self.scheduler.config.sigma_data, prolong=True).to(self.vae.dtype)
        decoder = self.vae.decoder_stream()
        for part in latents.split(chunk, dim=2):
            yield decoder.push(part).float()

    def _decode(self, latents: torch.Tensor, output_type: str):
        """Item by item, so that peak memory does not grow with the batch."""
        video = torch.cat([torch.cat(list(self.stream(item[None])), 2) for item in latents])
        scale = self.vae.config.spatial_compression
        return VideoProcessor(vae_scale_factor=scale).postprocess_video(video, output_type)

    def resolve(
        self, num_inference_steps=None, guidance_scale=None, overlap_latent_frames=None, fps=None, sampling=None
    ) -> dict:
        """These arguments of a call, over the pipeline's own settings; checked."""
        given = dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, fps=fps)
        given["overlap_latent_frames"] = overlap_latent_frames
        run = {name: getattr(self.config, name) if value is None else value for name, value in given.items()}
        run["sampling"] = sampling = Sampling.of(sampling)
        window = self.config.window_latent_frames
        if run["overlap_latent_frames"] is None:
            run["overlap_latent_frames"] = window // 2
        if run["guidance_scale"] < 0:
            raise ValueError(f"guidance_scale must be >= 0 (0 switches guidance off), got {run['guidance_scale']}")
        Windows(window, window, run["overlap_latent_frames"])
        self.scheduler.set_timesteps(run["num_inference_steps"], None, sampling.solver, sampling.grid)
        return run

    # ---- inputs ----------------------------------------------------------------------------------------------------

    def _indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Indices or codes -> indices [B, T', H', W'] int64, within the codebook."""
        if codes.is_floating_point():
            if codes.ndim != 5 or codes.shape[1] != len(self.fsq.levels):
                raise ValueError(f"codes must be [B, {len(self.fsq.levels)}, T', H', W'], got {tuple(codes.shape)}")
            return self.fsq.indices(codes.movedim(1, -1))
        if codes.ndim != 4 or 0 in codes.shape:
            raise ValueError(f"indices must be [B, T', H', W'] and not empty, got {tuple(codes.shape)}")
        if not 0 <= codes.min() <= codes.max() < self.fsq.codebook_size:
            raise ValueError(
                f"indices must lie in 0..{self.fsq.codebook_size - 1}, got {codes.min().item()}..{codes.max().item()}: they "
                f"are not of a tokenizer with fsq_levels={self.fsq.levels}"
            )
        return codes.long()

    def _text(self, embeds: torch.Tensor | None, batch: int, device) -> torch.Tensor:
        """Text embeddings [B, N, D]; zeros are all alike to the network, so one of them is enough."""
        width = self.transformer.config.text_embed_dim
        if embeds is None:
            stored = self.stored_prompt
            embeds = torch.zeros(1, 1, width) if stored is None else stored.embeds[None]
        elif not self.config.takes_text:
            raise ValueError("this decoder was trained without texts (takes_text=False): leave prompt_embeds out")
        if embeds.ndim != 3 or embeds.shape[-1] != width or len(embeds) not in (1, batch):
            raise ValueError(f"prompt_embeds must be [{batch} or 1, tokens, {width}], got {tuple(embeds.shape)}")
        return embeds.to(device, self.transformer.dtype).expand(batch, -1, -1)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def check_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The size in latents (T, H, W) of codes (T', H', W'); ValueError where the network cannot represent it."""
        config, size = self.transformer.config, self.code_grid.latent_size(frames, height, width)
        for i, axis in ((1, "height"), (2, "width")):
            if size[i] % config.patch_size[i] or size[i] > config.max_size[i]:
                pixels, factor = size[i] * self.vae.config.spatial_compression, self.config.code_spatial_compression
                raise ValueError(
                    f"the diffusion decoder cannot make a {axis} of {pixels} pixels ({size[i]} latents): they must be a "
                    f"multiple of {config.patch_size[i]} (patch_size) and at most {config.max_size[i]} (max_size); codes "
                    f"are {factor} pixels wide. Choose another {axis}, or decode with the tokenizer"
                )
        return size

    def check_tokenizer(self, tokenizer: CosmosVideoTokenizer):
        """ValueError unless this is a decoder for the codes of the discrete tokenizer `tokenizer`."""
        if tokenizer.fsq is None:
            raise ValueError("the tokenizer is continuous (quantizer=None): it has no codes for the diffusion decoder")
        known = (*_compressions(self.config, "code_"), tuple(self.config.fsq_levels))
        theirs = (*_compressions(tokenizer), tokenizer.fsq.levels)
        for name, ours, other in zip(
            ("temporal_compression", "spatial_compression", "fsq_levels"), known, theirs, strict=True
        ):
            if ours != other:
                raise ValueError(
                    f"the diffusion decoder was made for codes with {name}={ours}, the discrete tokenizer has {other}: "
                    f"they do not belong together"
                )

    def _check_parts(self):
        transformer, vae, config = self.transformer.config, self.vae.config, self.config
        if self.transformer.conditions != ("condition",) or transformer.condition_vocab_size is None:
            raise ValueError(
                f"a diffusion decoder's transformer takes token ids (condition_vocab_size) and no other condition; this one "
                f"takes {', '.join(self.transformer.conditions) or 'none'}"
            )
        if transformer.condition_vocab_size != self.fsq.codebook_size:
            raise ValueError(
                f"fsq_levels={self.fsq.levels} are {self.fsq.codebook_size} codes, the transformer knows "
                f"{transformer.condition_vocab_size} (condition_vocab_size): they do not belong together"
            )
        if vae.quantizer is not None:
            raise ValueError("vae is a discrete tokenizer: the latents of a continuous one are generated")
        if vae.latent_channels != transformer.out_channels:
            raise ValueError(
                f"vae has {vae.latent_channels} latent channels, the transformer {transformer.out_channels}"
            )
        window = config.window_latent_frames
        if not 2 <= window <= transformer.max_size[0]:
            raise ValueError(
                f"window_latent_frames must be between 2 and the transformer's {transformer.max_size[0]} (max_size), got "
                f"{window}"
            )
        self.resolve()
        stored = self.stored_prompt
        if stored is not None and not config.takes_text:
            raise ValueError("stored_prompt is for a transformer that was trained with texts (takes_text)")
        if stored is not None and stored.config.width != transformer.text_embed_dim:
            raise ValueError(
                f"stored_prompt is {stored.config.width} wide, the transformer takes {transformer.text_embed_dim} "
                f"(text_embed_dim)"
            )


def _compressions(source, prefix: str = "") -> tuple[int, int]:
    """(temporal, spatial) of a tokenizer or a config."""
    config = getattr(source, "config", source)
    return tuple(getattr(config, f"{prefix}{axis}_compression") for axis in ("temporal", "spatial"))
