"""Real components, tiny, with random weights large enough that every input matters."""

import torch

from cosmos_hf.models.autoencoder_cosmos import PRESETS as TOKENIZERS
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.transformer_cosmos import PRESETS as TRANSFORMERS
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from cosmos_hf.training.text import build_text_encoder, train_vocabulary


def components(preset: str) -> dict:
    torch.manual_seed(0)
    vocabulary = train_vocabulary(["a robot arm picks up the red cube"], 300)
    transformer = CosmosWorldTransformer3D(**TRANSFORMERS[preset])
    for parameter in transformer.parameters():  # an untrained network outputs zero
        torch.nn.init.normal_(parameter, std=0.1)
    statistics = dict(latents_mean=[0.1] * 16, latents_std=[0.5] * 16)
    return dict(
        tokenizer=vocabulary,
        text_encoder=build_text_encoder("tiny", len(vocabulary)).eval(),
        transformer=transformer.eval(),
        vae=CosmosVideoTokenizer(**TOKENIZERS["tiny"], **statistics).eval(),
        scheduler=CosmosEDMScheduler(),
    )


SETTINGS = dict(
    height=32, width=48, num_frames=9, fps=5, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=16
)
