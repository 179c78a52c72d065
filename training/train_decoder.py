"""Train a diffusion decoder: two tokenizers and clips in, the folder of a decoder out.

    accelerate launch training/train_decoder.py --config training/configs/nano_diffusion_decoder.yaml --output_dir runs/decoder

It learns to generate the latents of a continuous tokenizer (`vae`) from the codes of a discrete one (`codes`). Every setting of
the file is also a flag. `<output_dir>/export` is what `CosmosDiffusionDecoderPipeline.from_pretrained` reads, and what a
`CosmosAutoregressivePipeline` with the same discrete tokenizer takes as its `diffusion_decoder`.
"""

import logging
from functools import partial
from pathlib import Path

from cosmos_hf import CosmosDiffusionDecoderPipeline, preflight
from cosmos_hf.training.config import parse
from cosmos_hf.training.decoder import (
    DecoderConfig,
    DecoderLoss,
    PairBatches,
    build_model,
    build_pairs,
    build_scheduler,
    load_tokenizers,
    validate_decoder,
)
from cosmos_hf.training.diffusion import Texts, WorldModel, check_reload
from cosmos_hf.training.loop import fit


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    config = parse(DecoderConfig, argv)
    vae, codes, grid = load_tokenizers(config)
    data, validation = build_pairs(config, vae, codes, grid)
    model, scheduler = build_model(config, codes.fsq.codebook_size), build_scheduler(config)
    texts = None
    if config.has_text:
        texts = Texts(config, data.captions, [text for dataset in validation.values() for text in dataset.captions])
    batches = PairBatches(config, texts, model.transformer.config.text_embed_dim)
    loss = DecoderLoss(config, scheduler, takes_condition_mask=False)
    measure = dict(loss=loss, batches=batches, datasets=validation, batch_size=config.batch_size)
    fit(
        model,
        loss,
        data,
        config,
        collate=batches.collate,
        export=partial(
            export, config=config, batches=batches, vae=vae, codes=codes, scheduler=scheduler, sample=data[0]
        ),
        validate=partial(validate_decoder, **measure) if validation else None,
    )


def export(model: WorldModel, folder: Path, config: DecoderConfig, batches, vae, codes, scheduler, sample: dict):
    """Save the pipeline of the trained network, load it again, compare one forward pass, and check the folder (`preflight`)."""
    pipeline = CosmosDiffusionDecoderPipeline(
        transformer=model.transformer,
        vae=vae,
        scheduler=scheduler,
        fsq_levels=codes.fsq.levels,
        code_temporal_compression=codes.config.temporal_compression,
        code_spatial_compression=codes.config.spatial_compression,
        window_latent_frames=sample["latents"].shape[1],
        fps=sample["fps"],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        takes_text=config.has_text,
    )
    pipeline.check_tokenizer(codes)
    pipeline.save_pretrained(folder)
    if model.uncertainty is not None:
        model.uncertainty.save_pretrained(folder / "uncertainty")
    again = CosmosDiffusionDecoderPipeline.from_pretrained(folder)
    check_reload(model, WorldModel(again.transformer), batches.collate([sample])["text"])
    preflight(folder, record=True)


if __name__ == "__main__":
    main()
