"""Pipelines of tiny components."""

import pytest

import tiny_pipelines
from cosmos_hf.pipelines.text2world import CosmosText2WorldPipeline
from tiny_pipelines import SETTINGS, components


@pytest.fixture(scope="session")
def video2world():
    return tiny_pipelines.video2world()


@pytest.fixture(scope="session")
def text2world():
    pipe = CosmosText2WorldPipeline(**components("tiny"), **SETTINGS)
    pipe.set_progress_bar_config(disable=True)
    return pipe
