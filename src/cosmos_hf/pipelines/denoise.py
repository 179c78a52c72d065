"""The sampling loop that all diffusion pipelines share (arXiv 2501.03575, section 5.1): from noise to clean latents."""

import torch

from ..conditioning.frames import FrameCondition, condition_mask


@torch.no_grad()
def denoise_latents(
    pipe,
    noise: torch.Tensor,
    text: torch.Tensor,
    negative_text: torch.Tensor | None,
    fps: float,
    num_inference_steps: int,
    guidance_scale: float,
    condition: FrameCondition | None = None,
    callback=None,
    callback_tensors: tuple[str, ...] = ("latents",),
) -> torch.Tensor:
    """Unit noise [B, C, T', H', W'] -> latents of the same shape, float32, sigma_data times normalised.

    The published models' guidance: x0 = cond + w (cond - uncond), w = guidance_scale, so w = 0 is none and w corresponds to a
    scale of 1 + w in the more common convention. Both branches see the same frames, so it may be taken on the network's
    raw output. The two branches run one after the other: memory is that of one.

    `callback(pipe, step, timestep, tensors) -> tensors` runs after every step and may replace what it is given.
    """
    scheduler, transformer = pipe.scheduler, pipe.transformer
    options = {"fps": fps}
    if transformer.takes_condition_mask:
        size = noise.shape[-2:]
        indicator = condition.indicator if condition is not None else noise.new_zeros(1, 1, noise.shape[2], 1, 1)
        options["condition_mask"] = condition_mask(indicator, *size)

    def network(hidden_states, c_noise):
        output = transformer(hidden_states, c_noise, text, **options).sample.float()
        if negative_text is None:
            return output
        other = transformer(hidden_states, c_noise, negative_text, **options).sample.float()
        return output + guidance_scale * (output - other)

    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = scheduler.init_noise_sigma * noise
    with pipe.progress_bar(total=len(scheduler.timesteps)) as bar:
        for i, timestep in enumerate(scheduler.timesteps):
            if pipe.interrupt:
                break
            denoised = scheduler.denoise(network, latents, scheduler.sigmas[i], condition)
            latents = scheduler.step(denoised, timestep, latents).prev_sample
            if callback is not None:
                known = {"latents": latents, "prompt_embeds": text, "negative_prompt_embeds": negative_text}
                changed = callback(pipe, i, timestep, {name: known[name] for name in callback_tensors})
                known |= changed or {}
                latents, text, negative_text = known.values()
            bar.update()
    if not torch.isfinite(latents).all():
        raise ValueError(
            "sampling produced values that are not finite: the weights are damaged, or the dtype's range is too small "
            "(use bfloat16 instead of float16)"
        )
    return latents
