"""Every YAML in training/configs parses, and what it describes builds on the meta device."""

from pathlib import Path

import pytest
import torch
import yaml

from cosmos_hf.training import (
    autoregressive,
    decoder,
    diffusion,
    medusa,
    posttrain,
    posttrain_autoregressive,
    tokenizer,
)
from cosmos_hf.training.config import TokenizerConfig, parse

FILES = sorted((Path(__file__).parents[1] / "training" / "configs").glob("*.yaml"))
PARAMETERS = {  # millions, of the network that the run trains
    "cosmos_7b_text2world": 7236,
    "cosmos_7b_video2world": 7236,
    "cosmos_14b_text2world": 14267,
    "cosmos_14b_video2world": 14267,
    "nano_video2world": 6.9,
    "nano_tokenizer": 3.0,
    "nano_tokenizer_discrete": 3.0,
    "nano_autoregressive": 5.78,
    "cosmos_4b_autoregressive": 4014,
    "cosmos_7b_diffusion_decoder": 7237,
    "nano_diffusion_decoder": 4.8,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_windows_cover_the_clips_of_the_worlds(path):
    """The driving world's clips have 17 frames, the others' 33, at whose beginning it is decided which object is meant."""
    settings = yaml.safe_load(path.read_text())
    if settings.get("conditions") == ["instruction"]:
        assert settings["window_starts"] == [0, 1]
        return
    length = 17 if any("driving/" in name for name in settings["data"]) else 33
    starts, num_frames = settings.get("window_starts", []), settings.get("num_frames", 17)
    seen = {frame for start in starts for frame in range(start, min(start + num_frames, length))}
    assert not starts or seen == set(range(length))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds(path):
    settings = yaml.safe_load(path.read_text())
    kinds = {
        None: (tokenizer, TokenizerConfig),
        "diffusion": (diffusion, diffusion.DiffusionConfig),
        "autoregressive": (autoregressive, autoregressive.AutoregressiveConfig),
        "decoder": (decoder, decoder.DecoderConfig),
        "medusa": (medusa, medusa.MedusaConfig),
        "posttrain diffusion": (posttrain, posttrain.PosttrainConfig),
        "posttrain autoregressive": (posttrain_autoregressive, posttrain_autoregressive.ARPosttrainConfig),
    }
    family = settings.get("family")
    family, settings_class = kinds[f"posttrain {family}" if "conditions" in settings else family]
    config = parse(settings_class, ["--config", str(path)])
    for name, value in settings.items():
        assert getattr(config, name) == value, name
    if config.init_from:
        return  # its size is that of the run that it goes on from
    with torch.device("meta"):
        model = family.build_model(config)
    network = model if family is tokenizer else model.transformer
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS.get(path.stem, millions), rel=0.02)


def test_the_table_names_files_that_are_there():
    assert set(PARAMETERS) <= {path.stem for path in FILES}
