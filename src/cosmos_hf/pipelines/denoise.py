"""The sampling loop that all diffusion pipelines share (arXiv 2501.03575, section 5.1): from noise to clean latents."""

from contextlib import nullcontext

import torch

from ..conditioning.frames import FrameCondition, condition_mask
from .sampling import Sampling, guided
from .windows import Windows


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
    sampling: Sampling | dict | None = None,
    padding_mask: torch.Tensor | None = None,
    conditions: dict[str, torch.Tensor] | None = None,
    windows: Windows | None = None,
) -> torch.Tensor:
    """Unit noise [B, C, T', H', W'] -> latents of the same shape, float32, sigma_data times normalised.

    The published models' guidance: x0 = cond + w (cond - uncond), w = guidance_scale, so w = 0 is none and w corresponds to a
    scale of 1 + w in the more common convention. Both branches see the same frames, so it may be taken on the network's
    raw output. The two branches run one after the other, with the memory of one, unless `sampling` says otherwise.

    `callback(pipe, step, timestep, tensors) -> tensors` runs after every step and may replace what it is given, all but
    "denoised", the present estimate. `padding_mask` [B or 1, 1, height, width] is 1 where the picture is padding.
    `conditions` are the network's other inputs by name, [B, ...] (those that `sampling` drops are zero without the prompt), and of
    a network of several views `view_indices`. `windows` cover the clip where it is longer than what the network takes at once.
    """
    scheduler, transformer = pipe.scheduler, pipe.transformer
    sampling = Sampling.of(sampling)
    conditions = dict(conditions or {}) | ({} if padding_mask is None else {"padding_mask": padding_mask})
    generated = None if condition is None else ~condition.indicator.bool()
    if transformer.takes_condition_mask:
        conditions["condition_mask"] = _given_frames(condition, noise)
    evaluate = _Network(transformer, fps, windows, len(conditions.get("view_indices", (0,))))

    def branch(hidden_states, c_noise, texts, kept):
        given = _for_branches(conditions, kept, len(noise), sampling.drop_conditions)
        with _cache_of(transformer, kept):
            return evaluate(hidden_states, c_noise, texts, given)

    def network(hidden_states, c_noise):
        if negative_text is None:
            return branch(hidden_states, c_noise, (text,), (True,))
        return guided(branch, hidden_states, c_noise, text, negative_text, guidance_scale, sampling, generated)

    scheduler.set_timesteps(num_inference_steps, noise.device, sampling.solver, sampling.grid)
    latents = scheduler.init_noise_sigma * noise
    with pipe.progress_bar(total=len(scheduler.timesteps)) as bar:
        for i, timestep in enumerate(scheduler.timesteps):
            if pipe.interrupt:
                break
            denoised = scheduler.denoise(network, latents, scheduler.sigmas[i], condition)
            latents = scheduler.step(denoised, timestep, latents).prev_sample
            if callback is not None:
                known = {"latents": latents, "prompt_embeds": text, "negative_prompt_embeds": negative_text}
                shown = known | {"denoised": denoised}
                known |= callback(pipe, i, timestep, {name: shown[name] for name in callback_tensors}) or {}
                latents, text, negative_text = list(known.values())[:3]
            bar.update()
    return _finite(latents)


def _start_cache(transformer, windows: Windows | None):
    """Forget what a feature cache keeps of a run that was cut short."""
    if not transformer.is_cache_enabled:
        return
    if windows is not None:
        raise ValueError("feature caching does not know the windows of a clip apart: call transformer.disable_cache()")
    transformer._reset_stateful_cache()


def _cache_of(transformer, kept: tuple[bool, ...]):
    """Where a feature cache is enabled, it keeps apart what the branches of guidance compute."""
    if not transformer.is_cache_enabled:
        return nullcontext()
    return transformer.cache_context({(True,): "cond", (False,): "uncond"}.get(kept, "both"))


class _Network:
    """The transformer for all steps: texts' keys and values are computed once, and windows cover a clip that is too long."""

    def __init__(self, transformer, fps: float, windows: Windows | None, num_views: int):
        _start_cache(transformer, windows)
        self._transformer, self._fps, self._windows, self._num_views = transformer, fps, windows, num_views
        self._kept = []

    def __call__(
        self, hidden_states: torch.Tensor, c_noise: torch.Tensor, texts: tuple[torch.Tensor, ...], given: dict
    ):
        """Raw output [B, C, T, H, W] float32."""
        prepared = self._prepared(texts)

        def evaluate(states, inputs):
            return self._transformer(states, c_noise, prepared, fps=self._fps, **inputs).sample.float()

        if self._windows is None:
            return evaluate(hidden_states, given)
        return self._windows.evaluate(evaluate, hidden_states, given)

    def _prepared(self, texts: tuple[torch.Tensor, ...]):
        for known, prepared in self._kept:
            if len(known) == len(texts) and all(a is b for a, b in zip(known, texts, strict=True)):
                return prepared
        prepared = torch.cat(texts) if len(texts) > 1 else texts[0]
        if self._transformer.can_prepare_text:
            prepared = self._transformer.prepare_text(prepared, self._num_views)
        self._kept = [
            *self._kept[-1:],
            (texts, prepared),
        ]  # two branches; a callback's new texts push out the old ones
        return prepared


def _given_frames(condition: FrameCondition | None, noise: torch.Tensor) -> torch.Tensor:
    indicator = condition.indicator if condition is not None else noise.new_zeros(1, 1, noise.shape[2], 1, 1)
    return condition_mask(indicator, *noise.shape[-2:])


def _for_branches(conditions: dict, kept: tuple[bool, ...], batch: int, dropped: tuple[str, ...]) -> dict:
    """The conditions of all branches that are evaluated at once, those in `dropped` zero where a branch does not keep all."""
    given = {}
    for name, value in conditions.items():
        if not isinstance(value, torch.Tensor):
            given[name] = value  # of the call, not of a video
            continue
        value = value.expand(batch, *value.shape[1:]) if len(kept) > 1 else value
        parts = [value if keep or name not in dropped else torch.zeros_like(value) for keep in kept]
        given[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return given


def _finite(latents: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(latents).all():
        raise ValueError(
            "sampling produced values that are not finite: the weights are damaged, or the dtype's range is too small "
            "(use bfloat16 instead of float16)"
        )
    return latents
