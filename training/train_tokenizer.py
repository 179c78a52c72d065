"""Train a video tokenizer.

    accelerate launch training/train_tokenizer.py --config training/configs/nano_tokenizer.yaml --output_dir runs/tokenizer

Every setting of the file is also a flag. The run goes on from its newest checkpoint; `<output_dir>/export` holds the
result with the statistics of its latents, as `CosmosVideoTokenizer.from_pretrained` reads it.
"""

import logging
from functools import partial
from pathlib import Path

from accelerate import PartialState

from cosmos_hf import CosmosVideoTokenizer
from cosmos_hf.data.clips import ClipDataset, collate_clips
from cosmos_hf.training.adversarial import fit_adversarial
from cosmos_hf.training.config import TokenizerConfig, parse
from cosmos_hf.training.loop import fit
from cosmos_hf.training.losses import ReconstructionLoss
from cosmos_hf.training.tokenizer import build_dataset, build_model, compute_latent_stats, export, validate


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    config = parse(TokenizerConfig, argv)
    train = fit_adversarial if config.adversarial_weight else fit
    train(
        build_model(config),
        ReconstructionLoss(config),
        build_dataset(config),
        config,
        collate=collate_clips,
        export=export,
        validate=partial(validate, config=config) if config.val_data else None,
    )
    if PartialState().is_main_process:
        folder = Path(config.output_dir) / "export"
        tokenizer = CosmosVideoTokenizer.from_pretrained(folder)
        compute_latent_stats(tokenizer, ClipDataset(config.data, num_frames=config.num_frames))
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
