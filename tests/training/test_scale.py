"""Two processes: the same losses as one, sharded checkpoints that resume exactly, an export that loads in one process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cosmos_hf.models.ar_cosmos import CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.training.memory import GIB, estimate_memory
from scale_problem import read_log, run, run_language

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "training" / "launch"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process that sees all the samples of two."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, max_steps=4, batch_size=2, gradient_accumulation=2)
    run_language(folder / "language", max_steps=3, batch_size=2, gradient_accumulation=2)
    return folder


def environment(name: str) -> dict:
    """What `accelerate launch --config_file training/launch/<name>.yaml` sets, for processors in place of GPUs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(LAUNCH / f"{name}.yaml"), "script.py"])
    arguments, _, precision_from_file = _validate_launch_command(arguments)
    fields = list(yaml.safe_load((LAUNCH / f"{name}.yaml").read_text()).get("deepspeed_config", {}))
    fields += ["mixed_precision"] * precision_from_file
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    given = prepare_deepspeed_cmd_env(arguments)[1] if "zero" in name else prepare_multi_gpu_env(arguments)
    kept = {key: value for key, value in given.items() if key.startswith(("FSDP_", "ACCELERATE_"))}
    kept |= {"DS_ACCELERATOR": "cpu"} if "zero" in name else {"ACCELERATE_USE_CPU": "true"}
    kept["OMP_NUM_THREADS"] = "1"
    kept["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"
    return {**os.environ, **kept}


def launch(name: str, kind: str, folder: Path):
    program = [str(ROOT / "tests" / "scale_problem.py"), str(folder), kind]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, *program], check=True, env=environment(name), timeout=400, cwd=ROOT)


def check(folder: Path, alone: Path):
    steps, *_ = zip(*read_log(folder / "straight"), strict=True)
    assert steps == (1, 2, 3, 4)
    assert read_log(folder / "straight") == read_log(folder / "cut")
    for (_, loss, norm), (_, wanted, wanted_norm) in zip(read_log(folder / "straight"), read_log(alone), strict=True):
        assert loss == pytest.approx(wanted, rel=1e-4)
        assert norm == pytest.approx(wanted_norm, rel=1e-3)
    models = [CosmosVideoTokenizer.from_pretrained(path / "export") for path in (folder / "straight", alone)]
    for ours, wanted in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-5)
    assert {p.dtype for p in models[0].parameters()} == {torch.float32}
    for (_, loss, _), (_, wanted, _) in zip(read_log(folder / "bf16"), read_log(alone), strict=False):
        assert loss != wanted and loss == pytest.approx(wanted, rel=0.03)
    exported = load_file(folder / "bf16" / "export" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in exported.values())
    assert not [file for file in (folder / "straight" / "export").iterdir() if "index" in file.name]
    check_language(folder / "language", alone / "language")
    lines = [json.loads(line) for line in (folder / "told" / "log.jsonl").read_text().splitlines()]
    assert [line["contrast_ratio"] != 1 for line in lines if "loss" in line] == [True] * 3


def check_language(folder: Path, alone: Path):
    """The same losses as one process, and a saved model that loads in one."""
    ours, wanted = read_log(folder), read_log(alone)
    assert [step for step, *_ in ours] == [1, 2, 3]
    for (_, loss, norm), (_, wanted_loss, wanted_norm) in zip(ours, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-4)
        assert norm == pytest.approx(wanted_norm, rel=1e-3)
    models = [CosmosARForCausalLM.from_pretrained(path / "export") for path in (folder, alone)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_ddp(tmp_path, alone):
    launch("ddp", "MULTI_CPU", tmp_path)
    check(tmp_path, alone)
    # The same samples, whoever sees them: one process goes on where two stopped.
    shutil.copytree(alone, tmp_path / "alone")
    ours, wanted = (
        run(tmp_path / name, max_steps=5, batch_size=2, gradient_accumulation=2)[-1] for name in ("straight", "alone")
    )
    assert ours == pytest.approx(wanted, rel=1e-3) and ours[0] == 5
    lines = [json.loads(line) for line in (tmp_path / "adversarial" / "log.jsonl").read_text().splitlines()]
    assert ["fooling" in line for line in lines] == [False, True, True]


def test_fsdp2(tmp_path, alone):
    launch("fsdp2", "FSDP", tmp_path)
    check(tmp_path, alone)
    assert list((tmp_path / "straight" / "checkpoint-00000004").rglob("*.distcp"))
    assert len(read_log(tmp_path / "world")) == 4 and read_log(tmp_path / "world") == read_log(tmp_path / "world_cut")
    assert (tmp_path / "world" / "export" / "text_encoder" / "model.safetensors").exists()
    held = [json.loads((tmp_path / "straight" / f"memory-{rank}.json").read_text()) for rank in (0, 1)]
    size = sum(p.numel() for p in CosmosVideoTokenizer(**PRESETS["tiny"]).parameters())
    told = estimate_memory(size, "fsdp2", 2)
    for name in held[0]:  # shards are padded to equal rows, and a scalar's other half is empty
        assert sum(part[name] for part in held) / 2 == pytest.approx(told[name] * GIB, rel=0.01), name


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'cosmos-hf[deepspeed]'")
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed(tmp_path, alone, name):
    launch(name, "DEEPSPEED", tmp_path)
    check(tmp_path, alone)


def test_launch_files_name_what_is_there():
    for path in LAUNCH.glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert settings["distributed_type"] in ("MULTI_GPU", "FSDP", "DEEPSPEED")
        if file := settings.get("deepspeed_config", {}).get("deepspeed_config_file"):
            assert json.loads((ROOT / file).read_text())["zero_optimization"]["stage"] == int(path.stem[-1])
