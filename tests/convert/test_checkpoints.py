"""Checkpoints from file to file: every format, sharded or not, bit-exact there and back, in the memory of one shard."""

import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cosmos_hf.convert import load_original
from cosmos_hf.convert.checkpoints import Checkpoint, parse_size, write_shards
from cosmos_hf.convert.diffusion import original_key, transformer_config
from cosmos_hf.convert.diffusion_checkpoints import convert_checkpoint, export_checkpoint
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from golden_files import golden, part, weights


@pytest.fixture(scope="module")
def original():
    tensors, _, config = golden("diffusion", "v2w_7b_tiny")
    state = weights(tensors)
    return state | {"net.blocks.block0.blocks.0.block.attn._extra_state": io.BytesIO(b"fp8")}, config, tensors


def write(path, state, kind):
    """The state dict as a checkpoint of a kind; the path to read."""
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    if kind == "pt":
        torch.save(state, path / "model.pt")
        return path / "model.pt"
    if kind == "old pt":
        torch.save({"model": tensors, "iteration": 7}, path / "old.pt", _use_new_zipfile_serialization=False)
        return path / "old.pt"
    if kind == "pt shards":
        for i, half in enumerate(halves):
            torch.save(half, path / f"model_{i}.pt")
        return path
    if kind == "safetensors":
        save_file(tensors, path / "model.safetensors")
        return path / "model.safetensors"
    weight_map = {}
    for i, half in enumerate(halves):
        save_file(half, path / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(half, f"model-{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"other": torch.zeros(1)}, path / "unrelated.safetensors")  # not named by the index
    return path


@pytest.mark.parametrize("kind", ["pt", "old pt", "pt shards", "safetensors", "safetensors shards"])
def test_every_kind_of_checkpoint_converts(original, kind, tmp_path):
    state, config, _ = original
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in", state, kind)
    head = convert_checkpoint(source, tmp_path / "out", transformer_config("VideoExtendGeneralDIT", config))
    model = CosmosWorldTransformer3D.from_pretrained(tmp_path / "out")
    expected = load_original("VideoExtendGeneralDIT", config, {k: v for k, v in state.items() if torch.is_tensor(v)})
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(head.linear.weight, state["logvar.1.weight"])


@pytest.mark.parametrize("target", ["model.pt", "shards"])
def test_the_way_back_is_bit_exact(original, target, tmp_path):
    """Original -> ours in small shards -> original, in bfloat16 as published."""
    state, config, _ = original
    state = {key: value.bfloat16() for key, value in state.items() if torch.is_tensor(value)}
    torch.save(state, tmp_path / "model.pt")
    ours = transformer_config("VideoExtendGeneralDIT", config)
    head = convert_checkpoint(tmp_path / "model.pt", tmp_path / "ours", ours, max_shard_size=200_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    export_checkpoint(
        tmp_path / "ours", tmp_path / target, uncertainty=head, dtype=torch.bfloat16, max_shard_size=300_000
    )
    back = Checkpoint(tmp_path / target)
    assert set(back.keys()) == set(state)
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in state.items())
    if target == "shards":
        files = sorted((tmp_path / target).glob("*.safetensors"))
        assert len(files) > 2 and max(file.stat().st_size for file in files) < 320_000
        convert_checkpoint(tmp_path / target, tmp_path / "again", ours)
        again, before = tensors_in(tmp_path / "again"), tensors_in(tmp_path / "ours")
        assert again.keys() == before.keys() and all(torch.equal(again[key], before[key]) for key in again)


def tensors_in(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@torch.no_grad()
def test_output_of_the_converted_network(original, tmp_path):
    """That of the same weights converted in memory; and with the full fixtures that of the reference."""
    state, config, tensors = original
    torch.save(state, tmp_path / "model.pt")
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", transformer_config("VideoExtendGeneralDIT", config))
    given = part(tensors, "inputs.main")
    given["condition_mask"] = given.pop("condition_video_input_mask")
    inputs = [given.pop(name) for name in ("x", "timesteps", "crossattn_emb")]
    of_forward = {name: given[name] for name in ("fps", "condition_mask", "padding_mask")}
    out = CosmosWorldTransformer3D.from_pretrained(tmp_path / "out")(*inputs, **of_forward).sample
    in_memory = load_original("VideoExtendGeneralDIT", config, weights(tensors))(*inputs, **of_forward).sample
    torch.testing.assert_close(out, in_memory, atol=0, rtol=0)
    torch.testing.assert_close(out, tensors.get("outputs.main.net_output", out), atol=3e-5, rtol=0)


def test_shards_are_what_diffusers_reads(original, tmp_path):
    state, config, _ = original
    torch.save(state, tmp_path / "model.pt")
    ours = transformer_config("VideoExtendGeneralDIT", config)
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", ours, dtype=torch.bfloat16, max_shard_size=500_000)
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05d}.safetensors"
    with safe_open(tmp_path / "out" / names[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", ours)  # again, into one file: nothing old is left
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from cosmos_hf.convert.diffusion_checkpoints import convert_checkpoint
from cosmos_hf.models.transformer_cosmos import PRESETS

def anonymous():  # pages of mapped files can be given back at any time and are not counted
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

class Watch(threading.Thread):
    def __init__(self):
        super().__init__()
        self.before = self.peak = anonymous()
        self.going = True
        self.start()
    def run(self):
        while self.going:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.001)
    def stop(self):
        self.going = False
        self.join()
        return self.peak - self.before

config = dict(PRESETS["tiny"], num_attention_heads=18, num_layers=4)
folder = Path(sys.argv[1])
for source, dtype in (("model.pt", None), ("model.pt", None), ("model.pt", torch.bfloat16), ("model.safetensors", None)):
    watch = Watch()
    convert_checkpoint(folder / source, folder / "out", config, dtype=dtype, max_shard_size=12_000_000)
    print(watch.stop())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_a_shard_and_a_tensor(tmp_path):
    """80 MB of weights, shards of 12 MB: the peak is far below the whole. The first of the four runs only warms up."""
    model = CosmosWorldTransformer3D(**{**PRESETS["tiny"], "num_attention_heads": 18, "num_layers": 4})
    state = {f"net.{original_key(name)}": value.clone() for name, value in model.state_dict().items()}
    whole, largest = sum(v.nbytes for v in state.values()), max(v.nbytes for v in state.values())
    for kind in ("pt", "safetensors"):
        write(tmp_path, state, kind)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in result.stdout.split()][1:]
    assert whole > 70e6 and largest > 5e6
    assert max(peaks) < 12e6 + 2 * largest, [f"{peak / 1e6:.0f} of {whole / 1e6:.0f} MB" for peak in peaks]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_wrong_checkpoints_are_refused(original, tmp_path):
    state, config, _ = original
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    ours = transformer_config("VideoExtendGeneralDIT", config)

    def refused(message, content):
        save_file(content, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", ours)

    refused(r"unknown keys \['net.stray'\]", tensors | {"net.stray": torch.zeros(1)})
    name = "net.final_layer.linear.weight"
    refused(r"missing \(our names\) \['proj_out.weight'\]", {k: v for k, v in tensors.items() if k != name})
    refused("has shape", tensors | {name: torch.zeros(64, 127)})
    refused("values that are not finite", tensors | {name: torch.full_like(tensors[name], float("nan"))})
    refused("expected 0, 1, 2", tensors | {"net.pos_embedder.seq": torch.ones(16)})


def test_paths_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no .safetensors and no .pt files"):
        Checkpoint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="must be a .pt or .safetensors file"):
        Checkpoint(tmp_path / "model.bin")
    torch.save({"a": torch.zeros(1), "b": [1, 2]}, tmp_path / "strange.pt")
    with pytest.raises(ValueError, match=r"\['b'\] are no tensors"):
        Checkpoint(tmp_path / "strange.pt")
    (tmp_path / "strange.pt").unlink()
    for i in range(2):
        save_file({"same": torch.zeros(1)}, tmp_path / f"{i}.safetensors")
    with pytest.raises(ValueError, match="holds the key same in several files"):
        Checkpoint(tmp_path)
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"same": "2.safetensors"}}))
    with pytest.raises(ValueError, match="names shards that are not there"):
        Checkpoint(tmp_path)


def test_exports_that_the_reference_cannot_hold_are_refused(tmp_path):
    for more in (dict(in_channels=22, camera_channels=6), dict(text_refiner_layers=1)):
        CosmosWorldTransformer3D(**{**PRESETS["tiny"], **more}).save_pretrained(tmp_path / "more")
        with pytest.raises(ValueError, match="no class with camera rays, real condition channels or a text refiner"):
            export_checkpoint(tmp_path / "more", tmp_path / "out")
    CosmosWorldTransformer3D(**PRESETS["tiny"]).save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"stray": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"\['stray'\] are missing or unknown"):
        export_checkpoint(tmp_path / "plain", tmp_path / "out")


def test_sizes(tmp_path):
    assert (parse_size("5GB"), parse_size("1.5 mb")) == (5 * 10**9, 1_500_000)
    with pytest.raises(ValueError, match="like 500MB or 5GB"):
        parse_size("5")
    write_shards(tmp_path, {"a": 12, "b": 12}, lambda key: torch.ones(3), max_shard_size=20, name="x")
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"},
    }
