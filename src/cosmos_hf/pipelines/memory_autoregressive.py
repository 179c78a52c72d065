"""The stages of an autoregressive generation on tensors without values, for `pipelines.memory`."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from ..conditioning.codes import mirror_frames
from ..models.ar_cache import ReservedCache, ReservedLayer
from ..models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from ..models.ar_layers import self_attention_cache, with_context_cache
from ..models.autoencoder_cosmos import PRESETS as TOKENIZERS
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.peak_memory import peak_of
from .autoregressive import DEFAULT_CONDITIONING_FRAMES, CosmosAutoregressivePipeline
from .bare_parts import bare_decoder, bare_text_encoder, tokenizer_config, trained_size
from .diffusion_decoder import LATENTS_PER_PUSH, CosmosDiffusionDecoderPipeline
from .encode import check_size
from .memory import MemoryEstimate, cast, decode_stage, text_stage, to_fake, weights_held
from .presets import AUTOREGRESSIVE

DECODER = "diffusion_decoder"
# By stage, what accelerate's hooks leave on the device from before: only the next of a chain sends a part away.
LINGERING = {
    "encode": ("text_encoder",),
    "transformer": ("vae",),
    f"{DECODER}.transformer": ("transformer", "vae"),
    f"{DECODER}.vae": ("transformer", "vae"),
}


def estimate_autoregressive(model: str, given: dict, preset: str, dtype: torch.dtype, text: dict) -> MemoryEstimate:
    """As `memory.estimate_memory`, which see; `given`: the size of a call; `text`: arguments of a preset's T5."""
    pipe, settings = bare_autoregressive(model, text), AUTOREGRESSIVE[preset]
    size = {name: pipe.config[name] for name in ("height", "width", "num_frames", "max_sequence_length")} | given
    check_size(pipe, size["height"], size["width"], size["num_frames"])
    grid, views = grid_of(pipe, size), pipe.transformer.config.num_views
    decoder = None if views > 1 else pipe.diffusion_decoder
    parts = {name: getattr(pipe, name) for name in ("text_encoder", "transformer", "vae")}
    if pipe.diffusion_decoder is not None:
        parts |= {f"{DECODER}.{name}": getattr(pipe.diffusion_decoder, name) for name in ("transformer", "vae")}
    parts = {name: part for name, part in parts.items() if part is not None}
    for part in parts.values():
        cast(part, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for part in parts.values():
            to_fake(part)
        vae, transformer = pipe.vae, pipe.transformer
        stages = {"encode": ("vae", lambda: encode_given(vae, size, dtype))}
        if "text_encoder" in parts:
            length = size["max_sequence_length"]
            stages = {"text_encoder": ("text_encoder", lambda: text_stage(pipe.text_encoder, length, 1))} | stages
        stages["transformer"] = ("transformer", lambda: generate_codes(transformer, vae, grid, size, dtype))
        if decoder is None:
            decode = [size] * views
            stages["vae"] = ("vae", lambda: [decode_stage(vae, each, dtype, settings.decode_chunk) for each in decode])
        else:
            stages |= decoder_stages(decoder, grid, size, dtype)
        tables = prepare_tables(transformer, grid, dtype)
        activations = {stage: peak_of(run) for stage, (_, run) in stages.items()}
        activations["transformer"] += tables
        held = {name: weights_held(part, settings.place(name)) for name, part in parts.items()}
    totals = {}
    for stage, (part, _) in stages.items():
        others = {name for name in parts if name != part and settings.place(name) == "device"}
        if settings.transformer == "whole":
            others |= parts.keys() & LINGERING.get(stage, ())
        totals[stage] = activations[stage] + held[part][1] + sum(held[name][0] for name in others)
    return MemoryEstimate(
        {name: all_of for name, (all_of, _) in held.items()}, activations, totals, preset, None, settings
    )


def bare_autoregressive(model: str, text: dict) -> CosmosAutoregressivePipeline:
    """The pipeline of a preset's name (`text`: arguments of its T5), or of a folder or Hub id, on the meta device."""
    parts = {}
    if model in PRESETS:
        config = CosmosARConfig(**PRESETS[model])
        vae = TOKENIZERS[
            next((f"{size}-discrete" for size in ("nano", "tiny") if model.startswith(size)), "dv8x16x16")
        ]
        if config.cross_attention_dim is not None:
            with torch.device("meta"):
                encoder = T5EncoderModel(T5Config(**text | {"d_model": config.cross_attention_dim}))
            parts["text_encoder"] = encoder.eval()
        settings = {}
    else:
        index = CosmosAutoregressivePipeline.load_config(model)
        config = CosmosARConfig.from_pretrained(model, subfolder="transformer")
        vae = tokenizer_config(model)
        if index["text_encoder"][0] is not None:
            parts["text_encoder"] = bare_text_encoder(model)
        if index.get(DECODER, [None])[0] is not None:
            parts[DECODER] = bare_decoder(model, DECODER)
        names = ("height", "width", "num_frames", "max_sequence_length")
        settings = {name: index[name] for name in names if name in index}
    with torch.device("meta"):
        parts["transformer"] = CosmosARForCausalLM(config).eval()
        parts["vae"] = CosmosVideoTokenizer(**vae).eval()
    if not settings:
        settings = trained_size(config, parts["vae"])
    return CosmosAutoregressivePipeline(**parts, **settings)


def grid_of(pipe, size: dict) -> tuple[int, int, int]:
    """Codes [T', V H', W'] of the whole video."""
    space, views = pipe.vae.config.spatial_compression, pipe.transformer.config.num_views
    frames = pipe.vae.latent_frames(size["num_frames"])
    return frames, size["height"] // space * views, size["width"] // space


def given_frames(vae: CosmosVideoTokenizer, size: dict) -> int:
    """How many pixel frames of a long video a call goes on from by default."""
    factor = vae.config.temporal_compression
    most = max(1, min(DEFAULT_CONDITIONING_FRAMES, size["num_frames"] - factor))
    return most - (most - 1) % factor


def encode_given(vae: CosmosVideoTokenizer, size: dict, dtype: torch.dtype):
    """The frames that a video gives by default, of one view, and its codes."""
    count = given_frames(vae, size)
    return vae._encode(torch.zeros(1, vae.config.in_channels, count, size["height"], size["width"], dtype=dtype))


def prepare_tables(model: CosmosARForCausalLM, grid: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes of the embedding tables of a window, which are made on the processor and stay on the device."""
    window = (min(grid[0], model.config.latent_shape[0]), *grid[1:])
    model.model.positions(torch.zeros(1, 1, dtype=torch.long), window, dtype)
    return sum(t.nbytes for made in model.model.positions._tables.values() for t in made if t is not None)


def generate_codes(model: CosmosARForCausalLM, vae, grid: tuple, size: dict, dtype: torch.dtype):
    """What is given, and then the last code of a window, which sees the cache of all others."""
    config = model.config
    window = (min(grid[0], config.latent_shape[0]), *grid[1:])
    given = vae.latent_frames(given_frames(vae, size))
    if grid[0] > window[0]:  # later windows go on from half of the one before
        given = max(given, window[0] // 2)
    given = min(given, window[0] - 1) if window[0] > 1 else 0
    total = config.num_positions(window)
    cache = with_context_cache(_cache(config, total), config)
    first = {}
    if config.cross_attention_dim is not None:
        shape = (1, size["max_sequence_length"], config.cross_attention_dim)
        first["encoder_hidden_states"] = torch.zeros(shape, dtype=dtype)
    if config.action_dim is not None:
        first["actions"] = torch.zeros(1, window[0], config.action_dim, dtype=dtype)
    count = max(1, given * window[1] * window[2] + (config.bov_token_id is not None))
    same = dict(past_key_values=cache, use_cache=True, logits_to_keep=1, latent_shape=window)

    def step(length, **context):
        embeds = model.model.embed_tokens(torch.zeros(1, length, dtype=torch.long))  # tokens would be looked at
        return model(inputs_embeds=embeds, **same, **context).logits[:, -1].float().softmax(-1)

    step(count, **first)
    for layer in self_attention_cache(cache).layers:
        layer.keys, layer.values = (memory[:, :, : total - 1] for memory in layer._reserved)
    return step(1), cache, first


class _Layer(ReservedLayer):
    """One that does not ask where its memory lies, since without values it lies nowhere."""

    def _holds(self, length: int) -> bool:
        return self._reserved is not None and length <= self._reserved[0].shape[2]


def _cache(config, capacity: int) -> ReservedCache:
    cache = ReservedCache(config, capacity)
    cache.layers = [_Layer(capacity) for _ in cache.layers]
    return cache


# ---- the diffusion decoder -------------------------------------------------------------------------------------------


def denoise_codes(
    decoder: CosmosDiffusionDecoderPipeline, grid: tuple[int, int, int], length: int, dtype: torch.dtype
):
    """One guided step of a whole clip, window by window, with the tensors in float32 that a step holds."""
    window, config = decoder.config.window_latent_frames, decoder.transformer.config
    condition = mirror_frames(decoder.code_grid.spread(torch.zeros(1, *grid, dtype=torch.long))[:, None], window)
    shape = (1, config.out_channels, condition.shape[2], *decoder.check_grid(*grid)[1:])
    latents, noise, denoised = (torch.zeros(shape) for _ in range(3))
    outputs, cut = [], slice(0, window)
    for text in [torch.zeros(1, length, config.text_embed_dim, dtype=dtype) for _ in range(2)]:
        outputs.append(torch.zeros_like(latents))
        sample = decoder.transformer(latents[:, :, cut], 0.0, text, fps=24, condition=condition[:, :, cut]).sample
        outputs[-1][:, :, cut] += sample.float()
    return outputs, latents, noise, denoised


def decode_stream(decoder: CosmosDiffusionDecoderPipeline, grid: tuple[int, int, int], dtype: torch.dtype):
    vae = decoder.vae
    latents = torch.zeros(1, vae.config.latent_channels, *decoder.check_grid(*grid), dtype=dtype)
    parts = [part.float() for part in vae._in_chunks(vae._decode, latents, [LATENTS_PER_PUSH])]
    return torch.cat(parts, 2)


def decoder_stages(decoder: CosmosDiffusionDecoderPipeline, grid: tuple, size: dict, dtype: torch.dtype) -> dict:
    length = size["max_sequence_length"]
    return {
        f"{DECODER}.transformer": (f"{DECODER}.transformer", lambda: denoise_codes(decoder, grid, length, dtype)),
        f"{DECODER}.vae": (f"{DECODER}.vae", lambda: decode_stream(decoder, grid, dtype)),
    }
