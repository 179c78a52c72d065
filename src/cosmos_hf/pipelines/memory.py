"""How much memory a generation needs, from configs alone: the parts run on tensors without values, and their sizes are added up.

from cosmos_hf import estimate_memory

print(estimate_memory("7b-video2world", height=704, width=1280, num_frames=121, preset="48gb"))
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, T5Config, T5EncoderModel

from ..models.ar_cosmos import PRESETS as LANGUAGE
from ..models.autoencoder_cosmos import PRESETS as TOKENIZERS
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.peak_memory import peak_of
from ..models.transformer_cosmos import PRESETS as TRANSFORMERS
from ..models.transformer_cosmos import CosmosWorldTransformer3D
from .bare_parts import network_config, tokenizer_config
from .presets import PRESETS, STORAGES, Preset, check_choice, check_no_storage, is_stored_small

# The published models' text encoder, T5-11B, and size of a call.
_T5_11B = dict(d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128, vocab_size=32128)
_SIZE = dict(height=704, width=1280, num_frames=121, max_sequence_length=512)


@dataclass
class MemoryEstimate:
    """Bytes. `weights` by part; `activations` by stage, at its peak; `stages`: both together where `preset` puts the weights."""

    weights: dict[str, int]
    activations: dict[str, int]
    stages: dict[str, int]
    preset: str
    storage: str | None = None
    places: Preset | None = None

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    def __str__(self) -> str:
        kept = f" and storage {self.storage}" if self.storage else ""
        places = "; ".join((self.places or PRESETS[self.preset]).lines(self.weights))
        lines = [f"{self.peak / 1e9:.2f} GB with the preset {self.preset}{kept} ({places})"]
        lines += [f"  {name}: {size / 1e9:.2f} GB of weights" for name, size in self.weights.items()]
        lines += [
            f"  {stage}: {size / 1e9:.2f} GB, {self.activations[stage] / 1e9:.2f} of it activations"
            for stage, size in self.stages.items()
        ]
        return "\n".join(lines)


def estimate_memory(
    model: str | Path,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    preset: str = "80gb",
    dtype: torch.dtype = torch.bfloat16,
    storage: str | None = None,
) -> MemoryEstimate:
    """The peak of each stage of one generation of one video, with fused attention; of a diffusion model guided.

    Of an autoregressive model these are the text's encoding, that of the given frames (nine), the codes of a window with the cache
    of all of it, and their decoding, by the diffusion decoder where there is one.

    Counted are the tensors that the parts make, not the buffers that a kernel takes for itself nor what an allocator keeps aside.

    Args:
        model: the name of a transformer's preset ("7b-video2world", with T5-11B and the 8x8x8 tokenizer), or a pipeline's
            folder or Hub id, of which only configs are read. Or the name of an autoregressive model's ("4b", "13b-video2world",
            with T5-11B and the tokenizer that it was made for); a name that both have is the diffusion model's.
        height, width, num_frames: None takes the pipeline's own, or the published 704x1280 with 121 frames, 640x1024 with 33 of an
            autoregressive model.
        preset: where the weights are; a name in `presets.PRESETS`.
        dtype: of weights and activations.
        storage: how a diffusion transformer's weights are kept; a name in `presets.STORAGES`, or None for as they are.

    Raises ValueError for unknown names, and what the parts raise for a size that they cannot represent.
    """
    check_choice(preset, storage)
    given = dict(height=height, width=width, num_frames=num_frames)
    given = {name: value for name, value in given.items() if value is not None}
    if _is_autoregressive(str(model)):
        from .memory_autoregressive import estimate_autoregressive  # which needs what is here

        check_no_storage(storage)
        return estimate_autoregressive(str(model), given, preset, dtype, _T5_11B)
    return _estimate_diffusion(str(model), given, preset, dtype, storage)


def _estimate_diffusion(
    model: str, given: dict, preset: str, dtype: torch.dtype, storage: str | None
) -> MemoryEstimate:
    settings = PRESETS[preset]
    configs, size = _configs(model)
    size |= given
    with torch.device("meta"):
        transformer = CosmosWorldTransformer3D(**configs["transformer"])
        vae = CosmosVideoTokenizer(**configs["vae"])
        encoder = T5EncoderModel(configs["text_encoder"])
    for part in (transformer, vae, encoder):
        cast(part, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        transformer, vae, encoder = (to_fake(part) for part in (transformer, vae, encoder))
        parts = {"text_encoder": encoder, "transformer": transformer, "vae": vae}
        activations = {
            "text_encoder": peak_of(lambda: text_stage(encoder, size["max_sequence_length"])),
            "transformer": peak_of(lambda: _denoise(transformer, vae, size, dtype)),
            "vae": peak_of(lambda: decode_stage(vae, size, dtype, settings.decode_chunk)),
        }
        if storage is not None:  # the one matrix that is at work has its full size
            activations["transformer"] += max(
                w.nbytes for n, w in transformer.named_parameters() if is_stored_small(n, w)
            )
        held = {
            name: weights_held(part, settings.place(name), storage if name == "transformer" else None)
            for name, part in parts.items()
        }
        encodes = transformer.takes_condition_mask  # the tokenizer, just before the transformer works
    stages = {}
    for stage in parts:
        others = [name for name in parts if name != stage and settings.place(name) == "device"]
        if stage == "transformer" and encodes and settings.vae == "whole":
            others.append("vae")
        stages[stage] = activations[stage] + held[stage][1] + sum(held[name][0] for name in others)
    return MemoryEstimate({name: total for name, (total, _) in held.items()}, activations, stages, preset, storage)


# ---- the stages ------------------------------------------------------------------------------------------------------


def text_stage(encoder: T5EncoderModel, length: int, texts: int = 2):
    """Prompt and negative prompt, one after the other; the embeddings of the first stay."""
    ids = torch.zeros(1, length, dtype=torch.long)
    return [encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state for _ in range(texts)]


def _denoise(transformer: CosmosWorldTransformer3D, vae: CosmosVideoTokenizer, size: dict, dtype: torch.dtype):
    """One guided step: two evaluations, with the latents, noise and estimates in float32 that a step holds."""
    config, factor = transformer.config, vae.config.spatial_compression
    shape = (1, config.out_channels, vae.latent_frames(size["num_frames"]) * config.num_views)
    shape += (size["height"] // factor, size["width"] // factor)
    latents, given, noise, denoised = (torch.zeros(shape) for _ in range(4))
    length = size["max_sequence_length"] * config.num_views
    texts = [torch.zeros(1, length, config.text_embed_dim, dtype=dtype) for _ in range(2)]
    channels = dict(condition_mask=1, camera=config.camera_channels, condition=config.condition_channels)
    conditions = {
        name: torch.zeros(1, channels[name], *shape[2:]) if name in channels else torch.zeros(1, 1, config.action_dim)
        for name in transformer.conditions
    }
    if config.condition_vocab_size is not None:
        conditions["condition"] = torch.zeros(1, 1, *shape[2:], dtype=torch.long)
    kept = [transformer(latents, 0.0, text, fps=24, **conditions).sample.float() for text in texts]
    return kept, given, noise, denoised


def decode_stage(vae: CosmosVideoTokenizer, size: dict, dtype: torch.dtype, chunk: int | None):
    factor = vae.config.spatial_compression
    frames = vae.latent_frames(size["num_frames"])
    latents = torch.zeros(
        1, vae.config.latent_channels, frames, size["height"] // factor, size["width"] // factor, dtype=dtype
    )
    # decode would look at the values, which are not there
    video = vae._decode(latents) if chunk is None else torch.cat(vae._in_chunks(vae._decode, latents, [chunk]), 2)
    return video.float()


# ---- sizes -----------------------------------------------------------------------------------------------------------


def cast(part: torch.nn.Module, dtype: torch.dtype):
    """As `from_pretrained` does: what a class keeps in float32 stays so, in transformers beside float16 only."""
    kept = getattr(part, "_keep_in_fp32_modules", None) or ()
    if isinstance(part, T5EncoderModel) and dtype != torch.float16:
        kept = ()
    for name, parameter in part.named_parameters():
        if not any(word in name.split(".") for word in kept):
            parameter.data = parameter.data.to(dtype)


def to_fake(part: torch.nn.Module) -> torch.nn.Module:
    """From the meta device to the processor of a `FakeTensorMode`; what is one weight under two names stays one."""
    part = part.to_empty(device="cpu").eval()
    if isinstance(part, T5EncoderModel):
        part.encoder.embed_tokens.weight = part.shared.weight
    return part


def weights_held(part: torch.nn.Module, place: str, storage: str | None = None, blocks: int = 2) -> tuple[int, int]:
    """Bytes of a part's weights, and of those that are on the device at a time while it works from a place of `presets.PLACES`.

    Block by block that is the largest neighbouring `blocks` of the part's longest list, and all outside of it.
    """
    total = _bytes(part, storage)
    lists = [module for module in part.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1]
    if place != "blocks" or not lists:
        return total, total
    sizes = [_bytes(block, storage) for block in max(lists, key=lambda module: _bytes(module, None))]
    largest = max(sum(sizes[i : i + blocks]) for i in range(max(1, len(sizes) - blocks + 1)))
    return total, total - sum(sizes) + largest


def _bytes(part: torch.nn.Module, storage: str | None) -> int:
    total = sum(buffer.nbytes for buffer in part.buffers())
    for name, weight in part.named_parameters():
        if storage is None or not is_stored_small(name, weight):
            total += weight.nbytes
        else:
            kind = STORAGES[storage]
            shared = -(-weight.numel() // (kind.group or weight.shape[1]))
            total += (weight.numel() * kind.bits + shared * kind.shared_bits) // 8
    return total


# ---- configs ---------------------------------------------------------------------------------------------------------


def _is_autoregressive(model: str) -> bool:
    """Of a preset's name, a pipeline's folder or a Hub id. ValueError for a name or folder that is none of them."""
    if model in TRANSFORMERS or model in LANGUAGE:
        return model not in TRANSFORMERS
    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.exists() and (folder / "config.json").exists():
            raise ValueError(f"{model} holds one part: give the folder of a pipeline, or the name of a preset")
        index = json.loads(index.read_text()) if index.exists() else {}
    elif "/" not in model:
        names = ", ".join([*TRANSFORMERS, *(name for name in LANGUAGE if name not in TRANSFORMERS)])
        raise ValueError(f"{model!r} is no folder and no preset; there is {names}")
    else:
        index = DiffusionPipeline.load_config(model)
    return index.get("_class_name") == "CosmosAutoregressivePipeline"


def _configs(model: str) -> tuple[dict, dict]:
    """(config of each part, size of a call) of a preset's name, or of a folder or Hub id."""
    if model in TRANSFORMERS:
        config = TRANSFORMERS[model]
        text = T5Config(**_T5_11B | {"d_model": config.get("text_embed_dim", _T5_11B["d_model"])})
        return dict(transformer=config, vae=TOKENIZERS["cv8x8x8"], text_encoder=text), dict(_SIZE)
    transformer, vae = network_config(model), tokenizer_config(model)
    size, index = dict(_SIZE), Path(model) / "model_index.json"
    if index.exists():
        values = json.loads(index.read_text())
        size |= {name: values[name] for name in size if name in values}
    text = AutoConfig.from_pretrained(model, subfolder="text_encoder")
    return dict(transformer=transformer, vae=vae, text_encoder=text), size
