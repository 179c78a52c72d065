"""What `preflight` looks at: each part by itself, how the parts of a pipeline fit, and a small fixed input for each."""

import math

import torch
from torch import nn

from ..models.ar_cosmos import CosmosARForCausalLM
from .encode import check_size, encode_text

PROBE_TEXT = "A robot arm picks up the red cube and puts it on the table."


# ---- each part by itself: (name, part, facts, problems) --------------------------------------------------------------


def check_weights(name: str, part, facts: list[str], problems: list[str]):
    """Every value is there and finite; one precision, but for what a class keeps in float32."""
    if not isinstance(part, nn.Module):
        return
    tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    absent = [key for key, tensor in tensors.items() if tensor.is_meta]
    damaged = [key for key, tensor in tensors.items() if not tensor.is_meta and not tensor.isfinite().all()]
    if absent:
        problems.append(
            f"{name} has {len(absent)} weights without values, {absent[:3]} among them: they were not loaded"
        )
    if damaged:
        problems.append(f"{name} has {len(damaged)} weights with values that are not finite, {damaged[:3]} among them")
    kept = getattr(part, "_keep_in_fp32_modules", None) or []
    free = {str(p.dtype) for key, p in part.named_parameters() if not any(word in key.split(".") for word in kept)}
    if len(free) > 1 and all("float" in dtype for dtype in free):
        problems.append(f"{name} mixes {', '.join(sorted(free))}: load it with one torch_dtype")
    count = sum(parameter.numel() for parameter in part.parameters())
    facts.append(f"{name}: {type(part).__name__}, {_count(count)} parameters, {', '.join(sorted(free))}")


def check_statistics(name: str, part, facts: list[str], problems: list[str]):
    """A pipeline's continuous tokenizer says what its latents' mean and standard deviation are."""
    if name != "vae":
        return
    mean, std = part.config.latents_mean, part.config.latents_std
    if part.config.quantizer is not None:
        facts.append(f"vae: discrete, {part.fsq.codebook_size} codes")
        return
    if mean is None:
        problems.append(
            "vae has no latents_mean and latents_std in its config: the transformer would see latents of another scale than "
            "it was trained on. Measure them with compute_latent_stats, or take the config of the published tokenizer"
        )
        return
    values = torch.tensor(std, dtype=torch.float64)
    if not torch.tensor(mean, dtype=torch.float64).isfinite().all() or not (values.isfinite() & (values > 0)).all():
        problems.append("vae has latents_mean or latents_std that are not finite and positive")
        return
    frames = f" and {values.shape[1]} latent frames" if values.ndim > 1 else ""
    spread = f"{values.min():.2g} to {values.max():.2g}"
    facts.append(f"vae: latent statistics of {values.shape[0]} channels{frames}, standard deviations {spread}")


def check_scheduler(name: str, part, facts: list[str], problems: list[str]):
    if name != "scheduler":
        return
    config = part.config
    facts.append(
        f"scheduler: {config.solver}, sigma {config.sigma_max:g} to {config.sigma_min:g}, sigma_data {config.sigma_data:g}"
    )
    if config.final_sigmas_type == "sigma_min":
        facts.append(
            "scheduler: stops at sigma_min as diffusers' published settings do, and leaves its noise in the video; "
            "CosmosEDMScheduler() ends clean"
        )
    if config.sigma_data <= 0:
        problems.append(
            f"scheduler has sigma_data={config.sigma_data}, which must be positive (0.5 in the published models)"
        )


CHECKS = (check_weights, check_statistics, check_scheduler)


# ---- how the parts fit -----------------------------------------------------------------------------------------------


def check_fit(pipeline, own_settings: bool, facts: list[str], problems: list[str]):
    """Widths, channels, codes, vocabulary and the pipeline's settings; parts that are absent are not compared.

    own_settings: whether the settings are those of this model; a folder published for diffusers has none.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    encoder, tokenizer = (getattr(pipeline, name, None) for name in ("text_encoder", "tokenizer"))
    if transformer is None:
        problems.append("the pipeline has no transformer")
        return
    autoregressive = isinstance(transformer, CosmosARForCausalLM)
    field = "cross_attention_dim" if autoregressive else "text_embed_dim"
    width = getattr(transformer.config, field)
    if encoder is not None and encoder.config.d_model != width:
        problems.append(f"text_encoder is {encoder.config.d_model} wide, the transformer takes {width} ({field})")
    if encoder is not None and tokenizer is not None and len(tokenizer) > encoder.config.vocab_size:
        problems.append(f"tokenizer has {len(tokenizer)} tokens, the text_encoder knows {encoder.config.vocab_size}")
    misfit = None if vae is None else (_codes_misfit if autoregressive else _latents_misfit)(vae, transformer.config)
    if misfit is not None:
        problems.append(misfit)
    elif vae is not None:
        misfits = []
        if "num_frames" in pipeline.config:
            _check_settings(pipeline, facts, misfits)
        else:  # a decoder has the size of the codes; its constructor has checked the rest
            facts.append(f"pipeline: {type(pipeline).__name__}, {pipeline.config.num_inference_steps} steps")
        if own_settings:
            problems.extend(misfits)
        else:
            facts.extend(
                f"{misfit}: the folder has no settings of its own, give a size in calls" for misfit in misfits
            )


def _codes_misfit(vae, config) -> str | None:
    if vae.config.quantizer is None:
        return "vae is a continuous tokenizer; an autoregressive pipeline needs a discrete one"
    if vae.fsq.codebook_size != config.codebook_size:
        return f"vae has {vae.fsq.codebook_size} codes, the transformer {config.codebook_size} (codebook_size)"


def _latents_misfit(vae, config) -> str | None:
    if vae.config.quantizer is not None:
        return "vae is a discrete tokenizer; a diffusion pipeline needs a continuous one"
    if vae.config.latent_channels != config.out_channels:
        return f"vae has {vae.config.latent_channels} latent channels, the transformer {config.out_channels}"


def _check_settings(pipeline, facts: list[str], problems: list[str]):
    """The size that a call has by default."""
    settings, vae = pipeline.config, pipeline.vae
    height, width, count = settings.height, settings.width, settings.num_frames
    try:
        check_size(pipeline, height, width, count)
    except ValueError as error:
        problems.append(f"the pipeline's default size is impossible: {error}")
        return
    frames, factor = vae.latent_frames(count), vae.config.spatial_compression
    size, said = (
        (frames, height // factor, width // factor),
        f"{count} frames of {height}x{width} at {settings.fps:g} fps",
    )
    if isinstance(pipeline.transformer, CosmosARForCausalLM):
        window = " x ".join(map(str, pipeline.transformer.config.latent_shape))
        facts.append(f"pipeline: {type(pipeline).__name__}, {said}, windows of {window} codes")
        return
    largest = tuple(pipeline.transformer.config.max_size)
    if any(one > most for one, most in zip(size, largest, strict=True)):
        problems.append(
            f"the pipeline's default size has {size} latents (T, H, W), the transformer takes {largest} at most"
        )
    std = vae.config.latents_std
    if std is not None and isinstance(std[0], list | tuple) and 1 < len(std[0]) < frames:
        problems.append(
            f"vae has statistics for {len(std[0])} latent frames, the pipeline's num_frames={count} makes {frames}"
        )
    facts.append(f"pipeline: {type(pipeline).__name__}, {said}, {settings.num_inference_steps} steps")


# ---- a small fixed input for each: (parts, pipeline) -> output or None -----------------------------------------------


def wave(*shape: int, device=None) -> torch.Tensor:
    """Values in [-1, 1] that are the same everywhere, float32."""
    return torch.arange(math.prod(shape), dtype=torch.float64).mul(0.7).cos().float().view(shape).to(device)


def probe_text_encoder(parts: dict, pipeline) -> torch.Tensor | None:
    if "tokenizer" not in parts:
        return None
    encoder = parts["text_encoder"]
    return encode_text(parts["tokenizer"], encoder, [PROBE_TEXT], 64, _device(encoder, pipeline))


def probe_transformer(parts: dict, pipeline) -> torch.Tensor:
    """One evaluation on two latent frames of a few tokens, with every condition that the model takes."""
    model = parts["transformer"]
    config, device = model.config, _device(model, pipeline)
    if isinstance(model, CosmosARForCausalLM):
        return _probe_language(model, config, device)
    frames = 2 * config.patch_size[0] * config.num_views
    size = (frames, 2 * config.patch_size[1], 3 * config.patch_size[2])
    given = {}
    for name in model.conditions:
        if name == "condition_mask":
            given[name] = torch.zeros(1, 1, *size, device=device)
            given[name][:, :, 0] = 1
        elif name == "camera":
            given[name] = wave(1, config.camera_channels, *size, device=device)
        elif name == "actions":
            given[name] = wave(1, 1, config.action_dim, device=device)
        elif config.condition_vocab_size is None:
            given[name] = wave(1, config.condition_channels, *size, device=device)
        else:
            tokens = torch.arange(math.prod(size), device=device) % config.condition_vocab_size
            given[name] = tokens.view(1, 1, *size)
    text = wave(1, 8 * config.num_views, config.text_embed_dim, device=device)
    return model(wave(1, config.out_channels, *size, device=device), 0.1, text, fps=24, **given).sample


def _probe_language(model: CosmosARForCausalLM, config, device) -> torch.Tensor:
    grid, given = (2, 2 * config.num_views, 3), {}
    if config.cross_attention_dim is not None:
        given["encoder_hidden_states"] = wave(1, 8, config.cross_attention_dim, device=device).to(model.dtype)
    if config.action_dim is not None:
        given["actions"] = wave(1, grid[0], config.action_dim, device=device).to(model.dtype)
    tokens = 7 * torch.arange(config.num_positions(grid), device=device)[None] % config.codebook_size
    if config.bov_token_id is not None:
        tokens[:, 0] = config.bov_token_id
    return model(tokens, latent_shape=grid, use_cache=False, **given).logits


def probe_vae(parts: dict, pipeline) -> torch.Tensor:
    """Latents, of a discrete tokenizer before they are rounded, and reconstruction of a clip that fills two latent frames."""
    vae = parts["vae"]
    side = 2 * vae.config.spatial_compression
    clip = wave(
        1, vae.config.in_channels, 1 + vae.config.temporal_compression, side, side, device=_device(vae, pipeline)
    )
    if vae.fsq is None:
        latents = vae.encode(clip.to(vae.dtype)).latents
        video = vae.decode(latents).sample
    else:  # codes jump where a latent rounds differently, so what is compared lies before that, and comes from fixed ones
        latents = vae.quant_conv(vae.encoder(clip.to(vae.dtype).permute(0, 2, 3, 4, 1)))
        codes = 7 * torch.arange(8, device=clip.device).view(1, 2, 2, 2) % vae.fsq.codebook_size
        video = vae.decode_indices(codes).sample
    return torch.cat([latents.float().flatten(), video.float().flatten()])


def probe_scheduler(parts: dict, pipeline) -> torch.Tensor:
    """The noise levels of a short run and its sample before the last step, which depends on the estimate alone."""
    scheduler = parts["scheduler"]
    kept = dict(vars(scheduler))
    scheduler.set_timesteps(3)
    sample = scheduler.init_noise_sigma * wave(1, 2, 3)
    levels = scheduler.sigmas.tolist()
    if sorted(levels, reverse=True) != levels:
        raise ValueError(f"noise levels do not fall: {levels}")
    for i, timestep in enumerate(scheduler.timesteps[:-1]):
        sample = scheduler.step(0.5 * wave(1, 2, 3) + 0.1 * i, timestep, sample).prev_sample
    output = torch.cat([scheduler.timesteps.cpu(), sample.flatten()])
    vars(scheduler).update(kept)  # as if nothing had happened
    return output


def _device(part, pipeline):
    return part.device if pipeline is None else pipeline._execution_device


def _count(number: int) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


PROBES = {
    "text_encoder": probe_text_encoder,
    "transformer": probe_transformer,
    "vae": probe_vae,
    "scheduler": probe_scheduler,
}
