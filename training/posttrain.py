"""Post-train a world model with further conditions: a pipeline's folder in, an adapter or a pipeline out.

    accelerate launch training/posttrain.py --config training/configs/nano_action.yaml --output_dir runs/action

`family` in the file says of which kind the base is, diffusion or autoregressive, and `conditions` (or `--conditions camera
action`) what to learn: camera, action, trajectory, instruction, views. With `lora_rank` above 0 `<output_dir>/export` is a folder
for `pipe.load_lora_weights`; with 0 all weights are trained and it is a whole pipeline for `from_pretrained`. `base_precision: nf4`
keeps the base in 4 bits (QLoRA).
"""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cosmos_hf import (
    CosmosAutoregressivePipeline,
    CosmosMultiViewPipeline,
    CosmosText2WorldPipeline,
    CosmosVideo2WorldPipeline,
    CosmosVideoTokenizer,
    preflight,
)
from cosmos_hf.training import autoregressive
from cosmos_hf.training import posttrain_autoregressive as ar
from cosmos_hf.training.action_specs import find_action_spec
from cosmos_hf.training.adaptation import comparing, load_trained
from cosmos_hf.training.conditioned_loss import ConditionedLoss, validate_conditions
from cosmos_hf.training.config import family_of, parse
from cosmos_hf.training.diffusion import Texts, WorldModel, build_datasets, check_reload
from cosmos_hf.training.loop import fit
from cosmos_hf.training.posttrain import (
    ConditionBatches,
    PosttrainConfig,
    build_model,
    build_scheduler,
    export_adapter,
    trained_on,
)


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    families = {"diffusion": posttrain_diffusion, "autoregressive": posttrain_autoregressive}
    families[family_of(argv, tuple(families))](argv)


def posttrain_diffusion(argv):
    config = parse(PosttrainConfig, argv)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    need_caption = "instruction" in config.conditions
    data, validation = build_datasets(config, vae, need_caption, config.arrays, config.cameras)
    texts = Texts(config, data.texts, [text for dataset in validation.values() for text in dataset.texts])
    batches = ConditionBatches(config, texts, vae, find_action_spec(config, data, validation))
    model = build_model(config, batches.action_dim)
    loss = ConditionedLoss(config, build_scheduler(config), model.transformer.takes_condition_mask)
    measure = dict(loss=loss, batches=batches, datasets=validation, batch_size=config.batch_size)
    fit(
        model,
        loss,
        data,
        config,
        collate=batches.collate,
        export=partial(export, config=config, batches=batches, sample=data[0]),
        validate=partial(validate_conditions, **measure) if validation else None,
    )


def export(model: WorldModel, folder: Path, config: PosttrainConfig, batches: ConditionBatches, sample: dict):
    """Save the adapter or the pipeline, load it again and compare one forward pass."""
    takes_frames = model.transformer.takes_condition_mask
    pipeline_class = CosmosVideo2WorldPipeline if takes_frames else CosmosText2WorldPipeline
    if config.views:
        pipeline_class = CosmosMultiViewPipeline
    if config.lora_rank:
        export_adapter(model, folder, config, batches, sample)
        again = load_trained(pipeline_class, folder, config)
    else:
        pipe = pipeline_class.from_pretrained(config.init_from, transformer=model.transformer)
        spec = batches.spec and asdict(batches.spec)
        settings = trained_on(config, batches, sample) | dict(views=config.views or None)
        pipe.register_to_config(action_spec=spec, **settings)
        pipe.save_pretrained(folder)
        if model.uncertainty is not None:
            model.uncertainty.save_pretrained(folder / "uncertainty")
        again = pipeline_class.from_pretrained(folder)
        preflight(folder, record=True)
    with comparing(config, model.transformer.device):
        check_reload(model, WorldModel(again.transformer), batches.collate([sample])["text"])


def posttrain_autoregressive(argv):
    config = parse(ar.ARPosttrainConfig, argv)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    data, validation = build_datasets(config, vae, "instruction" in config.conditions, config.arrays, config.cameras)
    captions = [caption for dataset in validation.values() for caption in dataset.captions]
    texts = Texts(config, data.captions, captions) if config.has_text else None
    spec = find_action_spec(config, data, validation)
    model, changes = ar.build_model(config, spec, vae.config.temporal_compression)
    batches = ar.ConditionTokens(config, model.transformer.config, texts, spec, vae)
    loss = ar.ARConditionedLoss(config)
    measure = dict(loss=loss, batches=batches, datasets=validation, batch_size=config.batch_size)
    fit(
        model,
        loss,
        data,
        config,
        collate=batches.collate,
        export=partial(export_autoregressive, config=config, changes=changes, batches=batches, sample=data[0]),
        validate=partial(ar.validate_conditions, **measure) if validation else None,
    )


def export_autoregressive(model, folder: Path, config: ar.ARPosttrainConfig, changes: dict, batches, sample: dict):
    """Save the adapter or the pipeline, load it again and compare the loss of one sample."""
    if config.lora_rank:
        ar.export_adapter(model, folder, config, changes, batches, sample)
        again = load_trained(CosmosAutoregressivePipeline, folder, config)
    else:
        texts = batches.texts
        parts = {} if texts is None else {"tokenizer": texts.tokenizer, "text_encoder": texts.encoder}
        pipe = CosmosAutoregressivePipeline.from_pretrained(config.init_from, transformer=model.transformer, **parts)
        settings = ar.trained_on(config, batches, sample) | dict(views=config.views or None)
        settings["max_sequence_length"] = config.max_sequence_length
        pipe.register_to_config(action_spec=batches.spec and asdict(batches.spec), **settings)
        pipe.save_pretrained(folder)
        again = CosmosAutoregressivePipeline.from_pretrained(folder)
        preflight(folder, record=True)
    with comparing(config, model.transformer.device):
        autoregressive.check_reload(model, autoregressive.ARWorldModel(again.transformer), batches.collate([sample]))


if __name__ == "__main__":
    main()
