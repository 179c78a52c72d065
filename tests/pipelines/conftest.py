"""Pipelines of tiny components."""

import pytest

from cosmos_hf.pipelines.text2world import CosmosText2WorldPipeline
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from tiny_pipelines import SETTINGS, components


@pytest.fixture(scope="session")
def video2world():
    pipe = CosmosVideo2WorldPipeline(**components("tiny-video2world"), **SETTINGS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def text2world():
    pipe = CosmosText2WorldPipeline(**components("tiny"), **SETTINGS)
    pipe.set_progress_bar_config(disable=True)
    return pipe
