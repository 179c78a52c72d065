"""The layout that is published for diffusers' Cosmos-1 pipelines: its index names diffusers' classes, ours read the same files."""

import json
import logging
from pathlib import Path

import torch

from ..models.diffusers_layout import save_for_diffusers as save_tokenizer
from ..schedulers.diffusers_settings import DIFFUSERS_CLASS as DIFFUSERS_SCHEDULER
from ..schedulers.diffusers_settings import to_diffusers_config

logger = logging.getLogger(__name__)

# (diffusers' class, our module and class), by component.
_CLASSES = {
    "transformer": ("CosmosTransformer3DModel", "cosmos_hf.models.transformer_cosmos", "CosmosWorldTransformer3D"),
    "vae": ("AutoencoderKLCosmos", "cosmos_hf.models.autoencoder_cosmos", "CosmosVideoTokenizer"),
    "scheduler": (DIFFUSERS_SCHEDULER, "cosmos_hf.schedulers.scheduling_edm_cosmos", "CosmosEDMScheduler"),
}
# Parts of the published folders that are no components of our pipelines.
_LEFT_OUT = ("safety_checker",)
# Config fields of our transformer that diffusers' class lacks; it computes the same only where they are off.
_ONLY_OURS = dict(
    camera_channels=0,
    condition_channels=0,
    condition_vocab_size=None,
    action_dim=None,
    action_form=None,  # of no effect without action_dim
    num_views=1,
    view_embed_dim=0,
    frame_repeat_embed=False,
)


def translate_index(index: dict) -> dict:
    """An index (`model_index.json`) that names diffusers' classes -> one that names ours; any other index as it is.

    Raises ValueError where a component is of another class of diffusers: not a Cosmos-1 folder.
    """
    index = dict(index)
    for name, (theirs, module, ours) in _CLASSES.items():
        library, class_name = index.get(name) or (None, None)
        if library != "diffusers":
            continue
        if class_name != theirs:
            raise ValueError(
                f"the index names {class_name} as {name}; the Cosmos-1 pipelines read diffusers' {theirs} or our own {ours}"
            )
        index[name] = [module, ours]
    for name in _LEFT_OUT:
        if index.pop(name, [None])[0] is not None:
            logger.info("the folder's %s is not a component of this pipeline and is not loaded", name)
    return index


def save_for_diffusers(pipeline, folder: str | Path):
    """Write a pipeline so that diffusers' `CosmosTextToWorldPipeline` or `CosmosVideoToWorldPipeline` reads the folder.

    The settings of calls (size, frames, steps, ...) have no place there and are left out.
    Raises ValueError where diffusers' classes cannot compute what the parts do.
    """
    from diffusers import CosmosTransformer3DModel, EDMEulerScheduler  # here, since importing them costs seconds

    folder = Path(folder)
    with torch.device("meta"):
        theirs = CosmosTransformer3DModel(**transformer_config_to_diffusers(pipeline.transformer.config))
    theirs.load_state_dict(pipeline.transformer.state_dict(), strict=True, assign=True)
    theirs.save_pretrained(folder / "transformer")
    save_tokenizer(pipeline.vae, folder / "vae")
    EDMEulerScheduler(**to_diffusers_config(pipeline.scheduler.config)).save_pretrained(folder / "scheduler")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    video = pipeline.transformer.takes_condition_mask
    index = {
        "_class_name": "CosmosVideoToWorldPipeline" if video else "CosmosTextToWorldPipeline",
        "_diffusers_version": theirs.config["_diffusers_version"],
        "safety_checker": [None, None],
        "text_encoder": ["transformers", type(pipeline.text_encoder).__name__],
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        **{name: ["diffusers", names[0]] for name, names in _CLASSES.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def transformer_config_to_diffusers(config) -> dict:
    """Arguments of diffusers' class for a `CosmosWorldTransformer3D`'s config; ValueError where it lacks the mechanism."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for name, off in _ONLY_OURS.items():
        value = config.pop(name)
        if name != "action_form" and value != off:
            raise ValueError(
                f"diffusers' CosmosTransformer3DModel has no {name} (this model: {value}): it cannot hold this model"
            )
    if config["extra_pos_embed_type"] == "sincos":
        raise ValueError(
            "diffusers' CosmosTransformer3DModel has no extra_pos_embed_type='sincos': it cannot hold this model"
        )
    return config
