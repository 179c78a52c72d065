"""Train a world model: the video tokenizer's latents and captions in, a pipeline's folder out.

    accelerate launch training/pretrain.py --config training/configs/nano_video2world.yaml --output_dir runs/video2world

Every setting of the file is also a flag. The run goes on from its newest checkpoint; `<output_dir>/export` is what
`CosmosVideo2WorldPipeline.from_pretrained` (or `CosmosText2WorldPipeline`) reads.
"""

import logging
from functools import partial
from pathlib import Path

from transformers import T5EncoderModel

from cosmos_hf import CosmosText2WorldPipeline, CosmosVideo2WorldPipeline, CosmosVideoTokenizer, preflight
from cosmos_hf.training.config import parse
from cosmos_hf.training.diffusion import (
    DiffusionConfig,
    DiffusionLoss,
    Texts,
    WorldModel,
    build_datasets,
    build_model,
    build_scheduler,
    check_reload,
    validate,
)
from cosmos_hf.training.loop import fit


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    config = parse(DiffusionConfig, argv)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    data, validation = build_datasets(config, vae)
    texts = Texts(config, data.captions, [caption for dataset in validation.values() for caption in dataset.captions])
    model, scheduler = build_model(config), build_scheduler(config)
    loss = DiffusionLoss(config, scheduler, model.transformer.takes_condition_mask)
    fit(
        model,
        loss,
        data,
        config,
        collate=texts.collate,
        export=partial(export, config=config, texts=texts, vae=vae, scheduler=scheduler, sample=data[0]),
        validate=partial(validate, loss=loss, texts=texts, datasets=validation, batch_size=config.batch_size)
        if validation
        else None,
    )


def export(model: WorldModel, folder: Path, config: DiffusionConfig, texts: Texts, vae, scheduler, sample: dict):
    """Save the pipeline of the trained parts, load it again, compare one forward pass, and check the folder (`preflight`)."""
    takes_frames = model.transformer.takes_condition_mask
    pipeline_class = CosmosVideo2WorldPipeline if takes_frames else CosmosText2WorldPipeline
    factor = vae.config.spatial_compression
    height, width = (size * factor for size in sample["latents"].shape[2:])
    pipeline = pipeline_class(
        tokenizer=texts.tokenizer,
        text_encoder=model.text_encoder or texts.encoder,
        transformer=model.transformer,
        vae=vae,
        scheduler=scheduler,
        height=height,
        width=width,
        num_frames=config.num_frames,
        fps=sample["fps"],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        max_sequence_length=config.max_sequence_length,
    )
    pipeline.save_pretrained(folder)
    if model.uncertainty is not None:
        model.uncertainty.save_pretrained(folder / "uncertainty")
    again = pipeline_class.from_pretrained(folder)
    encoder = again.text_encoder if isinstance(model.text_encoder, T5EncoderModel) else None
    check_reload(model, WorldModel(again.transformer, encoder), texts.collate([sample])["text"])
    preflight(folder, record=True)


if __name__ == "__main__":
    main()
