"""Train Medusa heads for an autoregressive model: a pipeline's folder in, the same pipeline with heads out.

    accelerate launch training/train_medusa.py --config training/configs/nano_medusa.yaml --output_dir runs/nano_medusa

`<output_dir>/export` is what `CosmosAutoregressivePipeline.from_pretrained` reads; `speculative_generate` uses the heads.
"""

import logging
from functools import partial
from pathlib import Path

from cosmos_hf import CosmosAutoregressivePipeline, preflight
from cosmos_hf.training.autoregressive import ARWorldModel, check_reload, validate
from cosmos_hf.training.config import parse
from cosmos_hf.training.devices import process_state
from cosmos_hf.training.diffusion import Texts, build_datasets
from cosmos_hf.training.loop import fit
from cosmos_hf.training.medusa import MedusaBatches, MedusaConfig, MedusaLoss, build_model, own_videos


def main(argv=None):
    logging.basicConfig(level=logging.INFO)
    config = parse(MedusaConfig, argv)
    pipe = CosmosAutoregressivePipeline.from_pretrained(config.init_from)
    data, validation = build_datasets(config, pipe.vae, need_caption=config.has_text)
    texts = None
    if config.has_text:
        texts = Texts(
            config, data.captions, [caption for dataset in validation.values() for caption in dataset.captions]
        )
    model = build_model(config)
    batches = MedusaBatches(config, model.transformer.config, texts)
    if config.own_videos:
        state = process_state()
        data = own_videos(pipe.transformer.to(state.device), data, batches, state.process_index, state.num_processes)
        state.wait_for_everyone()

    def plain(trained):
        """The network without its heads: what perplexity and the comparison of a reload are about."""
        return ARWorldModel(trained.transformer)

    def export(trained, folder: Path):
        pipe.register_modules(transformer=trained.transformer)
        pipe.save_pretrained(folder)
        again = CosmosAutoregressivePipeline.from_pretrained(folder).transformer
        check_reload(plain(trained), ARWorldModel(again), batches.collate([data[0]]))
        preflight(folder, record=True)

    measure = partial(validate, batches=batches, datasets=validation, batch_size=config.batch_size)
    fit(
        model,
        MedusaLoss(config),
        data,
        config,
        collate=batches.collate,
        export=export,
        validate=(lambda trained: measure(plain(trained))) if validation else None,
    )


if __name__ == "__main__":
    main()
