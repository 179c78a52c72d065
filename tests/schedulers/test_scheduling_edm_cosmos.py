"""The EDM scheduler: solvers against the reference on closed-form denoisers, training noise, errors. Networks: tests/convert."""

import pytest
import torch
from diffusers import EDMEulerScheduler

from cosmos_hf.conditioning.frames import FrameCondition, condition_indicator
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from golden_files import golden, part


def toy_denoisers(tensors):
    """Exact denoisers of a Gaussian and of a mixture of three (formulas in the fixture's metadata)."""
    lin, gm = part(tensors, "toy.lin"), part(tensors, "toy.gm")

    def linear(x, sigma):
        mu, var = lin["mu"].to(x), lin["var"].to(x)
        return mu + var / (var + sigma**2) * (x - mu)

    def mixture(x, sigma):
        mu, var, weight = gm["mu"].to(x), gm["std"].to(x) ** 2, gm["weight"].to(x)
        total = var + sigma**2  # [3]
        difference = x[:, None] - mu  # [B, 3, 8]
        log_density = weight.log() - 0.5 * (difference.square().sum(-1) / total + x.shape[-1] * total.log())
        share = log_density.softmax(-1)[..., None]
        return (share * (var[:, None] * x[:, None] + sigma**2 * mu) / total[:, None]).sum(1)

    return {"lin": linear, "gm": mixture}


def sample(scheduler, denoise, x):
    trajectory = [x]
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(denoise(x, scheduler.sigmas[i].to(x.dtype)), timestep, x).prev_sample
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize("toy", ["lin", "gm"])
@pytest.mark.parametrize("steps", [5, 10, 35])
def test_res_2ab_is_the_reference(toy, steps):
    tensors, _, _ = golden("diffusion", "sampler_toy")
    denoise, scheduler = toy_denoisers(tensors)[toy], CosmosEDMScheduler(solver="res_2ab")
    expected = part(tensors, f"outputs.2ab.{toy}.N{steps}")
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps + 1 and scheduler.sigmas[-1] == 0
    torch.testing.assert_close(scheduler.sigmas[:-1], expected["sigmas"], atol=1e-12, rtol=1e-12)
    *trajectory, final = sample(scheduler, denoise, scheduler.init_noise_sigma * tensors["inputs.unit_noise"])
    torch.testing.assert_close(torch.stack(trajectory), expected["traj_x"], atol=1e-10, rtol=0)
    torch.testing.assert_close(final, expected["final_f64"], atol=1e-10, rtol=0)

    scheduler.set_timesteps(steps)
    single = sample(scheduler, denoise, scheduler.init_noise_sigma * tensors["inputs.unit_noise"].float())[-1]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected["final_f32"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("toy", ["lin", "gm"])
def test_euler_is_the_reference(toy):
    tensors, _, _ = golden("diffusion", "sampler_toy")
    denoise, noise = toy_denoisers(tensors)[toy], tensors["inputs.unit_noise"]
    # the reference's "1euler" of N steps has a clean evaluation behind it: N + 1 of ours
    scheduler = CosmosEDMScheduler()
    scheduler.set_timesteps(11, solver="euler")
    final = sample(scheduler, denoise, 80 * noise)[-1]
    torch.testing.assert_close(final, tensors[f"outputs.1euler.{toy}.N10.final_f64"], atol=1e-10, rtol=0)
    for steps in (5, 10, 35):
        # predict1: down to 0.0002, then 0, from noise of variance 80^2 + 1
        scheduler = CosmosEDMScheduler(sigma_min=0.0002, solver="euler")
        scheduler.set_timesteps(steps)
        expected = part(tensors, f"outputs.edm_euler_predict1.{toy}.N{steps}")
        torch.testing.assert_close(scheduler.sigmas.float(), expected["sigmas"], atol=1e-7, rtol=2e-6)
        final = sample(scheduler, denoise, noise.float() * (80**2 + 1) ** 0.5)[-1]
        torch.testing.assert_close(final, expected["final"], atol=1e-4, rtol=0)
        # the published diffusers pipelines stop at sigma_min: their last step has no length
        scheduler = CosmosEDMScheduler(solver="euler")
        scheduler.set_timesteps(steps)
        at_sigma_min = sample(scheduler, denoise, 80 * noise.float())[-2]
        expected = tensors[f"outputs.edm_euler_hub.{toy}.N{steps}.final"]
        torch.testing.assert_close(at_sigma_min, expected, atol=1e-4, rtol=0)


def test_res_2ab_converges_faster_than_euler():
    """On the Gaussian, whose probability flow has a closed form."""
    tensors, _, _ = golden("diffusion", "sampler_toy")
    mu, var = tensors["toy.lin.mu"], tensors["toy.lin.var"]
    start = 80 * tensors["inputs.unit_noise"]
    exact = mu + (var / (var + 80**2)).sqrt() * (start - mu)
    errors = {}
    for solver, steps in (("res_2ab", 35), ("euler", 36)):  # the same number of evaluations
        scheduler = CosmosEDMScheduler(solver=solver)
        scheduler.set_timesteps(steps)
        final = sample(scheduler, toy_denoisers(tensors)["lin"], start)[-1]
        errors[solver] = (final - exact).square().mean().sqrt()
    assert errors["res_2ab"] < 0.3 * errors["euler"] and errors["res_2ab"] < 0.01


def error(toy, solver, grid, evaluations, tensors):
    """Distance (rms) to the exact solution of a toy problem, sampled with so many evaluations."""
    scheduler = CosmosEDMScheduler(solver=solver, grid=grid)
    scheduler.set_timesteps(evaluations - (solver == "res_2ab"))
    assert len(scheduler.timesteps) == evaluations
    final = sample(scheduler, toy_denoisers(tensors)[toy], 80 * tensors["inputs.unit_noise"])[-1]
    return (final - tensors[f"outputs.exact.{toy}"]).square().mean().sqrt().item()


@pytest.mark.parametrize("toy", ["lin", "gm"])
def test_unipc_on_the_angle_grid_needs_few_steps(toy):
    """At every number of evaluations closer to the exact solution than both published ways, at few by far."""
    tensors, _, _ = golden("diffusion", "sampler_toy")
    for evaluations, factor in ((5, 0.5), (10, 0.2), (18, 0.2), (36, 0.5)):
        ours = error(toy, "unipc", "angle", evaluations, tensors)
        for solver in ("res_2ab", "euler"):
            assert ours < factor * error(toy, solver, "karras", evaluations, tensors), (evaluations, solver)


@pytest.mark.parametrize(
    ("solver", "grid", "order"), [("euler", "angle", 1), ("res_2ab", "karras", 2), ("unipc", "karras", 3)]
)
def test_order_of_convergence(solver, grid, order):
    """Twice the steps divide the error by 2^order or more, on the Gaussian."""
    tensors, _, _ = golden("diffusion", "sampler_toy")
    coarse, fine = (error("lin", solver, grid, n, tensors) for n in (80, 160))
    assert coarse / fine > 2**order * 0.75, coarse / fine


def test_angle_grid_has_equal_steps_along_the_circle():
    scheduler = CosmosEDMScheduler(sigma_max=40.0, sigma_data=1.0, grid="angle", solver="unipc")
    scheduler.set_timesteps(7)
    angles = torch.atan(scheduler.sigmas ** (1 / 1.5))
    torch.testing.assert_close(scheduler.sigmas[0], torch.tensor(40.0, dtype=torch.float64))
    torch.testing.assert_close(angles.diff(), angles.diff()[:1].expand(7))


def test_a_change_of_the_sample_between_steps_is_kept_by_the_correction():
    """Shifting the sample by something that the denoiser does not see shifts every later sample by it, scaled."""
    runs = []
    for shift in (0.0, 1.0):
        scheduler = CosmosEDMScheduler()
        scheduler.set_timesteps(6)
        x = torch.ones(1, dtype=torch.float64) * 80
        for i, timestep in enumerate(scheduler.timesteps[:4]):
            x = scheduler.step(torch.tensor([0.3 * i], dtype=torch.float64), timestep, x).prev_sample
            x = x + shift * (i == 1)
        runs.append(x)
    torch.testing.assert_close(runs[1] - runs[0], scheduler.sigmas[4:5] / scheduler.sigmas[2:3])


@pytest.mark.parametrize("grid", ["karras", "angle"])
@pytest.mark.parametrize("solver", ["res_2ab", "euler", "unipc"])
def test_one_step_is_enough_to_end_clean(solver, grid):
    scheduler = CosmosEDMScheduler(solver=solver, grid=grid)
    scheduler.set_timesteps(1)
    final = sample(scheduler, lambda x, sigma: torch.full_like(x, 0.25), torch.randn(1, 16, 2, 4, 4) * 80)[-1]
    torch.testing.assert_close(final, torch.full_like(final, 0.25))


def test_half_precision_states_are_kept_in_float32():
    scheduler = CosmosEDMScheduler()
    scheduler.set_timesteps(2)
    x = torch.randn(1, 16, 2, 4, 4).bfloat16()
    denoised = scheduler.denoise(lambda x, t: x.bfloat16(), x, scheduler.sigmas[0])
    assert denoised.dtype == scheduler.step(denoised, scheduler.timesteps[0], x).prev_sample.dtype == torch.float32


def test_denoise_scales_what_the_network_sees_to_unit_variance():
    scheduler = CosmosEDMScheduler()
    sigma = torch.tensor([0.01, 0.5, 80.0])
    latents, noise = 0.5 * torch.randn(3, 16, 4, 16, 16), torch.randn(3, 16, 4, 16, 16)
    seen = {}

    def network(x, timestep):
        seen.update(x=x, timestep=timestep)
        return torch.zeros_like(x)

    noisy = scheduler.add_noise(latents, noise, sigma)
    denoised = scheduler.denoise(network, noisy, sigma)
    torch.testing.assert_close(seen["x"].flatten(1).std(1), torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(seen["timestep"], sigma.log() / 4)
    # with no network the estimate is the best linear one, and its weighted error is 1 at every noise level
    torch.testing.assert_close(scheduler.loss(denoised, latents, sigma), torch.ones(3), atol=0.05, rtol=0)


def test_given_frames_per_sample():
    """Every sample may have its own number of given frames; the rest of the sample is untouched."""
    scheduler = CosmosEDMScheduler()
    clean, noise, x = torch.randn(3, 2, 16, 4, 2, 2).unbind()
    condition = FrameCondition(clean, condition_indicator(4, torch.tensor([0, 3])), 0.001, noise)
    seen = []
    denoised = scheduler.denoise(lambda x, t: seen.append(x) or torch.zeros_like(x), x, 2.0, condition)
    plain = scheduler.denoise(lambda x, t: torch.zeros_like(x), x, 2.0)
    assert torch.equal(denoised[0], plain[0]) and torch.equal(denoised[1, :, 3], plain[1, :, 3])
    assert torch.equal(denoised[1, :, :3], clean[1, :, :3])
    torch.testing.assert_close(seen[0][1, :, :3], (clean + 0.001 * noise)[1, :, :3] / (0.001**2 + 0.25) ** 0.5)


def test_training_noise():
    draw = lambda scheduler, *args: scheduler.sample_training_sigmas(  # noqa: E731
        20000, *args, generator=torch.Generator().manual_seed(0)
    )
    plain = draw(CosmosEDMScheduler(p_mean=0.3, p_std=1.5), 9)
    assert plain.shape == (20000,) and plain.dtype == torch.float32
    assert abs(plain.log().mean() - 0.3) < 0.05 and abs(plain.log().std() - 1.5) < 0.05
    scaled = draw(CosmosEDMScheduler(p_mean=0.3, p_std=1.5, scale_noise_by_frames=True), 9)
    torch.testing.assert_close(scaled, 3 * plain)
    augment = CosmosEDMScheduler().sample_augment_sigmas(20000, torch.Generator().manual_seed(0))
    assert abs(augment.log().mean() + 3) < 0.05 and abs(augment.log().std() - 2) < 0.05


def test_misuse_is_refused():
    scheduler = CosmosEDMScheduler()
    x = torch.zeros(2, 16, 1, 2, 2)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 0.0, x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="step 0 of 3 was called with timestep"):
        scheduler.step(x, scheduler.timesteps[1], x)
    with pytest.raises(ValueError, match="must be at least 1"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="solver must be one of unipc, res_2ab, euler"):
        scheduler.set_timesteps(3, solver="heun")
    with pytest.raises(ValueError, match="solver must be one of"):
        CosmosEDMScheduler(solver="2ab")
    with pytest.raises(ValueError, match="grid must be one of karras, angle"):
        CosmosEDMScheduler(grid="linear")
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        CosmosEDMScheduler(sigma_min=80.0)
    with pytest.raises(ValueError, match=r"sigma must be a number or \[2\]"):
        scheduler.add_noise(x, x, torch.ones(3))


def test_saved_config_comes_back_and_a_published_one_is_understood(tmp_path):
    CosmosEDMScheduler(sigma_max=40.0, solver="euler", p_mean=-1.0).save_pretrained(tmp_path / "ours")
    config = CosmosEDMScheduler.from_pretrained(tmp_path / "ours").config
    assert (config.sigma_max, config.solver, config.p_mean) == (40.0, "euler", -1.0)
    published = EDMEulerScheduler(sigma_max=70.0, sigma_min=0.003, sigma_data=0.6, final_sigmas_type="sigma_min")
    published.save_pretrained(tmp_path / "published")
    config = CosmosEDMScheduler.from_pretrained(tmp_path / "published").config
    assert (config.sigma_max, config.sigma_min, config.sigma_data) == (70.0, 0.003, 0.6)
