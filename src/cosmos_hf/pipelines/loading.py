"""Which class a pipeline's folder is of."""

import json
from pathlib import Path

from .autoregressive import CosmosAutoregressivePipeline
from .diffusion_decoder import CosmosDiffusionDecoderPipeline
from .multiview import CosmosMultiViewPipeline
from .text2world import CosmosText2WorldPipeline
from .video2world import CosmosVideo2WorldPipeline

OURS = (
    CosmosText2WorldPipeline,
    CosmosVideo2WorldPipeline,
    CosmosMultiViewPipeline,
    CosmosAutoregressivePipeline,
    CosmosDiffusionDecoderPipeline,
)
# As published for diffusers.
THEIRS = {
    "CosmosTextToWorldPipeline": CosmosText2WorldPipeline,
    "CosmosVideoToWorldPipeline": CosmosVideo2WorldPipeline,
}


def pipeline_class(folder: str | Path, among: tuple[type, ...] = OURS) -> type:
    """The class that `model_index.json` names. ValueError where it is none `among` these; FileNotFoundError without the file."""
    index = Path(folder) / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{index} is missing: {folder} is no folder of a pipeline")
    known = {cls.__name__: cls for cls in among} | {name: cls for name, cls in THEIRS.items() if cls in among}
    name = json.loads(index.read_text()).get("_class_name")
    if name not in known:
        raise ValueError(f"{folder} holds a {name}, what is needed here is {' or '.join(known)}")
    return known[name]
