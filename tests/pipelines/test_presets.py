"""Presets: what they do to a pipeline, that it makes the same video, and that it holds what the estimate says, measured."""

import copy
import re
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from diffusers.hooks.group_offloading import ModuleGroup
from transformers import T5Config, T5EncoderModel

from cosmos_hf import CosmosVideo2WorldPipeline, estimate_memory
from cosmos_hf.models.transformer_cosmos import PRESETS as TRANSFORMERS
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.pipelines import presets
from cosmos_hf.pipelines.memory import weights_held
from cosmos_hf.pipelines.presets import AUTOREGRESSIVE, PRESETS, STORAGES, place_weights
from measured_memory import agree, measured
from tiny_pipelines import SETTINGS, autoregressive, components, diffusion_decoder

GIVEN = dict(prompt="a robot arm", output_type="pt", num_conditioning_frames=1)


@pytest.fixture(scope="module")
def video():
    return (torch.rand(3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def build() -> CosmosVideo2WorldPipeline:
    """With parts of four blocks, so that a block is less than the part."""
    parts = components("tiny-video2world")
    torch.manual_seed(0)
    parts["transformer"] = CosmosWorldTransformer3D(**TRANSFORMERS["tiny-video2world"] | dict(num_layers=4)).eval()
    for parameter in parts["transformer"].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = parts["text_encoder"].config.to_dict() | dict(num_layers=4, num_decoder_layers=4)
    parts["text_encoder"] = T5EncoderModel(T5Config(**config)).eval()
    pipe = CosmosVideo2WorldPipeline(**parts, **SETTINGS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, video):
    return pipe(video=video, generator=torch.Generator().manual_seed(0), **GIVEN).frames


class Device:
    """Keeps the account of an accelerator for diffusers' and accelerate's hooks: bytes that they have brought to it."""

    def __init__(self, pipe):
        self.now, self.stage, self.peaks, self.parts = {}, "start", {}, {}
        for name in ("text_encoder", "transformer"):
            getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: self.enter(name))
        self.announce(pipe.transformer, "prepare_text", "transformer")
        self.announce(pipe.vae, "encode", "encode")
        self.announce(pipe.vae, "decode", "vae")

    def announce(self, part, name, stage):
        call = getattr(part, name)
        setattr(part, name, lambda *args, **kwargs: (self.enter(stage), call(*args, **kwargs))[1])

    def enter(self, stage):
        self.stage = stage
        self.peaks.setdefault(stage, 0)

    def change(self, key, tensors):
        """`tensors`: what has come, or None for what has gone."""
        self.now.pop(key, None) if tensors is None else self.now.update({key: {t: t.nbytes for t in tensors}})
        held = {tensor: size for group in self.now.values() for tensor, size in group.items()}
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), sum(held.values()))
        self.parts.setdefault(self.stage, []).append(set(held))


@contextmanager
def account(monkeypatch, pipe):
    device = Device(pipe)

    def wrap(cls, name, account):
        original = getattr(cls, name)

        def wrapped(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            account(self, *args)
            return result

        monkeypatch.setattr(cls, name, wrapped)

    def of_group(group):
        modules = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        return {*modules, *group.parameters, *group.buffers}

    wrap(ModuleGroup, "onload_", lambda self: device.change(id(self), of_group(self)))
    wrap(ModuleGroup, "offload_", lambda self: device.change(id(self), None))

    def hand_over(hook, module, *_):
        if hook.prev_module_hook is not None:  # accelerate spares the call where that part is on the processor
            device.change(id(hook.prev_module_hook.model), None)
        device.change(id(module), {*module.parameters(), *module.buffers()})

    wrap(CpuOffload, "pre_forward", hand_over)
    wrap(UserCpuOffloadHook, "offload", lambda self: device.change(id(self.model), None))
    yield device


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_the_same_video_and_holds_what_the_estimate_says(name, video, monkeypatch):
    pipe = build()
    expected = generate(pipe, video)
    settings = PRESETS[name]
    with account(monkeypatch, pipe) as device:
        place_weights(pipe, settings, torch.device("cpu"))
        pipe.apply_preset(name, device="cpu")
        torch.testing.assert_close(generate(pipe, video), expected, atol=1e-5, rtol=0)
        first = dict(device.peaks)
        torch.testing.assert_close(generate(pipe, video), expected, atol=1e-5, rtol=0)
    assert {stage: device.peaks[stage] for stage in first} == first or name == "48gb"
    encoder, transformer = set(pipe.text_encoder.parameters()), set(pipe.transformer.parameters())
    whole = sum(weight.nbytes for weight in encoder)
    for held in device.parts.get("transformer", []):
        assert not (held & encoder and held & transformer), "the text encoder is there while the transformer works"
    for part in ("text_encoder", "transformer"):
        place = settings.place(part)
        if place == "device":
            assert part not in first or first[part] == 0
            continue
        # without a stream there is no second block on its way
        wanted = weights_held(getattr(pipe, part), place, blocks=1)[1]
        if part == "transformer" and place == "whole":
            wanted += weights_held(pipe.vae, "whole")[1]  # has encoded the given frames
        assert first[part] == pytest.approx(wanted, rel=1e-3), part
    assert pipe.transformer.can_prepare_text == (settings.transformer != "blocks")
    assert settings.text_encoder == "whole" or first["text_encoder"] < whole
    with pytest.raises(ValueError, match=f"the preset {name} is applied already"):
        pipe.apply_preset(name, device="cpu")


def test_presets_on_a_processor_say_what_they_leave_out(video, caplog):
    pipe = build()
    with pytest.raises(ValueError, match="brings weights to an accelerator, and torch finds none on this machine"):
        pipe.apply_preset("24gb")
    with pytest.raises(ValueError, match="preset must be one of 80gb, 48gb, 24gb, got '12gb'"):
        pipe.apply_preset("12gb", device="cpu")
    done = pipe.apply_preset("24gb", device="cpu")
    assert "weights stay in the processor's memory" in done[0] and "2 latent frames are decoded at a time" in done
    assert "weights stay in the processor's memory" in caplog.text
    assert pipe.vae.decode_chunk == 2
    pipe.vae.disable_chunked_decoding()
    with pytest.raises(ValueError, match="latent_frames must be at least 1, got 0"):
        pipe.vae.enable_chunked_decoding(0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("text", [False, True])
def test_presets_of_an_autoregressive_pipeline(name, text):
    """The same video, with every part where the preset has it; the transformer is never taken apart."""
    pipe, settings = autoregressive(text=text), AUTOREGRESSIVE[name]
    pipe.register_modules(diffusion_decoder=diffusion_decoder(code_spatial_compression=8))
    given = dict(image=torch.full((3, 1, 32, 32), 90, dtype=torch.uint8), output_type="pt")
    given |= dict(prompt="a robot arm") if text else {}
    plain = given | dict(use_diffusion_decoder=False)

    def run(options):
        return pipe(**options, generator=torch.Generator().manual_seed(0)).frames

    expected = run(given), run(plain)
    place_weights(pipe, settings, torch.device("cpu"))
    done = pipe.apply_preset(name, device="cpu")
    assert settings.transformer != "blocks" and "weights stay in the processor's memory" in done[0]
    assert any("every code would wait" in line for line in done) == (name == "24gb")
    assert pipe.vae.decode_chunk == settings.decode_chunk
    for options, wanted in zip((given, plain), expected, strict=True):
        torch.testing.assert_close(run(options), wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"the preset {name} is applied already"):
        pipe.apply_preset(name, device="cpu")


def test_an_autoregressive_pipeline_is_loaded_with_a_preset(tmp_path):
    autoregressive().save_pretrained(tmp_path)
    load = type(autoregressive()).from_pretrained
    with pytest.raises(ValueError, match="brings weights to an accelerator, and torch finds none on this machine"):
        load(tmp_path, preset="24gb")
    with pytest.raises(ValueError, match="storage='int8' is for diffusion transformers"):
        load(tmp_path, storage="int8")
    assert load(tmp_path).apply_preset("80gb", device="cpu")


def test_chunked_decoding_takes_the_estimated_memory(tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    size = dict(height=64, width=96, num_frames=25)
    latents = torch.randn(1, 16, 7, 8, 12)
    peaks = {}
    for name in ("80gb", "24gb"):
        pipe.vae.decode_chunk = PRESETS[name].decode_chunk
        with torch.no_grad():
            peaks[name] = measured(lambda: pipe.vae.decode(latents).sample.float())
        told = estimate_memory(tmp_path, **size, preset=name, dtype=torch.float32).activations["vae"]
        assert agree(told, peaks[name] + latents.nbytes, pipe.vae), (name, told, peaks[name])
    assert peaks["24gb"] < 0.85 * peaks["80gb"]


@pytest.mark.parametrize(
    "model, storage, name",
    [
        ("14B", None, "80gb"),
        ("14B", None, "48gb"),
        ("14B", None, "24gb"),
        ("7B", "float8", "24gb"),
        ("14B", "nf4", "48gb"),
    ],
)
def test_published_models_fit_their_presets_as_the_page_says(model, storage, name):
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text()
    table = re.search(r"<!-- presets -->\n(.*?)\n<!-- end -->", page, flags=re.S)[1].splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in table]
    told = {tuple(row[:2]): dict(zip(rows[0][2:], row[2:], strict=True)) for row in rows[2:]}
    estimate = estimate_memory(f"{model.lower()}-video2world", preset=name, storage=storage)
    assert estimate.peak < 0.8 * 1e9 * int(name.removesuffix("gb"))
    assert told[model, storage or "as loaded"][name] == f"{estimate.peak / 1e9:.1f}"
    if storage == "nf4":
        assert estimate.peak < 0.8 * 24e9


# ---- storage ---------------------------------------------------------------------------------------------------------


def test_float8_storage(video, tmp_path):
    plain = build()
    plain.save_pretrained(tmp_path)
    pipe = CosmosVideo2WorldPipeline.from_pretrained(tmp_path, storage="float8")
    pipe.set_progress_bar_config(disable=True)
    expected, frames = generate(plain, video), generate(pipe, video)
    assert 0 < (frames - expected).abs().mean() < 0.1
    block = pipe.transformer.transformer_blocks[0]
    assert block.ff.net[2].weight.dtype == torch.float8_e4m3fn and block.norm1.linear_2.weight.dtype == torch.float32
    check_size(pipe, tmp_path, "float8")
    estimate = estimate_memory(tmp_path, dtype=torch.float32, storage="float8")
    bare = estimate_memory(tmp_path, dtype=torch.float32)
    largest = block.ff.net[2].weight.numel() * 4
    assert estimate.activations["transformer"] == bare.activations["transformer"] + largest
    place_weights(pipe, PRESETS["24gb"], torch.device("cpu"))
    torch.testing.assert_close(generate(pipe, video), frames, atol=1e-5, rtol=0)


def check_size(pipe, folder, storage):
    """Of the transformer as it is, and of a block of it, against the estimate's."""
    estimate = estimate_memory(folder, dtype=torch.float32, preset="80gb", storage=storage)
    assert estimate.weights["transformer"] == pytest.approx(stored_bytes(pipe.transformer), rel=0.005)
    again = copy.deepcopy(CosmosWorldTransformer3D.from_pretrained(folder, subfolder="transformer"))
    assert weights_held(again, "blocks", storage)[1] == pytest.approx(
        stored_bytes(pipe.transformer) - stored_bytes(pipe.transformer.transformer_blocks[:2]), rel=0.005
    )


def stored_bytes(module) -> int:
    """With the inner tensors of quantised weights."""
    for n, p in module.named_parameters():
        print(
            n, type(p), p.dtype, tuple(p.shape), p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else ""
        )

    def inner(tensor):
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.nbytes
        return sum(inner(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    return sum(
        inner(parameter.data if type(parameter) is torch.nn.Parameter else parameter)
        for parameter in module.parameters()
    )


@pytest.mark.skipif(find_spec("torchao") is None, reason="pip install 'cosmos-hf[quantized]'")
def test_int8_storage(video, tmp_path):
    plain = build()
    plain.save_pretrained(tmp_path)
    pipe = CosmosVideo2WorldPipeline.from_pretrained(tmp_path, storage="int8")
    pipe.set_progress_bar_config(disable=True)
    difference = (generate(pipe, video) - generate(plain, video)).abs().mean()
    assert 0 < difference < 0.05
    assert type(pipe.transformer.transformer_blocks[0].norm1.linear_2.weight) is torch.nn.Parameter
    check_size(pipe, tmp_path, "int8")


def test_storage_that_cannot_be_had_is_refused(monkeypatch, tmp_path):
    load = CosmosVideo2WorldPipeline.from_pretrained
    with pytest.raises(ValueError, match="storage must be one of float8, int8, nf4, or None"):
        load(tmp_path, storage="fp4")
    with pytest.raises(ValueError, match="cannot move block by block, as the preset 24gb has them"):
        load(tmp_path, preset="24gb", storage="nf4")
    with pytest.raises(ValueError, match="preset 48gb brings weights to an accelerator"):
        load(tmp_path, preset="48gb")
    monkeypatch.setattr(presets, "find_spec", lambda name: None)
    for storage in ("int8", "nf4"):
        with pytest.raises(ValueError, match=f"needs {STORAGES[storage].package}: pip install"):
            load(tmp_path, storage=storage)
    with pytest.raises(ValueError, match="not both"):
        load(tmp_path, storage="int8", quantization_config=object())
    monkeypatch.setattr(presets, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="storage='nf4' needs an accelerator"):
        load(tmp_path, storage="nf4")
