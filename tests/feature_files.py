"""Stand-ins for the TorchScript files of FID and FVD: they are called as the usual ones are, and refuse other calls."""

from pathlib import Path

import torch
from torch import nn


class Inception(nn.Module):
    """With the call of the usual file: uint8 pictures, 2048 features."""

    def forward(self, images: torch.Tensor, return_features: bool = False):
        if images.dtype != torch.uint8 or not return_features:
            raise ValueError("unexpected call")
        return images.float().mean((2, 3)).repeat(1, 683)[:, :2048]


class I3D(nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        if not (rescale and resize and return_features):
            raise ValueError("unexpected call")
        return x.mean((2, 3, 4)).repeat(1, 134)[:, :400]


def write_feature_files(folder: Path) -> tuple[Path, Path]:
    """inception.pt and i3d.pt."""
    torch.jit.script(Inception()).save(folder / "inception.pt")
    torch.jit.script(I3D()).save(folder / "i3d.pt")
    return folder / "inception.pt", folder / "i3d.pt"
