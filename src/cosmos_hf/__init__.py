"""Cosmos-1 world foundation models (arXiv 2501.03575), native to Hugging Face.

Public names are resolved on first use (PEP 562), so `import cosmos_hf` costs a millisecond and loads no torch.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "CosmosARConfig": "models.ar_cosmos",
    "CosmosARForCausalLM": "models.ar_cosmos",
    "CosmosAutoregressivePipeline": "pipelines.autoregressive",
    "CosmosDiffusionDecoderPipeline": "pipelines.diffusion_decoder",
    "CosmosEDMScheduler": "schedulers.scheduling_edm_cosmos",
    "CosmosMultiViewPipeline": "pipelines.multiview",
    "CosmosPromptUpsampler": "pipelines.prompt_upsampler",
    "CosmosImageTokenizer": "models.autoencoder_cosmos_image",
    "CosmosText2WorldPipeline": "pipelines.text2world",
    "CosmosVideo2WorldPipeline": "pipelines.video2world",
    "CosmosVideoTokenizer": "models.autoencoder_cosmos",
    "CosmosWorldTransformer3D": "models.transformer_cosmos",
    "estimate_memory": "pipelines.memory",
    "nano_path": "nano",
    "rollout": "pipelines.rollout",
    "preflight": "pipelines.preflight",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'cosmos_hf' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"cosmos_hf.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
