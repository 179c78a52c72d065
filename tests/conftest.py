"""Settings of every test: no network, no GPU, few threads, the same draws."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Runs would train on a GPU, and tests compare what they trained with tensors of the processor.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Threads that wait by spinning make every test several times slower on a machine that also does something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny Video2World pipeline, which post-training starts from; nobody writes into it."""
    from tiny_pipelines import video2world

    folder = tmp_path_factory.mktemp("base")
    video2world().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def renderer():
    """The name of the best renderer that runs here; tests that need one are skipped where none does."""
    from cosmos_hf.worlds.render import choose_renderer

    try:
        return choose_renderer()
    except RuntimeError as error:
        pytest.skip(f"no renderer runs on this machine: {error}")
