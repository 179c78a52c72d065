"""Preflight: a sound folder passes with its facts; every way to be unsound that it names is found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_hf import nano_path, preflight
from cosmos_hf.models.autoencoder_cosmos import PRESETS as TOKENIZERS
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.dit_conditions import add_conditions
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from cosmos_hf.pipelines.autoregressive import CosmosAutoregressivePipeline
from cosmos_hf.pipelines.preflight import PreflightError
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from tiny_pipelines import autoregressive, diffusion_decoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(video2world, tmp_path):
    video2world.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def language_folder(tmp_path):
    autoregressive(text=True).save_pretrained(tmp_path / "language")
    return tmp_path / "language"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change, name=WEIGHTS):
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def refused(folder, message, **options):
    with pytest.raises(PreflightError, match=message) as caught:
        preflight(folder, **options)
    return caught.value.problems


def test_a_sound_folder_passes_and_keeps_its_outputs(folder):
    report = preflight(folder, record=True)
    said = str(report)
    for words in (
        "transformer: CosmosWorldTransformer3D",
        "latent statistics of 16 channels",
        "9 frames of 32x48 at 5 fps",
    ):
        assert words in said
    assert report.outputs.keys() == {"text_encoder", "transformer", "vae", "scheduler"}
    assert "all outputs equal those recorded" in str(preflight(folder))
    half = preflight(folder, torch_dtype=torch.bfloat16)  # half precision is compared with its own tolerance
    assert "bfloat16" in str(half) and half.outputs["transformer"]["dtype"] == "torch.bfloat16"


def test_a_pipeline_in_memory(video2world):
    before = dict(vars(video2world.scheduler))
    assert "CosmosVideo2WorldPipeline" in str(preflight(video2world))
    assert vars(video2world.scheduler) == before
    with pytest.raises(ValueError, match="need a folder"):
        preflight(video2world, record=True)


def test_the_bundled_model_passes():
    assert "transformer: CosmosWorldTransformer3D" in str(preflight(nano_path()))


def test_autoregressive_folders(language_folder):
    report = preflight(language_folder, record=True)
    assert report.outputs.keys() == {"text_encoder", "transformer", "vae"}
    for words in ("vae: discrete, ", "transformer: CosmosARForCausalLM", "windows of "):
        assert words in str(report)
    assert "all outputs equal" in str(preflight(language_folder))
    assert "all outputs equal" in str(preflight(language_folder, torch_dtype=torch.bfloat16))
    assert preflight(language_folder / "transformer", record=True).outputs.keys() == {"transformer"}
    assert preflight(nano_path("autoregressive")).outputs
    edit_weights(
        language_folder / "transformer", lambda weights: weights["model.norm.weight"][3].zero_(), "model.safetensors"
    )
    refused(language_folder, "transformer does not compute what it did when the folder was made")


def test_a_pipeline_within_a_pipeline(language_folder):
    decoder = diffusion_decoder(code_spatial_compression=8)
    pipe = CosmosAutoregressivePipeline.from_pretrained(language_folder, diffusion_decoder=decoder)
    pipe.save_pretrained(language_folder)
    report = preflight(language_folder)
    assert "diffusion_decoder: transformer: CosmosWorldTransformer3D" in str(report)
    assert {"diffusion_decoder.transformer", "diffusion_decoder.vae"} < report.outputs.keys()
    edit_weights(
        language_folder / "diffusion_decoder/vae", lambda weights: weights["quant_conv.bias"].fill_(float("nan"))
    )
    refused(language_folder, "diffusion_decoder: vae has 1 weights with values that are not finite")


def test_the_parts_of_an_autoregressive_pipeline_must_fit(language_folder):
    pipe = CosmosAutoregressivePipeline.from_pretrained(language_folder)
    pipe.register_to_config(num_frames=8)
    refused(pipe, "the pipeline's default size is impossible")
    pipe.vae = CosmosVideoTokenizer(**TOKENIZERS["tiny"])
    refused(pipe, "vae is a continuous tokenizer; an autoregressive pipeline needs a discrete one")


def test_single_parts(folder):
    assert preflight(folder / "transformer", record=True).outputs.keys() == {"transformer"}
    assert "all outputs equal" in str(preflight(folder / "transformer"))
    assert preflight(folder / "vae").outputs.keys() == {"vae"}


def test_every_condition_has_a_probe(video2world, tmp_path):
    more = dict(
        condition_channels=4, condition_vocab_size=9, num_views=2, view_embed_dim=3, camera_channels=6, action_dim=5
    )
    add_conditions(video2world.transformer, **more).save_pretrained(tmp_path / "ids")
    add_conditions(video2world.transformer, condition_channels=2).save_pretrained(tmp_path / "channels")
    assert preflight(tmp_path / "ids").outputs and preflight(tmp_path / "channels").outputs


# ---- what is found ----------------------------------------------------------------------------------------------------


def test_folders_that_do_not_load(folder, tmp_path):
    refused(tmp_path, "neither a model_index.json .a pipeline. nor a config.json")
    refused(folder / "text_encoder", "does not load")
    edit_weights(folder / "transformer", lambda weights: weights.pop("proj_out.weight"))
    refused(folder, r"does not load: .*1 missing \['proj_out.weight'\]")
    edit(folder / "model_index.json", _class_name="CosmosOtherPipeline")
    refused(folder, "holds a CosmosOtherPipeline, what is needed here is CosmosText2WorldPipeline or")
    edit(folder / "transformer" / "config.json", _class_name="Other")
    refused(folder / "transformer", "names the class Other; there is a preflight for")


def test_damaged_weights(folder):
    edit_weights(folder / "transformer", lambda weights: weights["proj_out.weight"][0].fill_(float("nan")))
    edit_weights(folder / "vae", lambda weights: weights["quant_conv.bias"].fill_(float("inf")))
    problems = refused(folder, r"transformer has 1 weights with values that are not finite, \['proj_out.weight'\]")
    assert len(problems) == 2 and problems[1].startswith("vae has 1 weights")


def test_an_untrained_network(folder):
    CosmosWorldTransformer3D(**PRESETS["tiny-video2world"]).save_pretrained(folder / "transformer")
    refused(folder, "transformer computes the same value everywhere: it is untrained")


def test_outputs_that_changed(folder):
    preflight(folder, record=True)
    edit_weights(folder / "transformer", lambda weights: weights["patch_embed.proj.weight"][:, 3].zero_())
    refused(folder, "transformer does not compute what it did when the folder was made")


def test_settings_that_changed(folder):
    preflight(folder, record=True)
    for change in (dict(sigma_max=40.0), dict(sigma_max=80.0, grid="karras"), dict(grid=None, solver="euler")):
        edit(folder / "scheduler" / "scheduler_config.json", **change)
        refused(folder, "scheduler does not compute what it did")


def test_statistics(folder):
    edit(folder / "vae" / "config.json", latents_mean=None, latents_std=None)
    refused(folder, "vae has no latents_mean and latents_std in its config")
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 16, latents_std=[[1.0, 1.0]] * 16)
    assert refused(folder, "does not load|statistics for 2 latent frames|latents_mean")


def test_parts_that_do_not_fit(video2world, folder):
    other = CosmosWorldTransformer3D(**{**PRESETS["tiny-video2world"], "text_embed_dim": 48})
    other.proj_out.weight.data.normal_()
    other.save_pretrained(folder / "transformer")
    refused(folder, r"text_encoder is 32 wide, the transformer takes 48 .text_embed_dim.")

    def pipeline(**changes):
        settings = {name: video2world.config[name] for name in ("height", "width", "num_frames", "fps")}
        return CosmosVideo2WorldPipeline(**{**video2world.components, **settings, **changes})

    narrow = CosmosVideoTokenizer(
        **TOKENIZERS["tiny"], latent_channels=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    refused(pipeline(vae=narrow), "vae has 4 latent channels, the transformer 16")
    refused(pipeline(height=33), "default size is impossible: height must be a multiple of 16, got 33")
    refused(pipeline(height=800), r"has \(3, 100, 6\) latents .T, H, W., the transformer takes \(16, 48, 48\)")
    discrete = CosmosVideoTokenizer(**{**TOKENIZERS["tiny"], "quantizer": "fsq", "latent_channels": 6})
    refused(pipeline(vae=discrete), "vae is a discrete tokenizer")
    per_frame = CosmosVideoTokenizer(**TOKENIZERS["tiny"], latents_mean=[[0.0] * 2] * 16, latents_std=[[1.0] * 2] * 16)
    refused(pipeline(vae=per_frame), "statistics for 2 latent frames, the pipeline's num_frames=9 makes 3")
    mixed = CosmosVideoTokenizer(**TOKENIZERS["tiny"], latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    mixed.quant_conv.half()
    refused(pipeline(vae=mixed), "vae mixes torch.float16, torch.float32: load it with one torch_dtype")
    noisy = CosmosEDMScheduler(final_sigmas_type="sigma_min", solver="euler")
    assert "leaves its noise in the video" in str(preflight(pipeline(scheduler=noisy)))
