"""Folders in the layout published for diffusers: saved by diffusers' classes, loaded into ours, the same videos; and back."""

import json
import subprocess
import sys
from types import SimpleNamespace

import diffusers.models.transformers.transformer_cosmos as diffusers_transformer
import diffusers.pipelines.cosmos.pipeline_cosmos_video2world as diffusers_video2world
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLCosmos,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
)
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from cosmos_hf import preflight
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.dit_conditions import add_conditions
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.pipelines.published_layout import (
    complete_pipeline,
    export_for_diffusers,
    transformer_config_to_diffusers,
)
from cosmos_hf.pipelines.text2world import CosmosText2WorldPipeline
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler

KINDS = {
    "text": (CosmosTextToWorldPipeline, CosmosText2WorldPipeline, 16),
    "video": (CosmosVideoToWorldPipeline, CosmosVideo2WorldPipeline, 17),
}
CALL = dict(
    prompt="a robot arm", negative_prompt="bad", height=32, width=48, num_frames=17, num_inference_steps=4, fps=24
)


class NoChecks:
    """diffusers' pipelines refuse to run without a safety checker, which is not part of what is compared."""

    def to(self, device):
        return self

    def check_text_safety(self, text):
        return True

    def check_video_safety(self, frames):
        return frames


@pytest.fixture(scope="module", autouse=True)
def stand_in_for_torchvision():
    """diffusers resizes the padding mask with torchvision, nearest, which is no dependency of ours."""
    had = getattr(diffusers_transformer, "transforms", None)
    diffusers_transformer.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size, mode="nearest")),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    yield
    diffusers_transformer.transforms = had


def theirs_of(kind):
    torch.manual_seed(0)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581robot", -1.0)]
    tokenizer = T5TokenizerFast(
        vocab=vocabulary + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"], extra_ids=0
    )
    transformer = CosmosTransformer3DModel(
        in_channels=KINDS[kind][2],
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        text_embed_dim=32,
        adaln_lora_dim=16,
        max_size=(16, 48, 48),
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return KINDS[kind][0](
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(
            T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
        ).eval(),
        transformer=transformer.eval(),
        vae=AutoencoderKLCosmos(
            encoder_block_out_channels=(8, 8, 16, 16), decode_block_out_channels=(8, 16, 16, 16), num_layers=1
        ).eval(),
        scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=NoChecks(),
    )


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours from its folder, the folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = theirs_of(request.param)
    checker = theirs.safety_checker
    theirs.register_modules(safety_checker=None)
    theirs.save_pretrained(folder)
    theirs.register_modules(safety_checker=checker)
    ours = KINDS[request.param][1].from_pretrained(folder)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    return theirs, ours, folder


def inputs(pipe):
    generator = torch.Generator().manual_seed(3)
    given = dict(CALL, latents=torch.randn(1, 16, 3, 4, 6, generator=generator))
    if isinstance(pipe, CosmosVideo2WorldPipeline | CosmosVideoToWorldPipeline):
        frames = torch.randint(0, 256, (9, 3, 32, 48), generator=generator)
        if isinstance(pipe, CosmosVideoToWorldPipeline):
            given["video"] = frames.float()[None] / 255
        else:
            given |= dict(video=frames.to(torch.uint8).transpose(0, 1), num_conditioning_frames=9)
    return given


def run(pipe, monkeypatch, **arguments):
    given = inputs(pipe) | arguments
    # Their noise on the given frames is drawn anew in every step and branch; ours is the initial noise, as the reference's is.
    monkeypatch.setattr(diffusers_video2world, "randn_tensor", lambda *args, **kwargs: given["latents"])
    return pipe(**given).frames


def test_index_and_classes(pair):
    theirs, ours, folder = pair
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == type(theirs).__name__
    named = {name: index[name][1] for name in ("transformer", "vae", "scheduler", "text_encoder")}
    assert named == dict(
        transformer="CosmosTransformer3DModel",
        vae="AutoencoderKLCosmos",
        scheduler="EDMEulerScheduler",
        text_encoder="T5EncoderModel",
    )
    assert type(ours.transformer) is CosmosWorldTransformer3D and type(ours.vae) is CosmosVideoTokenizer
    assert dict(ours.scheduler.config) | dict(solver="euler", final_sigmas_type="sigma_min", sigma_min=0.002) == dict(
        ours.scheduler.config
    )
    assert len(ours.vae.config.latents_mean) == 16 and len(ours.vae.config.latents_mean[0]) == 16
    assert not ours.transformer.training and not ours.vae.training


@pytest.mark.parametrize("guidance_scale", [0, 7])
def test_the_same_draws_give_the_same_video(pair, guidance_scale, monkeypatch):
    theirs, ours, _ = pair
    given = dict(guidance_scale=guidance_scale)
    other = given | (dict(negative_prompt=None) if guidance_scale == 0 else {})
    expected = run(theirs, monkeypatch, output_type="latent", **given)
    latents = run(ours, monkeypatch, output_type="latent", **other)
    assert expected.std() > 0.1
    torch.testing.assert_close(latents, expected, atol=2e-4, rtol=1e-4)
    # their safety checker is handed 8 bits
    video, expected = (run(p, monkeypatch, output_type="pt", **g) for p, g in ((ours, other), (theirs, given)))
    assert expected.std() > 0.01
    torch.testing.assert_close(video, expected, atol=1.01 / 255 + 1e-4, rtol=0)


def test_settings_of_the_scheduler(pair, monkeypatch):
    """The same levels as theirs; and our own settings, which end clean, differ by the noise that theirs leave."""
    theirs, ours, _ = pair
    for steps in (1, 5):
        theirs.scheduler.set_timesteps(steps)
        ours.scheduler.set_timesteps(steps)
        torch.testing.assert_close(ours.scheduler.sigmas.float(), theirs.scheduler.sigmas)
        torch.testing.assert_close(ours.scheduler.timesteps, theirs.scheduler.timesteps)
    assert ours.scheduler.sigmas[-1].item() == pytest.approx(0.002)
    kept = ours.scheduler
    try:
        ours.scheduler = CosmosEDMScheduler.from_config(kept.config, final_sigmas_type="zero")
        clean = run(ours, monkeypatch, output_type="latent", guidance_scale=7)
    finally:
        ours.scheduler = kept
    noisy = run(ours, monkeypatch, output_type="latent", guidance_scale=7)
    assert 0 < (clean - noisy).abs().max() < 0.05
    with pytest.raises(ValueError, match="prediction_type='v_prediction' is not supported, only 'epsilon'"):
        CosmosEDMScheduler.from_config({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="setting surprise=1"):
        CosmosEDMScheduler.from_config({"_class_name": "EDMEulerScheduler", "surprise": 1})
    with pytest.raises(ValueError, match="final_sigmas_type must be"):
        CosmosEDMScheduler(final_sigmas_type="none")


def test_options_of_loading_reach_the_parts(pair):
    _, ours, folder = pair
    half = type(ours).from_pretrained(folder, torch_dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert half.transformer.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert half.transformer.learnable_pos_embed.pos_emb_t.dtype == torch.float32
    shared = type(ours).from_pretrained(folder, transformer=ours.transformer, height=64)
    assert shared.transformer is ours.transformer and shared.config.height == 64


def test_a_named_safety_checker_is_left_out(pair, tmp_path):
    _, ours, folder = pair
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    index = json.loads((folder / "model_index.json").read_text()) | {
        "safety_checker": ["cosmos_guardrail", "CosmosSafetyChecker"]
    }
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    again = type(ours).from_pretrained(tmp_path)
    assert "safety_checker" not in again.components
    index["vae"] = ["diffusers", "AutoencoderKLWan"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="names AutoencoderKLWan as vae; the Cosmos-1 pipelines read diffusers' AutoencoderKLCosmos"
    ):
        type(ours).from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused(pair, tmp_path):
    _, ours, folder = pair
    for file in folder.iterdir():
        if file.name != "transformer":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text((folder / "transformer" / "config.json").read_text())
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    weights.pop("proj_out.weight")
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \['proj_out.weight'\]"):
        type(ours).from_pretrained(tmp_path)


# ---- the way back -----------------------------------------------------------------------------------------------------


def test_back_to_diffusers_bit_for_bit(pair, tmp_path, monkeypatch):
    """Theirs -> ours -> our layout -> ours -> their layout -> theirs: every tensor and config entry is what it was."""
    theirs, ours, folder = pair
    ours.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["transformer"][1] == "CosmosWorldTransformer3D"
    export_for_diffusers(tmp_path / "ours", tmp_path / "theirs")
    back = type(theirs).from_pretrained(tmp_path / "theirs", safety_checker=NoChecks())
    for name in ("transformer", "vae", "text_encoder"):
        before, after = (getattr(pipe, name).state_dict() for pipe in (theirs, back))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
    for name in ("transformer", "vae"):
        configs = [
            {k: v for k, v in json.loads((place / name / "config.json").read_text()).items() if not k.startswith("_")}
            for place in (folder, tmp_path / "theirs")
        ]
        assert configs[0] == configs[1], name
    assert {
        k: back.scheduler.config[k] for k in ("sigma_min", "sigma_max", "sigma_data", "rho", "final_sigmas_type")
    } == dict(sigma_min=0.002, sigma_max=80, sigma_data=0.5, rho=7.0, final_sigmas_type="sigma_min")
    index, original = (json.loads((place / "model_index.json").read_text()) for place in (tmp_path / "theirs", folder))
    assert index == {key: value for key, value in original.items() if key != "_name_or_path"}


def test_precision_is_kept_on_the_way_back(pair, tmp_path):
    _, _, folder = pair
    half = CosmosWorldTransformer3D.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    for file in folder.iterdir():
        if file.name != "transformer":
            (tmp_path / file.name).symlink_to(file)
    half.save_pretrained(tmp_path / "transformer")
    export_for_diffusers(tmp_path, tmp_path / "theirs")
    before, after = (
        load_file(p / "transformer" / "diffusion_pytorch_model.safetensors") for p in (tmp_path, tmp_path / "theirs")
    )
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_other_parts_are_taken_from_a_base(pair, tmp_path):
    _, ours, folder = pair
    ours.transformer.save_pretrained(tmp_path / "transformer")
    complete_pipeline(folder, tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    settings = [{k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")} for pipe in (again, ours)]
    assert settings[0] == settings[1]
    assert all(torch.equal(v, again.vae.state_dict()[k]) for k, v in ours.vae.state_dict().items())
    with pytest.raises(ValueError, match="is no pipeline's folder: it has no model_index.json"):
        complete_pipeline(tmp_path / "transformer", tmp_path)


def test_preflight_of_a_published_folder(pair):
    _, _, folder = pair
    said = str(preflight(folder))
    assert (
        "leaves its noise in the video" in said
        and "the folder has no settings of its own, give a size in calls" in said
    )


def test_what_diffusers_lacks_is_refused(pair):
    _, ours, _ = pair
    with pytest.raises(ValueError, match="has no action_dim .this model: 7.: it cannot hold this model"):
        transformer_config_to_diffusers(add_conditions(ours.transformer, action_dim=7).config)
    views = dict(ours.transformer.config, extra_pos_embed_type="sincos")
    with pytest.raises(ValueError, match="has no extra_pos_embed_type='sincos'"):
        transformer_config_to_diffusers(views)


def test_a_new_process_reads_the_published_layout(pair):
    """Nothing that this test session imported is needed."""
    _, ours, folder = pair
    if not isinstance(ours, CosmosVideo2WorldPipeline):
        pytest.skip("once is enough")
    code = (
        "import sys; from cosmos_hf import CosmosVideo2WorldPipeline as P; p = P.from_pretrained(sys.argv[1]);"
        "assert type(p.vae).__name__ == 'CosmosVideoTokenizer' and p.scheduler.config.solver == 'euler'"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
