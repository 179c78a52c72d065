"""Presets for devices of 24, 48 and 80 GB: where a pipeline's weights are while it works, and in what form they are kept.

pipe = CosmosVideo2WorldPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, preset="24gb")

`PRESETS` and `STORAGES` are what `apply_preset` does and what `estimate_memory` counts. The text encoder, as large as the
transformer, is never on the device as a whole while the transformer is there.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter

import torch
from diffusers import PipelineQuantizationConfig
from diffusers.hooks import apply_group_offloading
from diffusers.utils.torch_utils import get_device

from ..models.transformer_cosmos import CosmosWorldTransformer3D

logger = logging.getLogger(__name__)

# Where a part's weights are.
PLACES = {
    "device": "stays on the device",
    "whole": "is on the device while it works",
    "blocks": "is on the device one block at a time, the next one on its way",
}
# Modules of the transformer that keep their precision in every storage: they are small, and the result depends on each.
PRECISE = CosmosWorldTransformer3D._skip_layerwise_casting_patterns


@dataclass(frozen=True)
class Preset:
    """A place (of `PLACES`) for each part, and latent frames that the tokenizer decodes at a time (None: all)."""

    text_encoder: str
    transformer: str
    vae: str
    decode_chunk: int | None = None

    def place(self, part: str) -> str:
        """Of a part, or of one within a part, as a diffusion decoder's `transformer` is."""
        return getattr(self, part.rsplit(".", 1)[-1])

    def lines(self, parts) -> list[str]:
        """What it says of these parts."""
        lines = [f"{part} {PLACES[self.place(part)]}" for part in parts]
        if self.decode_chunk:
            lines.append(f"{self.decode_chunk} latent frames are decoded at a time")
        return lines


PRESETS = {
    "80gb": Preset(text_encoder="blocks", transformer="device", vae="device"),
    "48gb": Preset(text_encoder="whole", transformer="whole", vae="whole"),
    "24gb": Preset(text_encoder="blocks", transformer="blocks", vae="device", decode_chunk=2),
}

# Of autoregressive pipelines: a transformer that came block by block would come again for every code.
AUTOREGRESSIVE = PRESETS | {
    "24gb": Preset(text_encoder="whole", transformer="whole", vae="whole", decode_chunk=2),
}


@dataclass(frozen=True)
class Storage:
    """How the transformer's large weights are kept. `bits` of each, and of what each `group` of them shares (None: a row)."""

    bits: int
    shared_bits: int
    group: int | None
    package: str | None = None  # that quantises while loading; None is diffusers' layerwise casting, at any time


STORAGES = {
    "float8": Storage(bits=8, shared_bits=0, group=None),
    "int8": Storage(bits=8, shared_bits=40, group=None, package="torchao"),
    "nf4": Storage(bits=4, shared_bits=32, group=64, package="bitsandbytes"),
}


def is_stored_small(name: str, weight: torch.Tensor) -> bool:
    """Whether a storage applies to this parameter of the transformer: the matrices of attention and MLP."""
    return weight.ndim == 2 and not any(word in name.split(".") for word in PRECISE)


def check_choice(preset: str | None, storage: str | None):
    """ValueError for an unknown name, or for two that do not go together."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if storage is not None and storage not in STORAGES:
        raise ValueError(
            f"storage must be one of {', '.join(STORAGES)}, or None for the weights as they are, got {storage!r}"
        )
    if storage == "nf4" and preset is not None and PRESETS[preset].transformer == "blocks":
        raise ValueError(
            f"weights of bitsandbytes cannot move block by block, as the preset {preset} has them: storage='nf4' goes with "
            "48gb, which then needs less than 24 GB, or use storage='int8' or 'float8'"
        )


def check_no_storage(storage: str | None):
    """ValueError: a storage is for diffusion transformers."""
    if storage is not None:
        raise ValueError(
            f"storage={storage!r} is for diffusion transformers; load an autoregressive one in torch_dtype=torch.bfloat16 "
            "or with a quantization_config of transformers"
        )


class PresetsMixin:
    """Put before `DiffusionPipeline`; for pipelines with `text_encoder`, `transformer` and `vae`."""

    _applied: str | None = None
    _presets = PRESETS

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, preset: str | None = None, storage: str | None = None, **kwargs
    ):
        """As of every diffusers pipeline.

        Args:
            preset: "24gb", "48gb" or "80gb": see `apply_preset`.
            storage: "float8", "int8" (needs torchao) or "nf4" (needs bitsandbytes and an accelerator): how the transformer's
                large weights are kept; computed is in the `torch_dtype`. An approximation. None keeps them as they are.

        Raises ValueError for unknown names, a package that is not installed, or a preset on a machine that cannot have it.
        """
        check_choice(preset, storage)
        if preset is not None:
            _device_for(preset, None)  # before anything is loaded
        if storage is not None and STORAGES[storage].package:
            if kwargs.get("quantization_config") is not None:
                raise ValueError("give storage or quantization_config, not both")
            if not kwargs.keys() & {"dtype", "torch_dtype"}:
                kwargs["torch_dtype"] = torch.float32  # a quantiser would take another for the rest, unasked
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            kwargs["quantization_config"] = quantization(storage, dtype)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if storage == "float8":
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn)
        if preset is not None:
            pipe.apply_preset(preset)
        return pipe

    def apply_preset(self, preset: str, device: str | torch.device | None = None) -> list[str]:
        """Bring the weights to where a preset of `PRESETS` has them, by diffusers' and accelerate's own hooks.

        Args:
            device: None is the machine's accelerator. "cpu" applies what needs none: how the tokenizer decodes.

        Returns what was done, and on "cpu" what was not, one line each.

        Raises ValueError for an unknown preset, a second one, or where there is no accelerator and `device` is None.
        """
        storage = "nf4" if getattr(self.transformer, "is_loaded_in_4bit", False) else None
        check_choice(preset, storage)
        if self._applied is not None:
            raise ValueError(f"the preset {self._applied} is applied already: load the pipeline again to change it")
        device, settings = _device_for(preset, device), self._presets[preset]
        if device.type == "cpu":
            done = ["weights stay in the processor's memory: there is no accelerator that they would be brought to"]
            logger.warning("preset %s: %s", preset, done[0])
        else:
            place_weights(self, settings, device)
            done = [f"{part} {PLACES[place]} ({device})" for part, place in _places(self, settings).items()]
        if settings.decode_chunk:
            self.vae.enable_chunked_decoding(settings.decode_chunk)
            done.append(f"{settings.decode_chunk} latent frames are decoded at a time")
        self._applied = preset
        return done


class AutoregressivePresetsMixin(PresetsMixin):
    """The same for autoregressive pipelines: no storage, and the transformer never block by block (`AUTOREGRESSIVE`)."""

    _presets = AUTOREGRESSIVE

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, preset: str | None = None, storage=None, **kwargs):
        """As of every diffusers pipeline. `preset`: see `apply_preset`. `storage` is refused: it is for diffusion transformers."""
        check_no_storage(storage)
        return super().from_pretrained(pretrained_model_name_or_path, preset, **kwargs)

    def apply_preset(self, preset: str, device: str | torch.device | None = None) -> list[str]:
        """As of the diffusion pipelines, a diffusion decoder included; returned is also what a preset does not do here."""
        done = super().apply_preset(preset, device)
        if self._presets[preset] is not PRESETS[preset]:
            done.append("the transformer does not come block by block: every code would wait for all of its weights")
        return done


def place_weights(pipe, settings: Preset, device: torch.device):
    """Hooks that bring each part's weights to `device` and away again, as `settings` says."""
    places = _places(pipe, settings)
    if "whole" in places.values():
        assert set(places.values()) == {"whole"}, "accelerate's hooks hand the device from part to part"
        pipe.enable_model_cpu_offload(device=device)
        return
    streams = dict(use_stream=True) if device.type in ("cuda", "xpu") else {}
    for name, place in places.items():
        part = attrgetter(name)(pipe)
        if place == "device":
            part.to(device)
            continue
        blocks = part.encoder if name == "text_encoder" else part  # the stack, which shares the embedding
        apply_group_offloading(
            blocks, onload_device=device, offload_type="block_level", num_blocks_per_group=1, **streams
        )


def _places(pipe, settings: Preset) -> dict[str, str]:
    """By part that the pipeline has, those of a pipeline within it included."""
    names = ["text_encoder", "transformer", "vae"]
    if getattr(pipe, "diffusion_decoder", None) is not None:
        names += ["diffusion_decoder.transformer", "diffusion_decoder.vae"]
    return {name: settings.place(name) for name in names if attrgetter(name)(pipe) is not None}


def _device_for(preset: str, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    device = torch.device(get_device())
    if device.type == "cpu":
        raise ValueError(
            f"the preset {preset} brings weights to an accelerator, and torch finds none on this machine. Load without a preset, "
            f"or call apply_preset({preset!r}, device='cpu') for what needs none: how the tokenizer decodes"
        )
    return device


def quantization(storage: str, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """What diffusers is to do with the transformer while loading. ValueError where the package is not there, or no device."""
    package = STORAGES[storage].package
    if find_spec(package) is None:
        raise ValueError(
            f"storage={storage!r} needs {package}: pip install {package}, or use storage='float8', which needs nothing"
        )
    if storage == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(PRECISE))
    else:
        from diffusers import BitsAndBytesConfig

        if get_device() == "cpu":
            raise ValueError(
                "storage='nf4' needs an accelerator, and torch finds none: use storage='int8' or 'float8'"
            )
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(PRECISE),
        )
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})
