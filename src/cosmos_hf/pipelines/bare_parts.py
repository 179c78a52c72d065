"""Parts of a pipeline without values, from configs alone: what fits, and what it needs, is known before weights are read."""

from pathlib import Path

import torch
from transformers import AutoConfig, T5EncoderModel

from ..models.ar_cosmos import CosmosARConfig
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.diffusers_layout import DIFFUSERS_CLASS, config_from_diffusers
from ..models.stored_prompt import CosmosStoredPrompt
from ..models.transformer_cosmos import CosmosWorldTransformer3D
from ..schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from .diffusion_decoder import CosmosDiffusionDecoderPipeline


def network_config(model: str | Path, subfolder: str = "transformer") -> dict:
    """Arguments of the diffusion network of a pipeline's folder or Hub id."""
    return _plain(CosmosWorldTransformer3D.load_config(model, subfolder=subfolder), CosmosWorldTransformer3D)


def tokenizer_config(model: str | Path, subfolder: str | None = "vae") -> dict:
    """Arguments of its video tokenizer, in our layout or diffusers'."""
    config = CosmosVideoTokenizer.load_config(model, subfolder=subfolder)
    return (
        config_from_diffusers(config)
        if config["_class_name"] == DIFFUSERS_CLASS
        else _plain(config, CosmosVideoTokenizer)
    )


def bare_text_encoder(model: str | Path) -> T5EncoderModel:
    config = AutoConfig.from_pretrained(model, subfolder="text_encoder")
    with torch.device("meta"):
        return T5EncoderModel(config).eval()


def bare_decoder(model: str | Path, subfolder: str = "") -> CosmosDiffusionDecoderPipeline:
    """A diffusion decoder with its own settings and scheduler, networks on the meta device; checked as any is."""
    below = f"{subfolder}/" if subfolder else ""
    settings = CosmosDiffusionDecoderPipeline.load_config(model, subfolder=subfolder or None)
    parts = dict(scheduler=CosmosEDMScheduler.from_pretrained(model, subfolder=f"{below}scheduler"))
    with torch.device("meta"):
        parts["transformer"] = CosmosWorldTransformer3D(**network_config(model, f"{below}transformer")).eval()
        parts["vae"] = CosmosVideoTokenizer(**tokenizer_config(model, f"{below}vae")).eval()
        if settings.get("stored_prompt", [None])[0] is not None:
            stored = CosmosStoredPrompt.load_config(model, subfolder=f"{below}stored_prompt")
            parts["stored_prompt"] = CosmosStoredPrompt(**_plain(stored, CosmosStoredPrompt))
    settings = _plain(settings, CosmosDiffusionDecoderPipeline)
    return CosmosDiffusionDecoderPipeline(**{k: v for k, v in settings.items() if k != "stored_prompt"} | parts)


def trained_size(config: CosmosARConfig, vae: CosmosVideoTokenizer) -> dict:
    """The size of a call that makes the grid that the model was trained with; the height is that of one view."""
    frames, height, width = config.latent_shape
    space = vae.config.spatial_compression
    return dict(num_frames=vae.num_frames(frames), height=height // config.num_views * space, width=width * space)


def _plain(config: dict, cls) -> dict:
    return {name: value for name, value in config.items() if name in cls._get_init_keys(cls)}
