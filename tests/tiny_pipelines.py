"""Real components, tiny, with random weights large enough that every input matters."""

import torch

from cosmos_hf.models.ar_cosmos import PRESETS as LANGUAGE
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS as TOKENIZERS
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.transformer_cosmos import PRESETS as TRANSFORMERS
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.pipelines.autoregressive import CosmosAutoregressivePipeline
from cosmos_hf.pipelines.diffusion_decoder import CosmosDiffusionDecoderPipeline
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from cosmos_hf.training.text import build_text_encoder, train_vocabulary

SMALL = LANGUAGE["tiny"] | dict(vocab_size=1000, embedding_size=1064)
TEXT = dict(cross_attention_dim=32, absolute_positions="every_layer", bov_token_id=1000)


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


def video2world() -> CosmosVideo2WorldPipeline:
    pipe = CosmosVideo2WorldPipeline(**components("tiny-video2world"), **SETTINGS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusion_decoder(**changes) -> CosmosDiffusionDecoderPipeline:
    """Of codes of 4x16x16 pixels to latents of 4x8x8."""
    torch.manual_seed(0)
    transformer = CosmosWorldTransformer3D(**TRANSFORMERS["tiny-diffusion-decoder"])
    for name, parameter in transformer.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if name == "condition_embed.weight" else 0.1)
    parts = dict(
        transformer=transformer.eval(),
        vae=CosmosVideoTokenizer(**TOKENIZERS["tiny"], latents_mean=[0.1] * 16, latents_std=[0.5] * 16).eval(),
        scheduler=CosmosEDMScheduler(sigma_min=0.02, solver="euler"),
    )
    settings = dict(fsq_levels=(8, 5, 5, 5), code_temporal_compression=4, code_spatial_compression=16)
    settings |= dict(window_latent_frames=3, num_inference_steps=2, fps=5.0)
    pipe = CosmosDiffusionDecoderPipeline(**parts | settings | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoregressive(text: bool = False) -> CosmosAutoregressivePipeline:
    torch.manual_seed(0)
    parts = {}
    if text:
        vocabulary = train_vocabulary(["a robot arm picks up the red cube"], 300)
        parts = dict(tokenizer=vocabulary, text_encoder=build_text_encoder("tiny", len(vocabulary)).eval())
    transformer = CosmosARForCausalLM(CosmosARConfig(**SMALL | (TEXT if text else {}))).eval()
    for name, parameter in transformer.named_parameters():  # large enough that every input matters
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = CosmosAutoregressivePipeline(
        vae=CosmosVideoTokenizer(**TOKENIZERS["tiny-discrete"]).eval(), transformer=transformer, **parts,
        height=32, width=32, num_frames=9, fps=5, max_sequence_length=16,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
