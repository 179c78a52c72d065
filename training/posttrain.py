"""Post-train a diffusion world model with further conditions: a pipeline's folder in, an adapter or a pipeline out.

    accelerate launch training/posttrain.py --config training/configs/nano_action.yaml --output_dir runs/action

`conditions` in the file (or `--conditions camera action`) says what to learn. With `lora_rank` above 0 `<output_dir>/export` is a
folder for `pipe.load_lora_weights`; with 0 all weights are trained and it is a whole pipeline for `from_pretrained`.
"""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cosmos_hf import CosmosText2WorldPipeline, CosmosVideo2WorldPipeline, CosmosVideoTokenizer, preflight
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from cosmos_hf.training.config import parse
from cosmos_hf.training.diffusion import Texts, WorldModel, build_datasets, check_reload
from cosmos_hf.training.loop import fit
from cosmos_hf.training.posttrain import (
    ConditionBatches,
    ConditionedLoss,
    PosttrainConfig,
    build_model,
    export_adapter,
    find_action_spec,
    validate_conditions,
)


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    config = parse(PosttrainConfig, argv)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    data, validation = build_datasets(config, vae, "instruction" in config.conditions, config.arrays)
    texts = Texts(config, data.captions, [caption for dataset in validation.values() for caption in dataset.captions])
    batches = ConditionBatches(config, texts, vae, find_action_spec(config, data))
    model = build_model(config, batches.action_dim)
    scheduler = CosmosEDMScheduler.from_pretrained(config.init_from, subfolder="scheduler")
    loss = ConditionedLoss(config, scheduler, model.transformer.takes_condition_mask)
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
    if config.lora_rank:
        export_adapter(model, folder, config, batches)
        again = pipeline_class.from_pretrained(config.init_from)
        again.load_lora_weights(folder)
    else:
        pipe = pipeline_class.from_pretrained(config.init_from, transformer=model.transformer)
        spec = batches.spec and asdict(batches.spec)
        pipe.register_to_config(num_frames=config.num_frames, fps=sample["fps"], action_spec=spec)
        pipe.save_pretrained(folder)
        if model.uncertainty is not None:
            model.uncertainty.save_pretrained(folder / "uncertainty")
        again = pipeline_class.from_pretrained(folder)
        preflight(folder, record=True)
    check_reload(model, WorldModel(again.transformer), batches.collate([sample])["text"])


if __name__ == "__main__":
    main()
