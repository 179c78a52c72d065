"""`python -m cosmos_hf doctor`: a whole model, and models that lack something."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_hf import nano_path
from cosmos_hf.__main__ import main
from cosmos_hf.doctor import examine_model


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(nano_path(), tmp_path / "model")


def problems(folder):
    return [finding.text for finding in examine_model(folder) if finding.problem]


def test_report_of_this_installation(capsys):
    status = main(["doctor"])
    said = capsys.readouterr().out
    for words in (
        "Python ",
        "cosmos-hf ",
        "processor cores",
        "optional part `train`",
        "transformer: CosmosWorldTransformer3D",
        "in memory",
    ):
        assert words in said, words
    assert status == 0 and "nothing is missing" in said


def test_the_model_check_is_light():
    code = (
        "import sys; from cosmos_hf.doctor import examine_model; from cosmos_hf import nano_path; examine_model(nano_path());"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_parts_are_named(model, capsys):
    shutil.rmtree(model / "text_encoder")
    (model / "tokenizer" / "tokenizer.json").unlink()
    (model / "scheduler" / "scheduler_config.json").unlink()
    (model / "vae" / "config.json").unlink()
    text = "\n".join(problems(model))
    assert "text_encoder: the folder" in text and "neither tokenizer.json nor spiece.model" in text
    assert "scheduler_config.json is missing" in text and "vae" in text
    assert main(["doctor", str(model)]) == 1
    assert "PROBLEM: text_encoder" in capsys.readouterr().out


def test_damaged_weights_are_named(model):
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert f"has {len(whole) - 100} bytes instead of {len(whole)}: download it again" in problems(model)[0]
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "is a Git LFS pointer" in problems(model)[0]
    weights.unlink()
    assert "no .safetensors file" in problems(model)[0]
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    (model / "transformer" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert problems(model) == ["transformer: 2 of 2 shards are missing: one.safetensors, two.safetensors"]


def test_a_library_that_is_not_installed_is_named(model):
    index = json.loads((model / "model_index.json").read_text())
    index |= {"guardrail": ["no_such_library", "Checker"], "upsampler": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index))
    assert problems(model) == ["guardrail: Checker is of no_such_library, which is not installed"]


def test_a_model_larger_than_the_gpu_is_told_what_to_do():
    size = sum(path.stat().st_size for path in Path(nano_path()).rglob("*.safetensors"))
    assert not [f for f in examine_model(nano_path(), 2 * size) if "GPU" in f.text]
    (told,) = [f for f in examine_model(nano_path(), size - 10**6) if "GPU" in f.text]
    assert (
        "pipe.enable_model_cpu_offload()" in told.text
        and "transformer is the largest" in told.text
        and not told.problem
    )
    (told,) = [f for f in examine_model(nano_path(), 10**6) if "GPU" in f.text]
    assert told.problem


def test_what_is_no_model_is_told(tmp_path):
    assert "hf download someone/some-model" in problems("someone/some-model")[0]
    assert "no model_index.json" in problems(tmp_path)[0]
