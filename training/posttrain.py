"""Post-train a diffusion world model with further conditions: a pipeline's folder in, an adapter or a pipeline out.

    accelerate launch training/posttrain.py --config training/configs/nano_action.yaml --output_dir runs/action

`conditions` in the file (or `--conditions camera action`) says what to learn: camera, action, trajectory, instruction, views. With
`lora_rank` above 0 `<output_dir>/export` is a folder for `pipe.load_lora_weights`; with 0 all weights are trained and it is a whole
pipeline for `from_pretrained`.
"""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cosmos_hf import (
    CosmosMultiViewPipeline,
    CosmosText2WorldPipeline,
    CosmosVideo2WorldPipeline,
    CosmosVideoTokenizer,
    preflight,
)
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from cosmos_hf.training.conditioned_loss import ConditionedLoss, validate_conditions
from cosmos_hf.training.config import parse
from cosmos_hf.training.diffusion import Texts, WorldModel, build_datasets, check_reload
from cosmos_hf.training.loop import fit
from cosmos_hf.training.posttrain import (
    ConditionBatches,
    PosttrainConfig,
    build_model,
    export_adapter,
    find_action_spec,
    trained_on,
)


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    config = parse(PosttrainConfig, argv)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    need_caption = "instruction" in config.conditions
    data, validation = build_datasets(config, vae, need_caption, config.arrays, config.cameras)
    texts = Texts(config, data.texts, [text for dataset in validation.values() for text in dataset.texts])
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
    if config.views:
        pipeline_class = CosmosMultiViewPipeline
    if config.lora_rank:
        export_adapter(model, folder, config, batches, sample)
        again = pipeline_class.from_pretrained(config.init_from)
        again.load_lora_weights(folder)
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
    check_reload(model, WorldModel(again.transformer), batches.collate([sample])["text"])


if __name__ == "__main__":
    main()
