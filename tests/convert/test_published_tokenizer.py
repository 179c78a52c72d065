"""Published files to our layout: TorchScript made here from tiny networks under the reference's names."""

import pytest
import torch
from safetensors.torch import save_file

from cosmos_hf.convert.compare_torchscript import compare_with_torchscript
from cosmos_hf.convert.published_tokenizer import (
    build_preset,
    convert_tokenizer_files,
    find_files,
    preset_of,
    read_checkpoint,
    read_mean_std,
)
from golden_files import golden_json
from torchscript_files import fixture, save_torchscript

FIXTURES = {"cv8x8x8_p4": "cv8x8x8", "cv4x8x8_p2": "cv4x8x8-360p", "ci16x16_p4": "ci16x16", "di8x8_p4": "di8x8"}
CONSTANTS = {"wavelets", "_arange", "patch_size_buffer", "_levels", "_basis", "implicit_codebook"}
SIZES = ("channels", "channels_mult", "num_res_blocks")


def target(name):
    return build_preset(FIXTURES[name], **{key: fixture(name)[2][key] for key in SIZES})


def files_of(name, folder, parts=("encoder", "decoder"), dtype=torch.float32, change=None):
    model, state, _ = fixture(name)
    return [save_torchscript(folder / f"{part}.jit", model, state, part, dtype, change) for part in parts]


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_encoder_and_decoder_files(name, tmp_path):
    result = convert_tokenizer_files(files_of(name, tmp_path), target(name))
    reference = fixture(name)[0]
    assert result.converted == len(reference.state_dict()) and result.geometry_is_certain
    for key, tensor in reference.state_dict().items():
        assert torch.equal(result.model.state_dict()[key], tensor), key
    constants = {key.rsplit(".", 1)[-1] for key in result.dropped}
    assert constants <= CONSTANTS and "wavelets" in constants
    report = compare_with_torchscript(result.model, result.files)
    assert set(report) == {"encoder", "decoder"}
    assert all(part["error"] < 1e-5 and part["precision"] == "float32" for part in report.values()), report


@pytest.mark.parametrize("name", ["cv8x8x8_p4", "di8x8_p4"])
def test_whole_autoencoder_in_bf16(name, tmp_path):
    """As published: one file, half precision, types written into the program."""
    result = convert_tokenizer_files(files_of(name, tmp_path, ("autoencoder",), torch.bfloat16), target(name))
    assert result.model.dtype == torch.bfloat16 and set(result.files) == {"autoencoder"}
    report = compare_with_torchscript(result.model, result.files)
    assert report["autoencoder"]["error"] <= report["autoencoder"]["tolerance"]
    assert result.model.dtype == torch.bfloat16
    result = convert_tokenizer_files(list(result.files.values()), target(name), dtype=torch.float32)
    assert result.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "change"),
    [("encoder", lambda z: z.flip(-1)), ("decoder", lambda z: z + 0.02), ("autoencoder", lambda z: z * 1.05)],
    ids=["encoder mirrors", "decoder shifts", "autoencoder scales"],
)
def test_a_network_that_computes_something_else_is_caught(part, change, tmp_path):
    """Same names, same shapes, another function: only running both tells."""
    (path,) = files_of("cv4x8x8_p2", tmp_path, (part,), change=change)
    with pytest.raises(ValueError, match=rf"{part}.jit computes something else.*check the preset"):
        compare_with_torchscript(fixture("cv4x8x8_p2")[0], {part: path})


def test_discrete_networks_that_compute_something_else_are_caught(tmp_path):
    files = files_of("di8x8_p4", tmp_path, ("encoder",), change=lambda z: z.flip(-1))
    with pytest.raises(ValueError, match="encoder.jit computes something else"):
        compare_with_torchscript(fixture("di8x8_p4")[0], {"encoder": files[0]})


def test_weights_that_were_changed_are_caught(tmp_path):
    files = files_of("cv4x8x8_p2", tmp_path, ("encoder",))
    model = fixture("cv4x8x8_p2")[0]
    model.encoder.mid.block_1.conv1[0].weight.data[0] *= 1.5
    with pytest.raises(ValueError, match="encoder.jit computes something else"):
        compare_with_torchscript(model, {"encoder": files[0]})


def test_every_entry_is_accounted_for(tmp_path):
    encoder, decoder = files_of("cv4x8x8_p2", tmp_path)
    with pytest.raises(ValueError, match="no decoder among .*give decoder.jit, too"):
        convert_tokenizer_files([encoder], target("cv4x8x8_p2"))
    tensors = read_checkpoint(encoder)
    for name, changed, message in (
        ("unknown", tensors | {"encoder.extra.weight": torch.zeros(1)}, r"unknown keys \['encoder.extra.weight'\]"),
        ("lacking", {k: v for k, v in tensors.items() if k != "quant_conv.conv3d.bias"}, r"missing .*quant_conv.bias"),
        ("wavelets", tensors | {"encoder.patcher3d.wavelets": torch.ones(2)}, "wavelets is .*not this architecture"),
    ):
        torch.save(changed, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=message):
            convert_tokenizer_files([tmp_path / f"{name}.pt", decoder], target("cv4x8x8_p2"))
    with pytest.raises(ValueError, match="has shape"):
        convert_tokenizer_files([encoder, decoder], build_preset("cv4x8x8-360p"))
    (autoencoder,) = files_of("cv4x8x8_p2", tmp_path, ("autoencoder",))
    torch.save(tensors | {"quant_conv.conv3d.bias": torch.ones(16)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="quant_conv.conv3d.bias in .* differs"):
        convert_tokenizer_files([autoencoder, tmp_path / "other.pt"], target("cv4x8x8_p2"))


def test_unused_layers_leave_the_geometry_uncertain(tmp_path):
    model, state, _ = fixture("cv8x8x8_p4")
    width = state["encoder.down.1.block.0.conv1.0.conv3d.weight"].shape[0]
    state = state | {"encoder.down.1.downsample.conv1.conv3d.weight": torch.zeros(width, width, 1, 3, 3)}
    path = save_torchscript(tmp_path / "autoencoder.jit", model, state, "autoencoder")
    result = convert_tokenizer_files([path], target("cv8x8x8_p4"))
    assert not result.geometry_is_certain and "encoder.down.1.downsample.conv1.conv3d.weight" in result.dropped
    compare_with_torchscript(result.model, result.files)


@pytest.mark.parametrize("frames", [1, 3])
def test_statistics(frames, tmp_path):
    """Stored flat, channel by channel; used as the reference does: viewed as [C, T'], cut to the clip's length."""
    mean, std = torch.randn(16 * frames), torch.rand(16 * frames) + 0.5
    torch.save((mean, std), tmp_path / "mean_std.pt")
    files = files_of("cv4x8x8_p2", tmp_path)
    model = convert_tokenizer_files(files, target("cv4x8x8_p2"), tmp_path / "mean_std.pt").model
    latents = torch.randn(2, 16, 2, 4, 4) if frames > 1 else torch.randn(2, 16, 5, 4, 4)
    view = [t.view(1, 16, frames)[:, :, : latents.shape[2]].view(1, 16, -1, 1, 1) for t in (mean, std)]
    torch.testing.assert_close(model.normalize(latents), (latents - view[0]) / view[1])


def test_bad_statistics_are_refused(tmp_path):
    for saved, message in (
        (torch.zeros(16), "pair of tensors"),
        ((torch.zeros(17), torch.ones(17)), "17 means and 17 deviations for 16 latent channels"),
        ((torch.zeros(16), torch.zeros(16)), "above zero"),
        ((torch.full((16,), torch.nan), torch.ones(16)), "finite"),
    ):
        torch.save(saved, tmp_path / "mean_std.pt")
        with pytest.raises(ValueError, match=message):
            read_mean_std(tmp_path / "mean_std.pt", 16)


def test_state_dicts_of_other_kinds(tmp_path):
    """Training's checkpoints: a dictionary, perhaps under "model"; or safetensors."""
    _, state, _ = fixture("cv4x8x8_p2")
    torch.save({"model": state}, tmp_path / "model.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        result = convert_tokenizer_files([tmp_path / name], target("cv4x8x8_p2"))
        with pytest.raises(ValueError, match="is no TorchScript file"):
            compare_with_torchscript(result.model, result.files)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(ValueError, match="neither TorchScript nor a state dict"):
        read_checkpoint(tmp_path / "text.pt")
    torch.save({"net.x": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"neither encoder.\* nor decoder.\* entries"):
        convert_tokenizer_files([tmp_path / "foreign.pt"], target("cv4x8x8_p2"))


def test_names():
    for name, preset in (
        ("Cosmos-1.0-Tokenizer-CV8x8x8", "cv8x8x8"),
        ("checkpoints/Cosmos-0.1-Tokenizer-CI16x16", "ci16x16"),
        ("Cosmos-Tokenize1-DV8x16x16-720p", "dv8x16x16"),
        ("Cosmos-Tokenize1-DI16x16-360p", "di16x16-360p"),
        ("dv4x8x8-360p", "dv4x8x8-360p"),
    ):
        assert preset_of(name) == preset
    for wrong in ("models/mine", "CV2x2x2"):
        with pytest.raises(ValueError, match="names no published tokenizer; there is cv4x8x8,"):
            preset_of(wrong)
    with pytest.raises(ValueError, match=r"has no config \['depth'\]; there is in_channels"):
        build_preset("ci8x8", depth=3)


def test_published_names_have_the_published_sizes():
    index = golden_json("manifests", "_index")
    names = [name for name in index if "Tokeni" in name]
    assert len(names) == 20
    for name in names:
        parameters = sum(p.numel() for p in build_preset(name).parameters())
        unused = index[name]["source"] != "cosmos-predict1" and "V" in name  # 0.1 modules list layers they do not use
        assert parameters == index[name]["n_params"] or (unused and parameters < index[name]["n_params"]), name


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_files(tmp_path / "none")
    with pytest.raises(ValueError, match="neither encoder.jit and decoder.jit nor autoencoder.jit: it is empty"):
        find_files(tmp_path)
    for name in ("autoencoder.jit", "mean_std.pt"):
        (tmp_path / name).touch()
    assert find_files(tmp_path) == ([tmp_path / "autoencoder.jit"], tmp_path / "mean_std.pt")
    for name in ("encoder.jit", "decoder.jit"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path)[0]] == ["encoder.jit", "decoder.jit"]
