"""Converted checkpoints of the reference reproduce its outputs: network, denoiser, sampling runs, training loss, gradients."""

import pytest
import torch

from cosmos_hf.conditioning.frames import FrameCondition, condition_indicator, condition_mask
from cosmos_hf.convert import load_original
from cosmos_hf.convert.diffusion import load_original_uncertainty, transformer_config
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from golden_files import golden, part, weights

FILES = {"t2w": ("t2w_7b_tiny", "GeneralDIT"), "v2w": ("v2w_7b_tiny", "VideoExtendGeneralDIT")}


def load(kind, **changes):
    name, class_name = FILES[kind]
    tensors, _, config = golden("diffusion", name, outputs=True)
    return load_original(class_name, {**config, **changes}, weights(tensors)), tensors


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def v2w():
    return load("v2w")


# ---- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["main", "scalar_t", "image", "rope222"])
def test_text2world_network(case):
    changes = dict.fromkeys([f"rope_{axis}_extrapolation_ratio" for axis in "hwt"], 2.0) if case == "rope222" else {}
    model, tensors = load("t2w", **changes)
    given = part(tensors, "inputs.main" if case == "rope222" else f"inputs.{case}")
    with torch.no_grad():
        out = model(
            given["x"],
            given["timesteps"],
            given["crossattn_emb"],
            fps=given.get("fps"),
            padding_mask=given["padding_mask"],
        ).sample
    close(out, tensors[f"outputs.{case}.net_output"], 3e-5)


def test_video2world_network_and_its_uncertainty(v2w):
    model, tensors = v2w
    given = part(tensors, "inputs.main")
    with torch.no_grad():
        out = model(
            given["x"],
            given["timesteps"],
            given["crossattn_emb"],
            fps=given["fps"],
            condition_mask=given["condition_video_input_mask"],
            padding_mask=given["padding_mask"],
        ).sample
        log_variance = load_original_uncertainty(weights(tensors))(given["timesteps"])
    close(out, tensors["outputs.main.net_output"], 3e-5)
    close(log_variance, tensors["outputs.main.logvar"][:, 0], 1e-6)


# ---- the denoiser and whole runs ------------------------------------------------------------------------------------------


def network_of(model, given, text="crossattn_emb"):
    def network(latents, timestep):
        return model(
            latents,
            timestep,
            given[text],
            fps=given["fps"],
            condition_mask=condition_mask(given["condition_video_indicator"], *latents.shape[-2:]),
            padding_mask=given["padding_mask"],
        ).sample

    return network


def frame_condition(tensors, augment_noise):
    given = part(tensors, "inputs.model")
    indicator = condition_indicator(given["gt_latent"].shape[2], 2)
    assert torch.equal(indicator, given["condition_video_indicator"])
    return FrameCondition(given["gt_latent"], indicator, augment_sigma=0.001, augment_noise=augment_noise)


@pytest.mark.parametrize("case", ["s5", "s0p0008"])
def test_denoiser_with_given_frames(v2w, case):
    """At sigma 0.0008 the given frames carry more noise than the sample: they are denoised like the rest."""
    model, tensors = v2w
    scheduler, given, expected = (
        CosmosEDMScheduler(),
        part(tensors, "inputs.model"),
        part(tensors, f"outputs.denoise_{case}"),
    )
    x, sigma = (tensors[f"inputs.denoise_{case}.{name}"] for name in ("noise_x", "sigma"))
    condition = frame_condition(tensors, given["augment_noise"])
    seen = []

    def recorded(latents, timestep):
        seen.append(latents)
        return network_of(model, given)(latents, timestep)

    with torch.no_grad():
        x0 = scheduler.denoise(recorded, x, sigma, condition)
        uncond = scheduler.denoise(network_of(model, given, "neg_crossattn_emb"), x, sigma, condition)
    for name, value in zip(("c_skip", "c_out", "c_in", "c_noise"), scheduler.preconditioning(sigma), strict=True):
        torch.testing.assert_close(value, expected[name], atol=0, rtol=1e-6)
    close(seen[0], expected["net_in"], 2e-5)
    close(x0, expected["x0_pred_replaced"], 3e-5)
    close(uncond, expected["uncond_x0_pred_replaced"], 3e-5)
    close(x0 + 7 * (x0 - uncond), expected["guided_x0"], 2e-4)
    log_variance = load_original_uncertainty(weights(tensors))(expected["c_noise"])
    close(log_variance, expected["logvar"][:, 0], 1e-6)

    # predict1 guides the network's output instead, with a slip that the fixture holds next to the intended value
    guided = tensors[f"outputs.predict1_{case}.net_guided"]
    fixed = scheduler.denoise(lambda *_: guided, x, sigma, condition)
    close(fixed, tensors[f"outputs.predict1_{case}.x0_fixed"], 3e-5)


def run(v2w, scheduler, sample, augment_noise):
    model, tensors = v2w
    given, condition = part(tensors, "inputs.model"), frame_condition(tensors, augment_noise)
    networks = [network_of(model, given, text) for text in ("crossattn_emb", "neg_crossattn_emb")]
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            cond, uncond = (scheduler.denoise(net, sample, scheduler.sigmas[i], condition) for net in networks)
            sample = scheduler.step(cond + 7 * (cond - uncond), timestep, sample).prev_sample
    return sample


def test_guided_run_of_the_released_sampler(v2w):
    scheduler, noise = CosmosEDMScheduler(solver="res_2ab"), v2w[1]["inputs.sample_res2ab.unit_noise"]
    scheduler.set_timesteps(6)
    sample = run(v2w, scheduler, scheduler.init_noise_sigma * noise.double(), v2w[1]["inputs.model.augment_noise"])
    close(sample.float(), v2w[1]["outputs.sample_res2ab.final"], 2e-3)


def test_guided_run_of_predict1(v2w):
    scheduler, noise = (
        CosmosEDMScheduler(sigma_min=0.0002, solver="euler"),
        v2w[1]["inputs.sample_predict1.unit_noise"],
    )
    scheduler.set_timesteps(6)
    torch.testing.assert_close(
        scheduler.sigmas.float(), v2w[1]["outputs.sample_predict1.sigmas"].float(), rtol=1e-5, atol=1e-7
    )
    sample = run(v2w, scheduler, noise * (80**2 + 1) ** 0.5, v2w[1]["inputs.model.augment_noise"])
    close(sample, v2w[1]["outputs.sample_predict1.fixed"], 2e-3)


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t2w", "v2w"])
def test_training_loss_and_gradients(kind):
    model, tensors = load(kind)
    head = load_original_uncertainty(weights(tensors))
    fixture, _, _ = golden("diffusion", "train_loss_tiny")
    given, expected = part(fixture, f"inputs.{kind}"), part(fixture, f"outputs.{kind}")
    scheduler, sigma, extra, condition = CosmosEDMScheduler(), given["sigma"], {}, None
    if kind == "v2w":
        extra = {"condition_mask": given["condition_video_input_mask"]}
        condition = FrameCondition(
            given["x0"],
            given["condition_video_indicator"],
            given["augment_sigma"],
            given["augment_noise"],
            release=False,
        )
    noisy = scheduler.add_noise(given["x0"], given["epsilon"], sigma)
    denoised = scheduler.denoise(
        lambda latents, timestep: (
            model(
                latents,
                timestep,
                given["crossattn_emb"],
                fps=given["fps"],
                padding_mask=given["padding_mask"],
                **extra,
            ).sample
        ),
        noisy,
        sigma,
        condition,
    )
    log_variance = head(scheduler.preconditioning(sigma)[3])
    loss = scheduler.loss(denoised, given["x0"], sigma, log_variance)
    loss.mean().backward()

    close(denoised, expected["x0_pred"], 3e-5)
    torch.testing.assert_close(scheduler.loss_weight(sigma), expected["weights_per_sigma"])
    close(log_variance, expected["logvar"][:, 0], 1e-6)
    torch.testing.assert_close(loss, expected["kendall_per_sample_mean"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.mean(), expected["kendall_mean"], rtol=1e-5, atol=1e-5)
    gradients = {key: find(model, head, name) for key, name in OURS.items()}
    for key, gradient in part(fixture, f"grads.{kind}").items():
        close(gradients[key], gradient, 2e-4)
    norm = torch.stack([p.grad.norm() for p in [*model.parameters(), *head.parameters()]]).norm()
    torch.testing.assert_close(norm, expected["total_grad_norm"], rtol=1e-4, atol=1e-4)


OURS = {
    "logvar.1.weight": "linear.weight",
    "net.affline_norm.weight": "time_embed.norm.weight",
    "net.blocks.block0.blocks.0.adaLN_modulation.1.weight": "transformer_blocks.0.norm1.linear_1.weight",
    "net.blocks.block0.blocks.0.block.attn.to_q.1.weight": "transformer_blocks.0.attn1.norm_q.weight",
    "net.blocks.block1.blocks.1.block.attn.to_k.0.weight": "transformer_blocks.1.attn2.to_k.weight",
    "net.extra_pos_embedder.pos_emb_t": "learnable_pos_embed.pos_emb_t",
    "net.final_layer.linear.weight": "proj_out.weight",
    "net.t_embedder.1.linear_1.weight": "time_embed.t_embedder.linear_1.weight",
    "net.x_embedder.proj.1.weight": "patch_embed.proj.weight",
}


def find(model, head, name):
    return (head if name == "linear.weight" else model).get_parameter(name).grad


# ---- what the converter refuses ------------------------------------------------------------------------------------------


def test_prefix_and_bookkeeping_entries_do_not_matter(v2w):
    tensors, _, config = golden("diffusion", "v2w_7b_tiny")
    bare = {key.removeprefix("net."): value for key, value in weights(tensors).items() if key.startswith("net.")}
    bare["blocks.block0.blocks.0.block.attn._extra_state"] = torch.zeros(0)
    model = load_original("VideoExtendGeneralDIT", config, bare)
    assert all(torch.equal(value, v2w[0].state_dict()[key]) for key, value in model.state_dict().items())
    assert not model.training and model.dtype == torch.float32


def test_wrong_checkpoints_are_refused():
    tensors, _, config = golden("diffusion", "t2w_7b_tiny")
    state = weights(tensors)
    name = "net.final_layer.linear.weight"

    def refused(message, state=state, class_name="GeneralDIT", **changes):
        with pytest.raises(ValueError, match=message):
            load_original(class_name, {**config, **changes}, state)

    refused(r"unknown keys \['net.stray'\]", state={**state, "net.stray": torch.zeros(1)})
    refused(r"unknown keys \['logvar.2.bias'\]", state={**state, "logvar.2.bias": torch.zeros(1)})
    refused(r"missing \(our names\) \['proj_out.weight'\]", state={k: v for k, v in state.items() if k != name})
    refused(r"has shape \(64, 127\), the config wants \(64, 128\)", state={**state, name: state[name][:, 1:]})
    refused("expected 0, 1, 2", state={**state, "net.pos_embedder.seq": torch.ones(16)})
    refused("use_cross_attn_mask=True is not supported", use_cross_attn_mask=True)
    refused("n_views=6 is not known", n_views=6)
    refused("extra_per_block_abs_pos_emb_type='sincos'", extra_per_block_abs_pos_emb_type="sincos")
    refused("one more channel in than out", class_name="VideoExtendGeneralDIT")
    refused("no converter for the class 'Dit'", class_name="Dit")
    with pytest.raises(ValueError, match="does not apply to GeneralDIT"):
        load_original("GeneralDIT", config, state, training_type="text_to_video")
    with pytest.raises(ValueError, match="argument model_channels is missing"):
        transformer_config("GeneralDIT", {key: value for key, value in config.items() if key != "model_channels"})
    with pytest.raises(ValueError, match="logvar needs the entries"):
        load_original_uncertainty({"logvar.0.freqs": torch.zeros(4)})
