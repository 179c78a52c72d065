"""Networks with views, actions or tokens: converted checkpoints of the reference reproduce its outputs and its sampling runs."""

import pytest
import torch

from cosmos_hf.conditioning.frames import FrameCondition, condition_mask
from cosmos_hf.convert import load_original
from cosmos_hf.convert.diffusion import convert_transformer_keys, original_key, transformer_config
from cosmos_hf.models.dit_layers import RotaryEmbedding3D, sincos_positions
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from golden_files import golden, golden_json, part, weights

TOLERANCE = 3e-5


def load(name, family="diffusion", **changes):
    tensors, metadata, config = golden(family, name, full=family == "diffusion", outputs=True)
    model = load_original(metadata["cls"].rsplit(".", 1)[-1], {**config, **changes}, weights(tensors))
    return model, tensors


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def evaluate(model, given, **more):
    if model.takes_condition_mask:
        more["condition_mask"] = given["condition_video_input_mask"]
    return model(
        given["x"],
        given["timesteps"],
        given["crossattn_emb"],
        fps=given["fps"],
        padding_mask=given["padding_mask"],
        **more,
    ).sample


@pytest.mark.parametrize("name", ["multiview_t2w_tiny", "multiview_v2w_tiny"])
def test_views(name):
    model, tensors = load(name)
    given = part(tensors, "inputs.common")
    for case in ("frame_repeat", "zero_frame_repeat"):
        repeat = tensors[f"inputs.{case}.frame_repeat"]
        close(evaluate(model, given, frame_repeat=repeat), tensors[f"outputs.{case}.net_output"])
    close(evaluate(model, given), tensors["outputs.zero_frame_repeat.net_output"])


def test_guided_run_of_several_views():
    """Four Euler steps, one frame given in each view, the unconditional text is zeros, the frame repeats in both branches."""
    model, tensors = load("multiview_v2w_tiny")
    given, text = part(tensors, "inputs.sample"), tensors["inputs.common.crossattn_emb"][:1]
    scheduler = CosmosEDMScheduler(sigma_min=0.0002, solver="euler")
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas.float(), tensors["outputs.sample.sigmas"], rtol=1e-5, atol=1e-7)
    condition = FrameCondition(
        given["gt_latent"],
        given["condition_video_indicator"],
        augment_sigma=0.001,
        augment_noise=given["augment_noise"],
    )
    sample = given["unit_noise"] * (80**2 + 1) ** 0.5
    options = dict(
        fps=tensors["inputs.common.fps"][:1],
        condition_mask=condition_mask(given["condition_video_indicator"], *sample.shape[-2:]),
        padding_mask=given["padding_mask"],
        frame_repeat=given["frame_repeat_raw"] / 10,
    )
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            cond, uncond = (
                scheduler.denoise(
                    lambda x, t, e=e: model(x, t, e, **options).sample, sample, scheduler.sigmas[i], condition
                )
                for e in (text, torch.zeros_like(text))
            )
            sample = scheduler.step(cond + 3 * (cond - uncond), timestep, sample).prev_sample
    close(sample, tensors["outputs.sample.fixed"], 2e-3)


@pytest.mark.parametrize("name", ["action_v2w_tiny", "action_v2w_noextrapos_tiny"])
def test_actions_as_written_and_as_intended(name):
    model, tensors = load(name)
    given = part(tensors, "inputs.main")
    close(evaluate(model, given, actions=given["action"]), tensors["outputs.main.net_output"])
    zero = torch.zeros_like(given["action"])
    close(evaluate(model, given, actions=zero), tensors["outputs.zero_action.net_output"])
    intended, _ = load(name, action_form="intended")
    out = evaluate(intended, given, actions=given["action"])
    close(out, tensors["outputs.intended.net_output"])
    assert (out - tensors["outputs.main.net_output"]).abs().max() > 1e-2
    # one action per latent frame, all equal, is one action for the clip
    close(evaluate(intended, given, actions=given["action"].expand(-1, given["x"].shape[2], -1)), out, 1e-5)


def test_tokens_of_the_diffusion_decoder():
    model, tensors = load("diffusion_decoder_tiny")
    given = part(tensors, "inputs.main")
    tokens = given["latent_condition"]
    close(evaluate(model, given, condition=tokens), tensors["outputs.main.net_output"])
    close(evaluate(model, given, condition=torch.zeros_like(tokens)), tensors["outputs.uncond.net_output"])


@pytest.fixture(scope="module")
def decoder():
    return load("diffusion_decoder_dit", family="diffusion_decoder")


def test_diffusion_decoder(decoder):
    model, tensors = decoder
    x, t, text, tokens = (tensors[name] for name in ("x", "timesteps", "crossattn_emb", "tokens"))
    with torch.no_grad():
        close(model(x, t, text, fps=24, condition=tokens).sample, tensors["out"], 1e-4)
        padding = tensors["padding_mask_nonzero"]
        close(model(x, t, text, fps=12, condition=tokens, padding_mask=padding).sample, tensors["out.fps12_pad"], 1e-4)
        nothing = model(x, t, torch.zeros_like(text), fps=24, condition=torch.zeros_like(tokens)).sample
        close(nothing, tensors["out.token0_text0"], 1e-4)


def test_guided_run_of_the_diffusion_decoder(decoder):
    model, tensors = decoder
    text, tokens = tensors["crossattn_emb"], tensors["tokens"]
    scheduler = CosmosEDMScheduler(sigma_min=0.02, solver="euler")
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas.float(), tensors["sample.sigmas"], rtol=1e-5, atol=1e-7)
    sample = tensors["sample.noise"] * (80**2 + 1) ** 0.5
    branches = ((text, tokens), (torch.zeros_like(text), torch.zeros_like(tokens)))
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            cond, uncond = (
                scheduler.denoise(
                    lambda x, t, e=e, c=c: model(x, t, e, fps=24, condition=c).sample, sample, scheduler.sigmas[i]
                )
                for e, c in branches
            )
            sample = scheduler.step(cond + 1.8 * (cond - uncond), timestep, sample).prev_sample
    close(sample, tensors["sample.out"], 1e-3)


@pytest.mark.parametrize("family, scale", [("7b", (2.0, 1.0, 1.0)), ("14b", (2.0, 2.0, 2.0)), ("dd", (1.0, 1.5, 1.5))])
@pytest.mark.parametrize("fps", [10, 24, 30])
def test_rotary_angles_of_all_published_sizes(family, scale, fps):
    tensors, _, _ = golden("diffusion", "rope_full")
    rope = RotaryEmbedding3D(128, scale)
    for axis, name in enumerate("thw"):
        expected = tensors[f"{family}.fps{fps}.{name}.fp32"]
        positions = torch.arange(len(expected), dtype=torch.float32) * (24 / fps if name == "t" else 1)
        torch.testing.assert_close(rope.angles(axis, positions), expected, atol=1e-6, rtol=2e-7)


def test_fixed_positions_of_the_published_size():
    tensors, _, _ = golden("diffusion", "rope_full")
    table = sincos_positions(4096, (8, 1, 1)), sincos_positions(4096, (1, 8, 1)), sincos_positions(4096, (1, 1, 8))
    for rows, name, start in zip(table, "thw", (0, 1368, 1368 + 1364), strict=True):
        expected = tensors[f"mv_sincos.pos_emb_{name}"]
        torch.testing.assert_close(rows[:, start : start + expected.shape[1]], expected, atol=1e-6, rtol=0)


# Classes and manifests of the published full-size networks, and the preset that equals each.
MANIFESTS = {
    "7B_Text2World": ("GeneralDIT", "7b-text2world"),
    "14B_Text2World": ("GeneralDIT", "14b-text2world"),
    "7B_Video2World": ("VideoExtendGeneralDIT", "7b-video2world"),
    "14B_Video2World": ("VideoExtendGeneralDIT", "14b-video2world"),
    "7B_Text2World_Sample_AV_Multiview": ("MultiviewGeneralDIT", "7b-text2world-multiview"),
    "7B_Video2World_Sample_AV_Multiview": ("MultiviewVideoExtendGeneralDIT", "7b-video2world-multiview"),
    "7B_Video2World_Action": ("ActionConditionalVideoExtendGeneralDIT", "7b-video2world-action"),
    "7B_Video2World_Action_as_configured": ("ActionConditionalVideoExtendGeneralDIT", None),
    "7B_DiffusionDecoder": ("DiffusionDecoderGeneralDIT", "7b-diffusion-decoder"),
    "train_text2world_multiview_7b_example": ("MultiviewGeneralDIT", None),
    "train_video2world_multiview_7b_example": ("VideoExtendMultiviewGeneralDIT", None),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_of_the_published_sizes_is_accounted_for(name):
    """On the meta device: all keys and shapes convert, and come back as they were."""
    class_name, preset = MANIFESTS[name]
    manifest = golden_json("manifests", "diffusion", name)
    config = golden_json("manifests", "diffusion", "SUMMARY")[name]["config"]
    with torch.device("meta"):
        ours = transformer_config(class_name, config)
        model = CosmosWorldTransformer3D(**ours)
        state = {key: torch.empty(shape) for key, (shape, _) in manifest.items()}
    converted = convert_transformer_keys(state, model)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == expected
    back = {f"net.{original_key(name)}" for name in expected}
    assert back == {key for key in manifest if not key.startswith("logvar.") and key != "net.pos_embedder.seq"}
    if preset is not None:
        with torch.device("meta"):
            same = CosmosWorldTransformer3D(**PRESETS[preset], action_form=ours.get("action_form", "intended"))
        configs = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (same, model)]
        assert configs[0] == configs[1]
