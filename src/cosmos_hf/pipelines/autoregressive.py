"""Autoregressive video to world: the future of an image or a video, code by code (arXiv 2501.03575, sections 5.2 and 6.2)."""

from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, T5EncoderModel, T5TokenizerFast
from transformers.generation.streamers import BaseStreamer

from ..conditioning.action import ActionSpec
from ..data.video import to_float
from ..models.ar_checks import check_generators
from ..models.ar_cosmos import CosmosARForCausalLM
from ..models.ar_generation import KnownCodes
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.medusa_cosmos import DRAFTS, speculative_generate
from .adapters import ConditionAdaptersMixin
from .conditions import check_needed, checked_actions, expand_conditions, latent_actions
from .diffusion_decoder import CosmosDiffusionDecoderPipeline
from .encode import check_size, check_text, count_prompts, encode_prompts, read_conditioning, repeat_to_batch
from .output import OUTPUT_TYPES, CosmosPipelineOutput, decode_indices
from .presets import AutoregressivePresetsMixin
from .view_inputs import read_given_views, views_of_call

# The published models were trained with one and with nine frames given, so more than nine are not taken unasked.
DEFAULT_CONDITIONING_FRAMES = 9
DECODER_OPTIONS = ("num_inference_steps", "guidance_scale", "overlap_latent_frames", "fps", "sampling")


class CosmosAutoregressivePipeline(ConditionAdaptersMixin, AutoregressivePresetsMixin, DiffusionPipeline):
    """Continues an image or the last frames of a video by generating the codes of its next frames.

    Args:
        vae: the discrete video tokenizer; its codebook is the transformer's.
        transformer: the language model over its codes.
        tokenizer, text_encoder: T5, for models with cross-attention; its embeddings are zeroed past the prompt's end and
            attended without a mask.
        diffusion_decoder: makes the video of the codes in place of the tokenizer, better and slower; a pipeline of its own.
        height, width, num_frames, fps, temperature, top_p: what a call uses unless it says otherwise; what the model was
            trained for.
        max_sequence_length: text tokens that the transformer was trained with; shorter prompts are padded with zeros.
        action_spec: what actions mean (`cosmos_hf.conditioning.action.ActionSpec`), for a transformer that takes them.
        views: names of the views of a transformer that has several.

    `load_lora_weights` brings adapters, also such as bring actions, text or views (`training/posttrain.py`).
    """

    takes_views = True
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "diffusion_decoder"]

    def __init__(
        self,
        vae: CosmosVideoTokenizer,
        transformer: CosmosARForCausalLM,
        tokenizer: T5TokenizerFast | PreTrainedTokenizerBase | None = None,
        text_encoder: T5EncoderModel | None = None,
        diffusion_decoder: CosmosDiffusionDecoderPipeline | None = None,
        height: int = 640,
        width: int = 1024,
        num_frames: int = 33,
        fps: float = 25,
        temperature: float = 1.0,
        top_p: float = 0.8,
        max_sequence_length: int = 512,
        action_spec: ActionSpec | dict | None = None,
        views: list[str] | None = None,
    ):
        super().__init__()
        if vae.config.quantizer is None:
            raise ValueError("vae is a continuous tokenizer (quantizer=None): the codes of a discrete one are needed")
        if vae.fsq.codebook_size != transformer.config.codebook_size:
            raise ValueError(
                f"the tokenizer has {vae.fsq.codebook_size} codes, the transformer {transformer.config.codebook_size} "
                f"(codebook_size): they do not belong together"
            )
        if diffusion_decoder is not None:
            diffusion_decoder.check_tokenizer(vae)
            width_of_text = transformer.config.cross_attention_dim
            if width_of_text and diffusion_decoder.config.takes_text:
                _check_text_width(width_of_text, diffusion_decoder.transformer.config.text_embed_dim)
        parts = dict(tokenizer=tokenizer, text_encoder=text_encoder, diffusion_decoder=diffusion_decoder)
        self.register_modules(vae=vae, transformer=transformer, **parts)
        self.register_to_config(
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
            temperature=temperature,
            top_p=top_p,
            max_sequence_length=max_sequence_length,
            action_spec=None if action_spec is None else asdict(ActionSpec.of(action_spec)),
            views=views,
        )
        self.start_adapters()

    # ---- the diffusion decoder is a pipeline: diffusers moves and loads modules, so it is told here -----------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As of every diffusers pipeline; a diffusion decoder gets the same dtype. `diffusion_decoder=None` leaves it out.

        Without `torch_dtype` everything is float32; transformers alone would take the dtype of the stored weights.
        """
        place, name = Path(pretrained_model_name_or_path), "diffusion_decoder"
        if "dtype" not in kwargs:
            kwargs.setdefault("torch_dtype", torch.float32)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if isinstance(dtype, dict):
            dtype = dtype.get(name, dtype.get("default"))
        index = cls.load_config(place) if place.is_dir() else {}
        if name not in kwargs and index.get(name, [None])[0] is not None:
            passed = {key: kwargs[key] for key in ("variant", "use_safetensors") if key in kwargs}
            kwargs[name] = CosmosDiffusionDecoderPipeline.from_pretrained(place / name, torch_dtype=dtype, **passed)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if pipe.diffusion_decoder is not None and dtype is not None:
            pipe.diffusion_decoder.to(dtype=dtype)
        return pipe

    def to(self, *args, **kwargs):
        if self.diffusion_decoder is not None:
            self.diffusion_decoder.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def enable_model_cpu_offload(self, *args, **kwargs):
        super().enable_model_cpu_offload(*args, **kwargs)
        if self.diffusion_decoder is not None:
            self.diffusion_decoder.enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args, **kwargs):
        super().enable_sequential_cpu_offload(*args, **kwargs)
        if self.diffusion_decoder is not None:
            self.diffusion_decoder.enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args, **kwargs):
        super().enable_group_offload(*args, **kwargs)
        if self.diffusion_decoder is not None:
            self.diffusion_decoder.enable_group_offload(*args, **kwargs)

    def set_progress_bar_config(self, **kwargs):
        super().set_progress_bar_config(**kwargs)
        if self.diffusion_decoder is not None:
            self.diffusion_decoder.set_progress_bar_config(**kwargs)

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        video=None,
        prompt: str | list[str] | None = None,
        num_conditioning_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        overlap_latent_frames: int | None = None,
        fps: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        draft: str | None = None,
        actions=None,
        use_diffusion_decoder: bool | None = None,
        decoder_options: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> CosmosPipelineOutput | tuple:
        """Generate; the result begins with the given frames, as the tokenizer reconstructs them.

        Args:
            image, video: exactly one of them: a path, PIL image (a list of them is a video), array or tensor as
                `cosmos_hf.data.video.read_video` takes it, or a list of such, one per prompt. Resized until the output's size
                is covered and cropped to its centre; a file is resampled to `fps`, anything else is taken to have it.
                Of a model of several views dicts by their names, of any of them, also both: an image gives a view's first frame, a
                video its first frames, or the whole view. The first view needs one at least, unless the model has `<bov>`.
            prompt: a description, or a list, for models that attend to text; None continues without.
            num_conditioning_frames: how many of the video's last frames to continue from, 1 + k * the tokenizer's temporal
                factor and less than num_frames; None takes the most that the video has, at most 9. Of several views as
                `CosmosMultiViewPipeline` takes it.
            height, width: pixels, multiples of the tokenizer's factor: any latent grid.
            num_frames: pixel frames of the result, 1 + k * the tokenizer's temporal factor. What is longer than the
                transformer's `latent_shape` is made by sliding windows over the codes, decoded in one piece.
            overlap_latent_frames: latent frames that a window takes over from the one before; None: half of the window.
            temperature, top_p: how codes are drawn; top_p=0 or temperature=0 takes the most probable.
            generator: a torch generator, or a list of one per video: then a seed gives the same video alone or in a batch.
            prompt_embeds: text embeddings [B, N, D] instead of prompts.
            draft: "heads" or "previous_frame" guesses several codes for each pass of the transformer
                (`models.medusa_cosmos`): draws keep their distribution, and in float32 the most probable codes stay the same (in
                bfloat16 and float16 rounding may decide otherwise between codes that are nearly as probable).
            actions: what leads from frame to frame of the whole result, [num_frames - 1, A] in the units of the `action_spec`,
                one for all videos or one per video, for a model that takes actions. A window is given its own ones.
            use_diffusion_decoder: whether the diffusion decoder makes the video, or the tokenizer; None: if there is one.
            decoder_options: of the diffusion decoder's call: num_inference_steps, guidance_scale, overlap_latent_frames, fps,
                sampling.
            output_type: "pil", "np", "pt", or "latent" for the codes [B, T', H', W'], which nothing decodes. Of several views
                the result's `frames` is a dict of such by their names.

        Raises ValueError for contradictions and sizes that the models cannot represent.
        """
        places = views_of_call(self, None) if self.transformer.config.num_views > 1 else None
        run = self._resolve(height, width, num_frames, fps, temperature, top_p, output_type)
        check_needed(self, run, actions, None)
        steps = None if actions is None else checked_actions(self, actions, run["num_frames"], run["fps"])
        decoder_options = self._decoder_options(use_diffusion_decoder, decoder_options, run, output_type)
        takes_text = self.transformer.config.cross_attention_dim is not None
        check_text(prompt, None, prompt_embeds, None, 0)
        if not takes_text and (prompt is not None or prompt_embeds is not None):
            raise ValueError("this transformer has no cross-attention: a prompt would be ignored, leave it out")
        if prompt is not None and self.text_encoder is None:
            raise ValueError(
                "the pipeline has no text_encoder: give prompt_embeds, or load it with tokenizer and text_encoder"
            )
        if draft not in (None, *DRAFTS):
            raise ValueError(f"draft must be None or one of {', '.join(DRAFTS)}, got {draft!r}")
        overlap = self._overlap(overlap_latent_frames)
        if places is None:
            given = {"": self._given_frames(image, video, num_conditioning_frames, run)}
        else:
            given = read_given_views(self, image, video, num_conditioning_frames, places, run)
        several = (len(frames) for frames in given.values())
        items = max(count_prompts(prompt, prompt_embeds), 1 if steps is None else len(steps), *several)
        check_generators(generator, items * num_videos_per_prompt, "videos")
        device, text = self._execution_device, None
        if steps is not None:
            steps = expand_conditions({"actions": steps}, items, num_videos_per_prompt)["actions"]
        if takes_text:
            texts = (prompt, None, prompt_embeds, None)
            text, _ = encode_prompts(self, *texts, items * num_videos_per_prompt, False, device)
        codes = self._known_codes(given, places or ("",), items, num_videos_per_prompt, run)
        codes = self._continue(codes, overlap, run, generator, text, steps, draft)
        if places is not None:
            parts = zip(places, codes.chunk(len(places), dim=2), strict=True)
            frames = {name: decode_indices(self.vae, part, output_type) for name, part in parts}
        elif decoder_options is None:
            frames = decode_indices(self.vae, codes, output_type)
        else:
            told = self.diffusion_decoder.config.takes_text and (prompt is not None or prompt_embeds is not None)
            options = decoder_options | (dict(prompt_embeds=text) if told else {})
            frames = self.diffusion_decoder(codes, generator=generator, output_type=output_type, **options).frames
        self.maybe_free_model_hooks()
        return CosmosPipelineOutput(frames=frames, fps=run["fps"]) if return_dict else (frames,)

    def _resolve(self, height, width, num_frames, fps, temperature, top_p, output_type) -> dict:
        """The arguments of a call, over what its adapters were trained at and the pipeline's own settings; checked."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        given = dict(height=height, width=width, num_frames=num_frames, fps=fps, temperature=temperature, top_p=top_p)
        run = {name: self.call_default(name) if value is None else value for name, value in given.items()}
        check_size(self, run["height"], run["width"], run["num_frames"])
        if run["temperature"] < 0 or not 0 <= run["top_p"] <= 1:
            raise ValueError(
                f"temperature must be >= 0 and top_p in [0, 1], got {run['temperature']} and {run['top_p']}"
            )
        return run

    def _decoder_options(self, use: bool | None, options: dict | None, run: dict, output_type: str) -> dict | None:
        """Options of the diffusion decoder's call, None where the tokenizer decodes; checked."""
        decoder = self.diffusion_decoder
        if use and decoder is None:
            raise ValueError(
                "the pipeline has no diffusion_decoder: load it with one, or leave use_diffusion_decoder out"
            )
        if use and output_type == "latent":
            raise ValueError(
                "output_type='latent' gives the codes, which nothing decodes: leave use_diffusion_decoder out"
            )
        several = self.transformer.config.num_views > 1
        if use and several:
            raise ValueError("a diffusion decoder makes videos of one view: leave use_diffusion_decoder out")
        used = decoder is not None and use is not False and output_type != "latent" and not several
        if not used:
            if options is not None:
                raise ValueError("decoder_options would be ignored: the diffusion decoder is not used in this call")
            return None
        if unknown := sorted((options or {}).keys() - set(DECODER_OPTIONS)):
            raise ValueError(f"decoder_options has no {', '.join(unknown)}; there is {', '.join(DECODER_OPTIONS)}")
        factor = self.vae.config.spatial_compression
        size = run["height"] // factor, run["width"] // factor
        decoder.resolve(**options or {})
        decoder.check_grid(self.vae.latent_frames(run["num_frames"]), *size)
        return dict(options or {})

    def _overlap(self, overlap: int | None) -> int:
        window = self.transformer.config.latent_shape[0]
        if overlap is None:
            return max(1, window // 2)
        if not 1 <= overlap < window:
            raise ValueError(
                f"overlap_latent_frames must be at least 1 and less than the window of {window}, got {overlap}"
            )
        return overlap

    def _given_frames(self, image, video, count: int | None, run: dict) -> torch.Tensor:
        """The frames to continue, uint8 [B, 3, n, H, W]."""
        factor = self.vae.config.temporal_compression
        most = run["num_frames"] - factor
        if most < 1:
            raise ValueError(f"num_frames={run['num_frames']} leaves nothing to generate: use at least {1 + factor}")
        if count is None:
            most = min(most, DEFAULT_CONDITIONING_FRAMES)
        return read_conditioning(image, video, count, most, factor, run["height"], run["width"], run["fps"])

    def _known_codes(self, given: dict[str, torch.Tensor], views, items: int, repeats: int, run: dict) -> torch.Tensor:
        """The codes of the given frames in the video's grid [B, T', V H', W'], -1 where they are to be generated."""
        factor = self.vae.config.spatial_compression
        height, width = run["height"] // factor, run["width"] // factor
        size = (items * repeats, self.vae.latent_frames(run["num_frames"]), len(views) * height, width)
        codes = torch.full(size, -1, device=self._execution_device)
        for place, name in enumerate(views):
            if name in given:
                # The tokenizer is causal: the codes of the given frames do not depend on what follows, so nothing is padded.
                pixels = to_float(repeat_to_batch(given[name], items, repeats)).to(codes.device, self.vae.dtype)
                known = torch.cat([self.vae.encode(item[None]).indices for item in pixels])  # bounded memory
                codes[:, : known.shape[1], place * height : (place + 1) * height] = known
        if codes[0, 0, 0, 0] < 0 and self.transformer.config.bov_token_id is None:
            raise ValueError(
                f"the first frame of the first view ({next(iter(views))}) must be given: codes follow from there, view by view"
            )
        return codes

    def _continue(self, codes, overlap: int, run: dict, generator, text, actions, draft) -> torch.Tensor:
        """Fill the grid [B, T', H', W'] where it is -1, window by window; a window sees the last `overlap` latent frames, the
        first one all that is given and fits."""
        config, factor = self.transformer.config, self.vae.config.temporal_compression
        window, (total, height, width) = config.latent_shape[0], codes.shape[1:]
        bov = () if config.bov_token_id is None else (config.bov_token_id,)
        options = {} if text is None else {"encoder_hidden_states": text}
        sampled = run["temperature"] > 0 and run["top_p"] > 0
        if sampled:
            options |= dict(temperature=float(run["temperature"]), top_p=float(run["top_p"]), generator=generator)
        done = _leading(codes) // (height * width)  # latent frames
        rows = 1 if draft is None else len(codes)  # with guesses, videos are made one after the other
        with self.progress_bar(total=rows * (total * height * width - _leading(codes))) as bar:
            while done < total:
                start = done - overlap if done >= window else 0
                end = min(start + window, total)
                known = codes[:, start:end].flatten(1)
                known = torch.cat([known.new_tensor(bov).expand(len(known), -1), known], dim=1)
                given = len(bov) + _leading(codes[:, start:end])
                grid = (end - start, height, width)
                if actions is not None:
                    window_actions = actions[:, factor * start : factor * (end - 1)]
                    options["actions"] = latent_actions(self, window_actions).to(codes.device)
                tokens = self._generate(known, given, grid, draft, sampled, _Progress(bar), options)
                codes[:, start:end] = tokens[:, len(bov) :].view(-1, *grid)
                done = end
        return codes

    def _generate(self, known, given: int, grid, draft, sampled: bool, streamer, options: dict) -> torch.Tensor:
        """All tokens of a window from the first `given` of them, [B, S]; others that are not -1 stay as they are."""
        options = dict(options, latent_shape=grid, streamer=streamer, max_new_tokens=known.shape[1] - given)
        scattered = bool((known[:, given:] >= 0).any())
        if draft is not None:
            if scattered:
                raise ValueError("draft guesses what comes next and cannot skip codes that are given: leave it out")
            return speculative_generate(self.transformer, known[:, :given], draft=draft, **options).sequences
        if scattered:
            options["logits_processor"] = LogitsProcessorList([KnownCodes(known)])
        # A growing cache is copied for every code; on accelerators a fixed one would be compiled for every grid.
        cache = "static" if known.device.type == "cpu" else None
        if sampled:
            options["top_k"] = 0  # not the model's own either: codes are drawn by temperature and top_p
        return self.transformer.generate(known[:, :given], do_sample=sampled, cache_implementation=cache, **options)


def _leading(codes: torch.Tensor) -> int:
    """How many codes of a grid [B, T, H, W] are known in front of the first that is not; the same for all items."""
    unknown = (codes[0].flatten() < 0).nonzero()
    return int(unknown[0]) if len(unknown) else codes[0].numel()


def _check_text_width(ours: int, theirs: int):
    if ours != theirs:
        raise ValueError(
            f"the transformer attends to text of width {ours}, the diffusion decoder's to text of width {theirs} "
            f"(text_embed_dim): they do not belong together"
        )


class _Progress(BaseStreamer):
    """Counts generated codes [B]; the prompts [B, S], which a streamer is given before them, do not count."""

    def __init__(self, bar):
        self._bar = bar

    def put(self, value):
        self._bar.update(int(value.ndim == 1))

    def end(self):
        pass
