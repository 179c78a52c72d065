"""Noise of the Cosmos-1 diffusion models (arXiv 2501.03575, section 5.1.1; EDM, arXiv 2206.00364): the one owner of its maths.

A sample at noise level sigma is x = x0 + sigma * noise. The network F sees c_in * x and c_noise, and
D(x, sigma) = c_skip * x + c_out * F(c_in * x, c_noise) estimates x0. Training and sampling both call `denoise`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .diffusers_settings import from_diffusers_config
from .exponential_solvers import SOLVERS, ExponentialSolver

GRIDS = ("karras", "angle")
# Of 1, 1.5, 2 and 3, the best at 5 to 18 evaluations on the nano model and the toy problems together.
ANGLE_POWER = 1.5


@dataclass
class CosmosEDMSchedulerOutput(BaseOutput):
    """`prev_sample`: the sample at the next, lower noise level."""

    prev_sample: torch.Tensor


class CosmosEDMScheduler(SchedulerMixin, ConfigMixin):
    """Preconditioning, noise levels and solvers for sampling; noise, weights and loss for training.

    Sampling:

        scheduler.set_timesteps(35, device)
        sample = scheduler.init_noise_sigma * noise
        for i, timestep in enumerate(scheduler.timesteps):
            x0 = scheduler.denoise(network, sample, scheduler.sigmas[i], condition)
            sample = scheduler.step(x0, timestep, sample).prev_sample

    Solvers (`exponential_solvers.py`): "euler"; "res_2ab", of the published models; "unipc", which corrects every step once
    the next estimate is known. All but "res_2ab" evaluate the network `num_inference_steps` times; "res_2ab" takes that many
    steps down to the last noise level and evaluates the network once more there, as published. All end clean: the last
    step goes to sigma 0.

    Grids of noise levels: "karras", of the published models, is sigma_i = (sigma_max^(1/rho) + i/n (sigma_min^(1/rho) -
    sigma_max^(1/rho)))^rho. "angle" has equal steps in
    atan((sigma / sigma_data)^(1/1.5)): along the circle on which data turn into noise, stretched towards both ends. It spends few
    steps where the picture is all but noise or all but done, and needs no sigma_min. `benchmarks/sampler.py` measures both.

    Args:
        sigma_max, sigma_min, rho: the grid.
        sigma_data: standard deviation of the latents that the model was trained on.
        solver, grid: see above; `set_timesteps` may choose others. No grid is the solver's own: "angle" for "unipc", and
            "karras" for the published ones.
        p_mean, p_std: ln(sigma) of training is normal with these.
        scale_noise_by_frames: multiply training sigmas by sqrt(T) (the reference's `adjust_video_noise`).
        augment_p_mean, augment_p_std: the same as p_mean, p_std for the noise on given frames in training.
        final_sigmas_type: "zero", or "sigma_min" to stop at the last level of the grid as diffusers' published settings do: the
            last step then has no length, and its noise stays in the result.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        solver: str = "unipc",
        p_mean: float = 0.0,
        p_std: float = 1.0,
        scale_noise_by_frames: bool = False,
        augment_p_mean: float = -3.0,
        augment_p_std: float = 2.0,
        grid: str | None = None,
        final_sigmas_type: str = "zero",
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed, got {sigma_min} and {sigma_max}")
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', got {final_sigmas_type!r}")
        self._check_choice(solver, grid)
        self.sigmas = self.timesteps = self.num_inference_steps = None
        self._step, self._run = 0, None

    @staticmethod
    def _check_choice(solver: str, grid: str | None):
        for name, value, known in (("solver", solver, SOLVERS), ("grid", grid, GRIDS)):
            if value not in known and not (name == "grid" and value is None):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @classmethod
    def from_config(cls, config, **kwargs):
        """As of every diffusers scheduler; a config of diffusers' `EDMEulerScheduler` gives the same samples."""
        return super().from_config(from_diffusers_config(config), **kwargs)

    # ---- preconditioning -------------------------------------------------------------------------------------------

    def preconditioning(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """c_skip, c_out, c_in, c_noise (EDM table 1), each of sigma's shape."""
        total = sigma**2 + self.config.sigma_data**2
        c_skip = self.config.sigma_data**2 / total
        return c_skip, sigma * self.config.sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4

    def denoise(
        self,
        network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sample: torch.Tensor,
        sigma: float | torch.Tensor,
        condition=None,
    ) -> torch.Tensor:
        """The model's estimate of x0, [B, C, T, H, W] in the sample's dtype (float32 at least).

        Args:
            network: (c_in * x, c_noise) -> raw output; c_noise is float32, a scalar or [B] like sigma.
            sample: noisy latents [B, C, T, H, W].
            sigma: their noise level, a number or [B].
            condition: a `conditioning.frames.FrameCondition`. Its frames g enter the network as c_in(s) * (g + s * noise),
                s = augment_sigma, whatever sigma is, and are what the estimate holds there. (The mask channel is the
                network's own input: close over it.)
        """
        sample = _at_least_float32(sample)
        sigma = self._per_sample(sigma, sample)
        c_skip, c_out, c_in, c_noise = self.preconditioning(sigma)
        given = None
        if condition is not None:
            augment_sigma = self._per_sample(condition.augment_sigma, sample)
            given = condition.indicator.to(sample.device).bool()
            if condition.release:
                given = given & (augment_sigma < sigma)
            clean = condition.latents.to(sample)
            noised = clean + augment_sigma * condition.augment_noise.to(sample)
            sample = torch.where(given, noised * (self.preconditioning(augment_sigma)[2] / c_in), sample)
        output = network(c_in * sample, c_noise.flatten().squeeze().float())
        denoised = c_skip * sample + c_out * output.to(sample.dtype)
        return denoised if given is None else torch.where(given, clean, denoised)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        solver: str | None = None,
        grid: str | None = None,
    ):
        """Lay out `sigmas` (float64 on the CPU, the last is 0) and `timesteps` (c_noise of the network's evaluations).

        `solver` and `grid` are those of the config unless given.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        solver, grid = solver or self.config.solver, grid or self.config.grid
        self._check_choice(solver, grid)
        grid = grid or SOLVERS[solver][2]
        self.num_inference_steps = num_inference_steps
        levels = self._levels(num_inference_steps + (solver == "res_2ab"), grid)
        last = levels[-1:] if self.config.final_sigmas_type == "sigma_min" else levels.new_zeros(1)
        self.sigmas = torch.cat([levels, last])
        self.timesteps = (levels.log() / 4).float().to(device)
        self._step, self._run = 0, ExponentialSolver(solver)

    def _levels(self, count: int, grid: str) -> torch.Tensor:
        """The noise levels of `count` evaluations, float64, from sigma_max downwards."""
        config = self.config
        if grid == "angle":
            share = torch.arange(count, 0, -1, dtype=torch.float64) / count
            largest = math.atan((config.sigma_max / config.sigma_data) ** (1 / ANGLE_POWER))
            return config.sigma_data * torch.tan(largest * share) ** ANGLE_POWER
        ramp = torch.linspace(0, 1, count, dtype=torch.float64)
        high, low = (s ** (1 / config.rho) for s in (config.sigma_max, config.sigma_min))
        return (high + ramp * (low - high)) ** config.rho

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the sample that a run starts from."""
        return self.config.sigma_max

    def step(
        self, denoised: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> CosmosEDMSchedulerOutput | tuple[torch.Tensor]:
        """Move `sample` to the next noise level, given the (guided) estimate `denoised` of x0 at this one.

        `timestep` is `timesteps[i]` of the i-th call after `set_timesteps`. The result has the sample's dtype, or float32
        where that is a half precision.
        """
        if self.sigmas is None:
            raise ValueError("call set_timesteps before step")
        if self._step >= len(self.timesteps) or float(timestep) != float(self.timesteps[self._step]):
            raise ValueError(
                f"step {self._step} of {len(self.timesteps)} was called with timestep {float(timestep):.4f}: go through "
                f"scheduler.timesteps in order, once after each set_timesteps"
            )
        sample = _at_least_float32(sample)
        denoised = denoised.to(sample.dtype)
        sigma, target = self.sigmas[self._step].item(), self.sigmas[self._step + 1].item()
        if target == 0:
            new = denoised
        elif target == sigma:
            new = sample
        else:
            new = self._run.step(sample, denoised, sigma, target)
        self._step += 1
        return CosmosEDMSchedulerOutput(prev_sample=new) if return_dict else (new,)

    # ---- training --------------------------------------------------------------------------------------------------

    def sample_training_sigmas(
        self, batch_size: int, latent_frames: int = 1, generator: torch.Generator | None = None, device=None
    ) -> torch.Tensor:
        """Noise levels [B], float32: log-normal, times sqrt(latent_frames) where the config says so."""
        sigmas = self._log_normal(batch_size, self.config.p_mean, self.config.p_std, generator, device)
        return sigmas * math.sqrt(latent_frames) if self.config.scale_noise_by_frames else sigmas

    def sample_augment_sigmas(
        self, batch_size: int, generator: torch.Generator | None = None, device=None
    ) -> torch.Tensor:
        """Noise levels [B] of given frames in training, float32."""
        return self._log_normal(batch_size, self.config.augment_p_mean, self.config.augment_p_std, generator, device)

    @staticmethod
    def _log_normal(batch_size, mean, std, generator, device):
        device = torch.device(device or "cpu")
        return (mean + std * randn_tensor((batch_size,), generator=generator, device=device)).exp()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """latents + sigma * noise; sigma a number or [B]."""
        latents = _at_least_float32(latents)
        return latents + self._per_sample(sigma, latents) * noise.to(latents)

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2, which makes the untrained loss about 1 at every sigma."""
        return (sigma**2 + self.config.sigma_data**2) / (sigma * self.config.sigma_data) ** 2

    def loss(
        self,
        denoised: torch.Tensor,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        log_variance: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted squared error per sample, [B], averaged over all elements (given frames count as zero error).

        With the uncertainty head's `log_variance` u [B] it is error * exp(-u) + u, so that no noise level dominates
        (EDM2, arXiv 2312.02696, equation 21). `weights`, that broadcast to the latents, tell how much each element counts.
        """
        latents = _at_least_float32(latents)
        error = (denoised.to(latents) - latents).square()
        error = (error if weights is None else error * weights).flatten(1).mean(1)
        loss = self.loss_weight(sigma.to(latents)) * error
        return with_uncertainty(loss, log_variance)

    @staticmethod
    def _per_sample(sigma: float | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """A number or [B] -> [1 or B, 1, 1, ...] in the sample's dtype and on its device."""
        sigma = torch.as_tensor(sigma, dtype=sample.dtype, device=sample.device)
        if sigma.shape not in ((), (1,), (sample.shape[0],)):
            raise ValueError(f"sigma must be a number or [{sample.shape[0]}], got {tuple(sigma.shape)}")
        return sigma.view(-1, *[1] * (sample.ndim - 1))


def with_uncertainty(error: torch.Tensor, log_variance: torch.Tensor | None) -> torch.Tensor:
    """error * exp(-u) + u of errors and log variances u [B] (EDM2, equation 21); the error where there are none."""
    return error if log_variance is None else error * (-log_variance).exp() + log_variance


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
