"""Outputs of models of every published kind, recorded where the same code matched the reference's full fixtures.

The fixtures' weights are random and large; those here are made again by numpy's legacy generator, whose numbers never change, so
that a file of a few kilobytes guards the kinds whose fixtures are not in the tree. Record again, after the full fixtures passed:

    COSMOS_HF_GOLDEN=... python tests/recorded_outputs.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cosmos_hf.convert import load_original
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.autoencoder_cosmos_image import CosmosImageTokenizer
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from golden_files import FULL, golden, normal, weights

FILE = Path(__file__).parent / "golden" / "recorded.json"
CLASSES = {c.__name__: c for c in (CosmosVideoTokenizer, CosmosImageTokenizer, CosmosWorldTransformer3D)}
KEPT = 24  # numbers of each output


def fill(model: nn.Module) -> nn.Module:
    """Products keep the size of their inputs, scales are near 1, the rest is small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = normal(name, parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(1 + 0.1 * values if name.endswith("weight") else 0.1 * values)
    return model.eval()


def build(class_name: str, config: dict) -> nn.Module:
    if class_name == "CosmosARForCausalLM":
        return fill(CosmosARForCausalLM(CosmosARConfig(**config)))
    return fill(CLASSES[class_name].from_config(config))


@torch.no_grad()
def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, CosmosARForCausalLM):
        return _logits(model)
    if isinstance(model, CosmosWorldTransformer3D):
        return dict(sample=_velocity(model))
    return _coded(model)


def _coded(model) -> dict[str, torch.Tensor]:
    shape = (1, 3, 32, 48) if isinstance(model, CosmosImageTokenizer) else (1, 3, 9, 32, 48)
    coded = model.encode(normal("pixels", shape).clamp(-3, 3) / 3)
    latents = coded.latents if coded.indices is None else coded.latents[:, : len(model.config.fsq_levels)]
    return dict(latents=latents, pixels=model.decode(coded.latents).sample)


def _velocity(model) -> torch.Tensor:
    config, (frames, height, width) = model.config, (4, 8, 12)
    given = dict(
        fps=torch.tensor([24.0]), padding_mask=torch.zeros(1, 1, height * 8, width * 8),
        condition_mask=torch.zeros(1, 1, frames, height, width) if model.takes_condition_mask else None,
    )  # fmt: skip
    text = normal("text", (1, 8, config.text_embed_dim))
    latents = normal("latents", (1, config.out_channels, frames, height, width))
    return model(latents, torch.tensor([0.3]), text, **{k: v for k, v in given.items() if v is not None}).sample


def _logits(model) -> dict[str, torch.Tensor]:
    config, given = model.config, {}
    tokens = torch.from_numpy(np.random.RandomState(0).randint(0, config.vocab_size, (1, 20)))
    if config.cross_attention_dim:
        given["encoder_hidden_states"] = normal("text", (1, 6, config.cross_attention_dim))
    return dict(logits=model(tokens, **given).logits)


def summary(output: torch.Tensor) -> list[float]:
    """Evenly spaced numbers of an output."""
    flat = output.flatten().double()
    return flat[torch.linspace(0, len(flat) - 1, KEPT).long()].tolist()


def record():
    entries = {}
    for family in ("tokenizers", "diffusion", "autoregressive"):
        for path in sorted((FULL / family).glob("*.safetensors")):
            tensors, metadata, config = golden(family, path.stem)
            if config is None or path.stem.startswith("trace_") or not weights(tensors):
                continue
            class_name, more = metadata["cls"].rsplit(".", 1)[-1], {}
            if family == "autoregressive":
                more["training_type"] = metadata["training_type"]
            if path.stem.startswith(("action", "diffusion_decoder", "multiview")):
                continue  # their inputs differ: tests/convert/test_conditions.py
            model = load_original(class_name, config, weights(tensors), **more)
            settings = model.config.to_diff_dict() if family == "autoregressive" else dict(model.config)
            settings = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
            settings = json.loads(json.dumps(settings))
            made = outputs(build(type(model).__name__, settings))
            entries[path.stem] = dict(
                class_name=type(model).__name__,
                config=settings,
                outputs={k: dict(shape=list(v.shape), numbers=summary(v)) for k, v in made.items()},
            )
    FILE.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    record()
