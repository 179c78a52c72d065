"""Train a tokenizer: of videos or of images, continuous or discrete.

    accelerate launch training/train_tokenizer.py --config training/configs/nano_tokenizer.yaml --output_dir runs/tokenizer

Every setting of the file is also a flag. The run goes on from its newest checkpoint; `<output_dir>/export` holds the
result, a continuous one with the statistics of its latents, as `CosmosVideoTokenizer.from_pretrained` (or
`CosmosImageTokenizer`) reads it. With `--freeze_encoder` latents and statistics stay those of the tokenizer it started from.
"""

import logging
from functools import partial
from pathlib import Path

from accelerate import PartialState

from cosmos_hf.data.clips import collate_clips
from cosmos_hf.models.tokenizer_kinds import load_tokenizer
from cosmos_hf.training.adversarial import fit_adversarial
from cosmos_hf.training.config import TokenizerConfig, parse
from cosmos_hf.training.loop import fit
from cosmos_hf.training.tokenizer import (
    build_dataset,
    build_loss,
    build_model,
    build_whole,
    compute_latent_stats,
    export,
    validate,
)


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    config = parse(TokenizerConfig, argv)
    train = fit_adversarial if config.adversarial_weight else fit
    model = build_model(config)
    train(
        model,
        build_loss(config, model),
        build_dataset(config),
        config,
        collate=collate_clips,
        export=export,
        validate=partial(validate, config=config) if config.val_data else None,
    )
    if PartialState().is_main_process:
        folder = Path(config.output_dir) / "export"
        tokenizer = load_tokenizer(folder)
        kept = config.freeze_encoder and tokenizer.config.latents_mean is not None
        if tokenizer.fsq is None and not kept:
            compute_latent_stats(tokenizer, build_whole(config, config.data))
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
