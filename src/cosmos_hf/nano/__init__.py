"""The bundled nano models: the published architectures with small configs, trained by the scripts in `training/`; and adapters."""

from pathlib import Path

MODELS = {
    "video2world": "nano-video2world",
    "autoregressive": "nano-autoregressive-tabletop",
    # adapters of video2world
    "action": "nano-action",
    "camera": "nano-camera",
    "views": "nano-views",
    "instruction": "nano-instruction",
}


def nano_path(name: str = "video2world") -> str:
    """Folder of a bundled model, for `from_pretrained`, or adapter, for `load_lora_weights`.

    Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"no bundled model {name!r}; there is {', '.join(MODELS)}")
    return str(Path(__file__).parent / MODELS[name])
