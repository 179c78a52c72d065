"""The diffusion transformer: parity with diffusers, inputs that are refused, saving, gradients. Reference: tests/convert."""

import subprocess
import sys

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from cosmos_hf.models.dit_layers import RotaryEmbedding3D
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from golden_files import golden, golden_json

# (keys, parameters) of the published models' networks, from the reference built with its released configs
PUBLISHED = {
    "7b-text2world": ("diffusers_7B_Text2World", 570, 7236192256),
    "7b-video2world": ("diffusers_7B_Video2World", 570, 7236208640),
    "14b-text2world": ("diffusers_14B_Text2World", 730, 14267149312),
    "14b-video2world": ("diffusers_14B_Video2World", 730, 14267169792),
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that leave no path at zero, as a fresh model does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def inputs(batch=2, frames=3, height=8, width=12, mask=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    given = {"condition_mask": torch.zeros(batch, 1, frames, height, width)} if mask else {}
    if mask:
        given["condition_mask"][:, :, 0] = 1
    return dict(
        hidden_states=draw(batch, 16, frames, height, width),
        timestep=torch.linspace(-0.5, 0.4, batch),
        encoder_hidden_states=draw(batch, 5, 32),
        fps=10,
        padding_mask=(torch.rand(1, 1, 16, 24, generator=generator) > 0.5).float(),
        **given,
    )


@pytest.fixture(scope="module")
def model():
    return randomized(CosmosWorldTransformer3D(**PRESETS["tiny-video2world"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    file, keys, parameters = PUBLISHED[name]
    with torch.device("meta"):
        state = CosmosWorldTransformer3D(**PRESETS[name]).state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (keys, parameters)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_keys_and_shapes(name):
    manifest = golden_json("manifests", "diffusion", PUBLISHED[name][0])
    with torch.device("meta"):
        state = CosmosWorldTransformer3D(**PRESETS[name]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {k: shape for k, (shape, _) in manifest.items()}


@pytest.mark.parametrize("extra", ["learnable", None])
def test_agrees_with_diffusers(extra):
    """The same weights in diffusers' class, loaded strictly, give the same output."""
    config = {**PRESETS["tiny-video2world"], "extra_pos_embed_type": extra, "rope_scale": (2.0, 1.5, 1.5)}
    ours = randomized(CosmosWorldTransformer3D(**config))
    # diffusers resizes the padding mask with torchvision, which is no dependency of ours: given as one more channel
    theirs = CosmosTransformer3DModel(**{**config, "in_channels": 18, "concat_padding_mask": False}).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    given = inputs()
    given["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    resized = given["padding_mask"][..., ::2, ::2]
    channels = torch.cat(
        [given["hidden_states"], given["condition_mask"], resized[:, :, None].expand(2, -1, 3, -1, -1)], 1
    )
    with torch.no_grad():
        expected = theirs(
            channels,
            given["timestep"],
            given["encoder_hidden_states"],
            attention_mask=given["attention_mask"].bool(),
            fps=10,
        ).sample
        out = ours(**given).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["7b", "14b"])
@pytest.mark.parametrize("fps", [24, 30])
def test_rotary_angles_of_the_published_sizes(family, fps):
    tensors, _, _ = golden("diffusion", "rope_full")
    rope = RotaryEmbedding3D(128, {"7b": (2.0, 1.0, 1.0), "14b": (2.0, 2.0, 2.0)}[family])
    for axis, name in enumerate("thw"):
        expected = tensors[f"{family}.fps{fps}.{name}.fp32"]
        positions = torch.arange(len(expected), dtype=torch.float32) * (24 / fps if name == "t" else 1)
        torch.testing.assert_close(rope.angles(axis, positions), expected, atol=1e-6, rtol=2e-7)


def test_attention_mask_really_masks_and_none_attends_everywhere(model):
    given = inputs()
    with torch.no_grad():
        plain = model(**given).sample
        torch.testing.assert_close(model(**given, attention_mask=torch.ones(2, 5)).sample, plain)
        masked = model(**given, attention_mask=torch.tensor([[1, 1, 0, 0, 0]])).sample
        given["encoder_hidden_states"][:, 2:] += 1
        torch.testing.assert_close(model(**given, attention_mask=torch.tensor([[1, 1, 0, 0, 0]])).sample, masked)
    assert (masked - plain).abs().max() > 1e-3


def test_every_condition_reaches_the_output(model):
    given = inputs()
    with torch.no_grad():
        plain = model(**given).sample
        for name, other in dict(
            fps=24, timestep=torch.tensor([0.1, -0.3]), condition_mask=torch.zeros(1, 1, 3, 8, 12), padding_mask=None
        ).items():
            assert (model(**{**given, name: other}).sample - plain).abs().max() > 1e-3, name
        torch.testing.assert_close(model(**{**given, "fps": [10, 10.0]}).sample, plain)
        torch.testing.assert_close(model(**{**given, "fps": None}).sample, model(**{**given, "fps": 24}).sample)


def test_samples_of_a_batch_do_not_mix(model):
    given = inputs()
    with torch.no_grad():
        both = model(**given).sample
        one = model(**{k: v[1:] if torch.is_tensor(v) and len(v) == 2 else v for k, v in given.items()}).sample
    torch.testing.assert_close(both[1:], one, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden_states=torch.zeros(2, 17, 3, 8, 12)), r"hidden_states must be \[B, 16, T, H, W\]"),
        (dict(hidden_states=torch.zeros(2, 16, 3, 8, 11)), "latent width must be a positive multiple of 2"),
        (dict(hidden_states=torch.zeros(2, 16, 17, 8, 12)), "latent frames must be at most 16 .max_size"),
        (dict(hidden_states=torch.zeros(2, 16, 3, 50, 12)), "latent height must be at most 48"),
        (dict(encoder_hidden_states=torch.zeros(2, 5, 31)), r"encoder_hidden_states must be \[2, any, 32\]"),
        (dict(encoder_hidden_states=torch.zeros(1, 5, 32)), "encoder_hidden_states must be"),
        (dict(condition_mask=None), "condition_mask is missing"),
        (dict(condition_mask=torch.zeros(2, 1, 3, 1, 1)), r"condition_mask must be \[2 or 1, 1, 3, 8, 12\]"),
        (dict(padding_mask=torch.zeros(3, 1, 8, 12)), "padding_mask must be"),
        (dict(attention_mask=torch.ones(2, 4)), r"attention_mask must be \[2 or 1, 5\]"),
        (dict(timestep=torch.zeros(3)), r"timestep must be a scalar, \[2\] .one per sample. or \[2, 3\]"),
        (dict(fps=torch.tensor([10, 24])), "fps must be the same for a whole batch"),
        (dict(fps=0), "fps must be positive"),
    ],
)
def test_wrong_inputs_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(), **change})


def test_conditions_without_a_channel_are_refused():
    plain = CosmosWorldTransformer3D(**{**PRESETS["tiny"], "concat_padding_mask": False})
    given = inputs(mask=False)
    with pytest.raises(ValueError, match="takes no padding_mask"):
        plain(**given)
    given["padding_mask"] = None
    with pytest.raises(ValueError, match="takes no condition_mask"):
        plain(**given, condition_mask=torch.zeros(2, 1, 3, 8, 12))
    assert plain(**given).sample.shape == (2, 16, 3, 8, 12)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(in_channels=18), "or one more for the condition mask"),
        (dict(max_size=(16, 47, 48)), "multiple of patch_size"),
        (dict(attention_head_dim=10), "even and at least 12"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CosmosWorldTransformer3D(**{**PRESETS["tiny"], **change})


def test_gradients_reach_every_parameter_and_checkpointing_changes_nothing(model):
    given, gradients = inputs(), []
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        model.zero_grad()
        model(**given).sample.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.disable_gradient_checkpointing()
    dead = [name for name, gradient in gradients[0].items() if gradient.abs().max() < 1e-9]
    assert not dead
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_fresh_model_predicts_zero_and_learns():
    """The output layer starts at zero, and one step moves it: nothing is NaN or stuck at the start."""
    model = CosmosWorldTransformer3D(**PRESETS["tiny-video2world"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        out = model(**inputs()).sample
        assert (out == 0).all() == (step == 0)
        (out - 1).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_half_precision_takes_float32_inputs(model):
    """The pipeline hands over float32 latents whatever the weights are; positions stay float32 when loaded in bf16."""
    given = inputs(batch=1, frames=1, height=4, width=4)
    half = CosmosWorldTransformer3D(**PRESETS["tiny-video2world"])
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    with torch.no_grad():
        out, expected = half(**given).sample, model(**given).sample
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(**given).sample
    assert out.dtype == torch.bfloat16
    for other in (out, autocast):
        assert (other.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_attention_backend_can_be_chosen(model):
    with torch.no_grad(), attention_backend("_native_math"):
        out = model(**inputs()).sample
    with torch.no_grad():
        torch.testing.assert_close(out, model(**inputs()).sample, atol=1e-5, rtol=1e-5)
    assert len({id(block.attn1.get_processor()) for block in model.transformer_blocks}) == 2


def test_inference_mode_does_not_poison_later_training():
    model = randomized(CosmosWorldTransformer3D(**PRESETS["tiny-video2world"]))
    with torch.inference_mode():
        model(**inputs())
    model(**inputs()).sample.mean().backward()


def test_lora_starts_equal_to_its_base(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "trial")
    try:
        with torch.no_grad():
            with_adapter = model(**inputs()).sample
            model.disable_adapters()
            assert torch.equal(with_adapter, model(**inputs()).sample)
        assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 16
    finally:
        model.delete_adapters("trial")
        model.unload_lora()
        model.requires_grad_(True)


def test_saved_folder_loads_in_a_new_process(model, tmp_path):
    model.save_pretrained(tmp_path)
    given = inputs()
    torch.save({**given, "out": model(**given).sample.detach()}, tmp_path / "given.pt")
    code = (
        "import sys, torch; from cosmos_hf import CosmosWorldTransformer3D as M;"
        "m = M.from_pretrained(sys.argv[1]); d = torch.load(sys.argv[1] + '/given.pt'); out = d.pop('out');"
        "torch.testing.assert_close(m(**d).sample, out)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_folders_of_diffusers_load_and_wrong_ones_are_refused(tmp_path):
    theirs = CosmosTransformer3DModel(**PRESETS["tiny-video2world"])
    theirs.save_pretrained(tmp_path)
    ours = CosmosWorldTransformer3D.from_pretrained(tmp_path)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())

    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "stray.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unknown \['stray.weight'\]"):
        CosmosWorldTransformer3D.from_pretrained(tmp_path)
    state.pop("proj_out.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \['proj_out.weight'\]"):
        CosmosWorldTransformer3D.from_pretrained(tmp_path)


def test_prepared_text_gives_the_same_output(model):
    given = inputs()
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    text = given.pop("encoder_hidden_states")
    with torch.no_grad():
        prepared = model.prepare_text(text)
        for options in ({}, {"attention_mask": mask}):
            expected = model(encoder_hidden_states=text, **given, **options).sample
            assert torch.equal(model(encoder_hidden_states=prepared, **given, **options).sample, expected)
        for wrong in (prepared[:1], model.prepare_text(text[:1])):
            with pytest.raises(ValueError, match="prepare_text makes them"):
                model(encoder_hidden_states=wrong, **given)
