"""Several processes compute what one does: tokens split, heads split, weights sharded. The checks: tests/parallel_problem.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig

from cosmos_hf import CosmosVideo2WorldPipeline
from parallel_problem import build
from tiny_pipelines import SETTINGS, components

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    CosmosVideo2WorldPipeline(**components("tiny-video2world"), **SETTINGS).save_pretrained(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | dict(
        CUDA_VISIBLE_DEVICES="",  # gloo is for processors
        OMP_NUM_THREADS="1",
        PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}",
        TOKENIZERS_PARALLELISM="false",
    )
    program = [str(ROOT / "tests" / "parallel_problem.py"), str(tmp_path)]
    subprocess.run([*launcher, *program], check=True, env=environment, timeout=400, cwd=ROOT)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="diffusers' own refusal, with an accelerator")
@pytest.mark.parametrize("config", [ContextParallelConfig(ulysses_degree=2), TensorParallelConfig(tp_degree=2)])
def test_one_process_is_refused(config):
    with pytest.raises(RuntimeError, match="launch with torchrun and call init_process_group"):
        build().enable_parallelism(config=config)


def test_other_configs_are_refused():
    with pytest.raises(
        ValueError, match="config must be a ContextParallelConfig, TensorParallelConfig or ParallelConfig"
    ):
        build().enable_parallelism(config={"ulysses_degree": 2})
