"""Pipelines of tiny components."""

import pytest
import torch

from cosmos_hf.pipelines.text2world import CosmosText2WorldPipeline
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from tiny_pipelines import SETTINGS, components


@pytest.fixture
def two_threads():
    """With one, PyTorch computes small convolutions in another way, which takes buffers and other layouts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


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
