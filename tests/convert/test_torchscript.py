"""Reading TorchScript files without running them: equal to what torch reads, and what is refused."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

from cosmos_hf.convert.torchscript import is_torchscript, read_torchscript


class Network(nn.Module):
    """Parameters that are used, that are not, and buffers of several types; one tensor is a transposed view."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.unused = nn.Linear(3, 2).bfloat16()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity())
        self.register_buffer("counts", torch.arange(3, dtype=torch.int32))
        self.register_buffer("hidden", torch.randn(4, 3).double().t(), persistent=False)
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x):
        return self.layers(self.conv(x)) + self.hidden.sum()


@pytest.fixture
def traced():
    return torch.jit.trace(Network().eval(), torch.zeros(1, 3, 2, 2))


def test_reads_what_torch_reads(traced, tmp_path):
    traced.save(tmp_path / "net.jit")
    tensors = read_torchscript(tmp_path / "net.jit")
    expected = torch.jit.load(tmp_path / "net.jit").state_dict()
    assert tensors.keys() == expected.keys() and "unused.weight" in tensors and "hidden" in tensors
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor) and tensors[key].dtype == tensor.dtype, key


def rewritten(path, change):
    """The archive with one entry changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    changed = path.with_suffix(".changed.jit")
    with zipfile.ZipFile(changed, "w") as archive:
        for name, data in entries.items():
            if (data := change(name, data)) is not None:
                archive.writestr(name, data)
    return changed


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_wants_to_run_something_is_refused(traced, tmp_path, capsys):
    traced.save(tmp_path / "net.jit")
    bad = rewritten(
        tmp_path / "net.jit", lambda name, data: pickle.dumps(Malicious(), 2) if name.endswith("/data.pkl") else data
    )
    with pytest.raises(ValueError, match="the pickle asks for __builtin__.print, which is not needed"):
        read_torchscript(bad)
    assert "must not run" not in capsys.readouterr().out


def test_a_pickle_that_misuses_what_is_allowed_is_refused(traced, tmp_path):
    """A storage type that is called, a tensor of something that is no storage."""
    traced.save(tmp_path / "net.jit")
    for data in (b"\x80\x02ctorch\nFloatStorage\n)R.", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00))tR."):
        bad = rewritten(tmp_path / "net.jit", lambda name, old, data=data: data if name.endswith("/data.pkl") else old)
        with pytest.raises(ValueError, match="damaged"):
            read_torchscript(bad)


def test_the_program_is_never_opened(traced, tmp_path):
    traced.save(tmp_path / "net.jit")
    spoiled = rewritten(tmp_path / "net.jit", lambda name, data: b"spoiled" if "/code/" in name else data)
    assert read_torchscript(spoiled).keys() == read_torchscript(tmp_path / "net.jit").keys()
    with pytest.raises(RuntimeError):
        torch.jit.load(spoiled)


def test_damaged_and_foreign_files_are_refused(traced, tmp_path):
    traced.save(tmp_path / "net.jit")
    lacking = rewritten(tmp_path / "net.jit", lambda name, data: None if name.endswith("/data/0") else data)
    with pytest.raises(ValueError, match="damaged"):
        read_torchscript(lacking)
    short = rewritten(tmp_path / "net.jit", lambda name, data: data[:2] if name.endswith("/data/0") else data)
    with pytest.raises(ValueError, match="storage 0 has 2 bytes, needs"):
        read_torchscript(short)
    big = rewritten(tmp_path / "net.jit", lambda name, data: b"big" if name.endswith("/byteorder") else data)
    with pytest.raises(ValueError, match="big-endian"):
        read_torchscript(big)
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pt")
    (tmp_path / "text.jit").write_text("no archive")
    for name in ("plain.pt", "text.jit"):
        assert not is_torchscript(tmp_path / name)
        with pytest.raises(ValueError, match="is not a TorchScript file"):
            read_torchscript(tmp_path / name)


def test_a_frozen_module_has_no_names(tmp_path):
    torch.jit.freeze(torch.jit.trace(nn.Conv2d(3, 4, 1).eval(), torch.zeros(1, 3, 2, 2))).save(tmp_path / "net.jit")
    with pytest.raises(ValueError, match="no named tensors: it is a frozen module"):
        read_torchscript(tmp_path / "net.jit")
