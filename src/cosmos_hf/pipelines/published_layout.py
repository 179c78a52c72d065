"""The layout that is published for diffusers' Cosmos-1 pipelines: its index names diffusers' classes, ours read the same files.

And what makes a pipeline's folder of a converted network alone.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import __version__ as diffusers_version
from safetensors import safe_open
from transformers import AutoTokenizer

from ..conditioning.views import PUBLISHED_VIEWS
from ..models.ar_cosmos import CosmosARForCausalLM
from ..models.autoencoder_cosmos import CosmosVideoTokenizer
from ..models.diffusers_layout import save_for_diffusers as save_tokenizer
from ..models.dit_conditions import HOW_ACTIONS_ENTER
from ..models.stored_prompt import CosmosStoredPrompt
from ..models.transformer_cosmos import CosmosWorldTransformer3D
from ..schedulers.diffusers_settings import DIFFUSERS_CLASS as DIFFUSERS_SCHEDULER
from ..schedulers.diffusers_settings import to_diffusers_config
from ..schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from .autoregressive import CosmosAutoregressivePipeline
from .bare_parts import bare_decoder, bare_text_encoder, trained_size
from .component_checks import check_fit
from .diffusion_decoder import CosmosDiffusionDecoderPipeline

logger = logging.getLogger(__name__)

# (diffusers' class, our module and class), by component.
_CLASSES = {
    "transformer": ("CosmosTransformer3DModel", "cosmos_hf.models.transformer_cosmos", "CosmosWorldTransformer3D"),
    "vae": ("AutoencoderKLCosmos", "cosmos_hf.models.autoencoder_cosmos", "CosmosVideoTokenizer"),
    "scheduler": (DIFFUSERS_SCHEDULER, "cosmos_hf.schedulers.scheduling_edm_cosmos", "CosmosEDMScheduler"),
}
# Of the published multi-view models (arXiv 2501.03575, section 6.3).
_MULTIVIEW_SETTINGS = dict(height=480, width=848, num_frames=57, fps=24)
# Parts of the published folders that are no components of our pipelines.
_LEFT_OUT = ("safety_checker",)
# Config fields of our transformer that diffusers' class lacks; it computes the same only where they are off.
_ONLY_OURS = dict(
    camera_channels=0,
    condition_channels=0,
    condition_vocab_size=None,
    action_dim=None,
    **dict.fromkeys(HOW_ACTIONS_ENTER),
    text_refiner_layers=0,
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


def export_for_diffusers(source: str | Path, target: str | Path):
    """A pipeline's folder -> one that diffusers' `CosmosTextToWorldPipeline` or `CosmosVideoToWorldPipeline` reads.

    Weights are copied file by file, bit for bit; only the tokenizer, whose keys differ, is read into memory. The settings of
    calls (size, frames, steps, ...) have no place there and are left out.
    Raises ValueError where diffusers' classes cannot compute what the parts do.
    """
    from diffusers import EDMEulerScheduler  # here, since importing diffusers' pipelines costs seconds

    source, target = Path(source), Path(target)
    index = _read_index(source)
    config = _transformer_config(source)
    theirs = {"_class_name": _CLASSES["transformer"][0], "_diffusers_version": diffusers_version}
    theirs |= transformer_config_to_diffusers(config)
    _copy(source / "transformer", target / "transformer")
    _write_json(target / "transformer" / "config.json", theirs)
    tokenizer = CosmosVideoTokenizer.from_pretrained(source / "vae")
    save_tokenizer(tokenizer.to(_stored_dtype(source / "vae")), target / "vae")
    scheduler = CosmosEDMScheduler.from_pretrained(source / "scheduler")
    EDMEulerScheduler(**to_diffusers_config(scheduler.config)).save_pretrained(target / "scheduler")
    for name in ("text_encoder", "tokenizer"):
        _copy(source / name, target / name)
    masked = config["in_channels"] > config["out_channels"]
    _write_json(
        target / "model_index.json",
        {
            "_class_name": "CosmosVideoToWorldPipeline" if masked else "CosmosTextToWorldPipeline",
            "_diffusers_version": diffusers_version,
            "safety_checker": [None, None],
            "text_encoder": index["text_encoder"],
            "tokenizer": index["tokenizer"],
            **{name: ["diffusers", names[0]] for name, names in _CLASSES.items()},
        },
    )


def complete_pipeline(base: str | Path, folder: str | Path):
    """Copy all parts but the transformer from a pipeline's folder, in either layout, to one that has a `transformer` only.

    A network of six views is taken for the published one, with its views' names, size and number of frames.
    """
    base, folder = Path(base), Path(folder)
    index = _read_index(base)
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and name != "transformer":
            _copy(base / name, folder / name)
    with torch.device("meta"):
        transformer = CosmosWorldTransformer3D.from_config(_transformer_config(folder))
    index["transformer"] = list(_CLASSES["transformer"][1:])
    index["_class_name"] = (
        "CosmosVideo2WorldPipeline" if transformer.takes_condition_mask else "CosmosText2WorldPipeline"
    )
    if transformer.config.num_views > 1:
        index["_class_name"] = "CosmosMultiViewPipeline"
        if transformer.config.num_views == len(PUBLISHED_VIEWS):
            index |= dict(views=list(PUBLISHED_VIEWS), **_MULTIVIEW_SETTINGS)
    index.pop("_name_or_path", None)
    _write_json(folder / "model_index.json", index)


def complete_decoder(
    folder: str | Path, vae: str | Path, codes: str | Path | None = None, aux_vars: str | Path | None = None
):
    """Make a diffusion decoder's folder of one that has its `transformer` only, which is not read but for its config.

    Args:
        vae: folder of the continuous tokenizer whose latents it generates.
        codes: folder of the discrete tokenizer whose codes it decodes, of which only the config is read; None is the published
            DV8x16x16.
        aux_vars: the published file with the text that it gets (`context`, `context_mask`); None leaves it without.
    """
    folder = Path(folder)
    tokenizer = _read_tokenizer(vae)
    with torch.device("meta"):
        transformer = CosmosWorldTransformer3D.from_config(_transformer_config(folder))
    settings = {}
    if codes is not None:
        with torch.device("meta"):
            discrete = CosmosVideoTokenizer.from_config(CosmosVideoTokenizer.load_config(codes))
        if discrete.fsq is None:
            raise ValueError(f"{codes} is a continuous tokenizer: the codes of a discrete one are decoded")
        settings = dict(
            fsq_levels=discrete.fsq.levels,
            code_temporal_compression=discrete.config.temporal_compression,
            code_spatial_compression=discrete.config.spatial_compression,
        )
    parts = dict(vae=tokenizer, scheduler=CosmosEDMScheduler(sigma_min=0.02, solver="euler"))
    if aux_vars is not None:
        parts["stored_prompt"] = read_prompt(aux_vars)
    pipeline = CosmosDiffusionDecoderPipeline(transformer=transformer, **parts, **settings)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    pipeline.save_config(folder)


def save_autoregressive(
    model: CosmosARForCausalLM,
    folder: str | Path,
    vae: str | Path,
    text_encoder: str | Path | None = None,
    diffusion_decoder: str | Path | None = None,
):
    """Write the folder of a `CosmosAutoregressivePipeline`. A call's default size is the grid that the model was trained with.

    Args:
        vae: folder of the discrete tokenizer.
        text_encoder: folder with `text_encoder/` and `tokenizer/`, T5's, for a model with cross-attention; None leaves them out,
            and calls give embeddings. Copied as they are.
        diffusion_decoder: folder of a `CosmosDiffusionDecoderPipeline` for the tokenizer's codes. Copied as it is.

    Raises ValueError, before anything is written, where the parts do not fit each other.
    """
    folder, config, copied = Path(folder), model.config, {}
    parts = dict(vae=_read_tokenizer(vae), transformer=model)
    if text_encoder is not None:
        if config.cross_attention_dim is None:
            raise ValueError("this model has no cross-attention: leave the text encoder out")
        copied |= {name: Path(text_encoder) / name for name in ("text_encoder", "tokenizer")}
        if missing := [name for name, source in copied.items() if not source.is_dir()]:
            raise ValueError(f"{text_encoder} has no folder {' and no '.join(missing)}: give one with both, T5's")
        parts["text_encoder"] = bare_text_encoder(text_encoder)
        parts["tokenizer"] = AutoTokenizer.from_pretrained(copied["tokenizer"])
    if diffusion_decoder is not None:
        copied["diffusion_decoder"] = Path(diffusion_decoder)
        parts["diffusion_decoder"] = bare_decoder(diffusion_decoder)
    size = trained_size(config, parts["vae"])
    pipeline, problems = CosmosAutoregressivePipeline(**parts, **size), []
    check_fit(pipeline, True, [], problems)
    if problems:
        raise ValueError("\n".join(problems))
    for name in ("vae", "transformer"):
        parts[name].save_pretrained(folder / name)
    for name, source in copied.items():
        _copy(source, folder / name)
    pipeline.save_config(folder)


def read_prompt(file: str | Path) -> CosmosStoredPrompt:
    """The text's embedding in a published `aux_vars.pt`, zero where its mask is."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not torch.is_tensor(content.get("context")):
        there = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} must hold the tensors context and context_mask, it holds {there}")
    return CosmosStoredPrompt.of(content["context"], content.get("context_mask"))


def _read_tokenizer(folder: str | Path) -> CosmosVideoTokenizer:
    """In the precision that it is stored in."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"no such folder: {folder}; pipelines/convert_tokenizer.py makes one of a published tokenizer"
        )
    return CosmosVideoTokenizer.from_pretrained(folder, torch_dtype=_stored_dtype(folder)).eval()


def _read_index(folder: Path) -> dict:
    if not (folder / "model_index.json").exists():
        raise ValueError(f"{folder} is no pipeline's folder: it has no model_index.json")
    return translate_index(json.loads((folder / "model_index.json").read_text()))


def _transformer_config(folder: Path) -> dict:
    """With every field, whichever version wrote it."""
    with torch.device("meta"):
        model = CosmosWorldTransformer3D.from_config(CosmosWorldTransformer3D.load_config(folder / "transformer"))
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def _write_json(file: Path, values: dict):
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copy(source: Path, target: Path):
    if not source.is_dir():
        raise ValueError(f"{source} is not there, but the folder's model_index.json names it")
    shutil.copytree(source, target, dirs_exist_ok=True)


def _stored_dtype(folder: Path) -> torch.dtype:
    with safe_open(sorted(folder.glob("*.safetensors"))[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def transformer_config_to_diffusers(config) -> dict:
    """Arguments of diffusers' class for a `CosmosWorldTransformer3D`'s config; ValueError where it lacks the mechanism."""
    config = dict(config)
    for name, off in _ONLY_OURS.items():
        value = config.pop(name)
        if name not in HOW_ACTIONS_ENTER and value != off:
            raise ValueError(
                f"diffusers' CosmosTransformer3DModel has no {name} (this model: {value}): it cannot hold this model"
            )
    if config["extra_pos_embed_type"] == "sincos":
        raise ValueError(
            "diffusers' CosmosTransformer3DModel has no extra_pos_embed_type='sincos': it cannot hold this model"
        )
    return config
