"""Train a world model: the video tokenizer's latents or codes, and captions in, a pipeline's folder out.

    accelerate launch training/pretrain.py --config training/configs/nano_video2world.yaml --output_dir runs/video2world

`family` in the file says which kind, diffusion or autoregressive. Every setting of the file is also a flag. The run goes on
from its newest checkpoint; `<output_dir>/export` is what `CosmosVideo2WorldPipeline.from_pretrained` (or
`CosmosText2WorldPipeline`, `CosmosAutoregressivePipeline`) reads.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import T5EncoderModel

from cosmos_hf import (
    CosmosAutoregressivePipeline,
    CosmosText2WorldPipeline,
    CosmosVideo2WorldPipeline,
    CosmosVideoTokenizer,
    preflight,
)
from cosmos_hf.training import autoregressive
from cosmos_hf.training.config import family_of, parse
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
    families = {"diffusion": train_diffusion, "autoregressive": train_autoregressive}
    families[family_of(argv, tuple(families))](argv)


def train_diffusion(argv):
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


def train_autoregressive(argv):
    config = parse(autoregressive.AutoregressiveConfig, argv)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    if vae.fsq is None:
        raise ValueError(
            f"{config.vae} is a continuous tokenizer: an autoregressive model needs the codes of a discrete one"
        )
    data, validation = build_datasets(config, vae, need_caption=config.has_text)
    texts = None
    if config.has_text:
        # A base that knows no text yet has no vocabulary either; the run makes one of its own.
        known = config.init_from and (Path(config.init_from) / "tokenizer").is_dir()
        captions = [caption for dataset in validation.values() for caption in dataset.captions]
        texts = Texts(config if known else replace(config, init_from="", add_cross_attention=False, freeze_base=False,
                                                   yarn_scale=0.0), data.captions, captions)  # fmt: skip
    grid = tuple(data[0]["indices"].shape)
    model = autoregressive.build_model(config, vae.fsq.codebook_size, grid)
    batches = autoregressive.TokenBatches(config, model.transformer.config, texts)
    measure = partial(autoregressive.validate, batches=batches, datasets=validation, batch_size=config.batch_size)
    fit(
        model,
        autoregressive.AutoregressiveLoss(config),
        data,
        config,
        collate=batches.collate,
        export=partial(export_autoregressive, config=config, batches=batches, vae=vae, sample=data[0]),
        validate=measure if validation else None,
    )


def export_autoregressive(model, folder: Path, config, batches, vae, sample: dict):
    """Save the pipeline of the trained parts, load it again, compare the loss of one sample, and check the folder (`preflight`)."""
    factor, texts = vae.config.spatial_compression, batches.texts
    pipeline = CosmosAutoregressivePipeline(
        vae=vae,
        transformer=model.transformer,
        tokenizer=texts and texts.tokenizer,
        text_encoder=texts and (model.text_encoder or texts.encoder),
        height=sample["indices"].shape[1] * factor,
        width=sample["indices"].shape[2] * factor,
        num_frames=config.num_frames,
        fps=sample["fps"],
        temperature=config.temperature,
        top_p=config.top_p,
        max_sequence_length=config.max_sequence_length,
    )
    pipeline.save_pretrained(folder)
    again = CosmosAutoregressivePipeline.from_pretrained(folder)
    encoder = again.text_encoder if model.text_encoder is not None else None
    autoregressive.check_reload(
        model, autoregressive.ARWorldModel(again.transformer, encoder), batches.collate([sample])
    )
    preflight(folder, record=True)


if __name__ == "__main__":
    main()
