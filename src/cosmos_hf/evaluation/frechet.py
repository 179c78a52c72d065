"""Frechet distances between sets of pictures or videos: FID (arXiv 1706.08500), FVD (arXiv 1812.01717), and our own of the kind.

The distance of two Gaussians fitted to features: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). What it is called depends on the
features. FID means Inception-v3's and FVD I3D's, in the TorchScript files that everybody uses; they come with no package
and are loaded from where you have them (`TorchScriptFeatures`). `EfficientNetFeatures` needs no download; its distance is
called EFD and compares only with itself.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .perceptual import lite0_network

logger = logging.getLogger(__name__)


class FeatureExtractor(Protocol):
    """What a Frechet distance needs. `metric` names the figure, for example "fid"; `shortest` is the least number of frames."""

    metric: str
    shortest: int = 1

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """Float [B, 3, T, H, W] in [-1, 1] -> features [N, D]: one row per frame (pictures) or per video."""
        ...


class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64; its size does not grow with their number."""

    def __init__(self):
        self.count, self._sum, self._outer = 0, None, None

    def update(self, features: torch.Tensor):
        """features [N, D]. Raises ValueError for another shape, another D than before, or values that are not finite."""
        if features.ndim != 2 or not torch.isfinite(features).all():
            raise ValueError(f"features must be finite numbers [N, D], got {tuple(features.shape)}")
        if self._sum is not None and features.shape[1] != len(self._sum):
            raise ValueError(f"features of {features.shape[1]} numbers, before they had {len(self._sum)}")
        features = features.detach().double().cpu()
        total, outer = features.sum(0), features.T @ features
        self._sum, self._outer = (total, outer) if self.count == 0 else (self._sum + total, self._outer + outer)
        self.count += len(features)

    @property
    def mean(self) -> torch.Tensor:
        return self._sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """[D, D], of a sample (divided by N - 1), as in the usual implementations. Raises ValueError for N < 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return (self._outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Zero for equal statistics. It is biased upwards where there are few vectors: compare only at equal counts."""
    root = _root(a.covariance)
    product = root @ b.covariance @ root  # has the eigenvalues of C1 C2, and is symmetric
    trace = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace
    return max(0.0, float(distance))


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class FrechetPair:
    """The distance between what is made and what is true, pair by pair: of reconstructions it is rFID, rFVD."""

    def __init__(self, extractor: FeatureExtractor):
        self.extractor, self.metric = extractor, extractor.metric
        self.made, self.true = FeatureStatistics(), FeatureStatistics()

    @torch.no_grad()
    def update(self, result: torch.Tensor, truth: torch.Tensor):
        """Two videos [B, 3, T, H, W] in [-1, 1]."""
        self.made.update(self.extractor(result.clamp(-1, 1)))
        self.true.update(self.extractor(truth))

    def figures(self) -> dict[str, float | int]:
        """{"distance", "count": vectors of each side, "features"}. Warns where there are too few vectors to tell anything."""
        count, width = self.made.count, len(self.made.mean)
        if count < width:
            logger.warning(
                "%s from %d vectors of %d numbers is far too high; compare at equal counts only",
                self.metric,
                count,
                width,
            )
        return {"distance": frechet_distance(self.made, self.true), "count": count, "features": width}


def compare_videos(
    extractors: Sequence[FeatureExtractor],
    made: Sequence[torch.Tensor],
    true: Sequence[torch.Tensor],
    device: str | torch.device = "cpu",
) -> dict[str, dict]:
    """`FrechetPair.figures` by metric, of videos [3, T, H, W] in [-1, 1]; {"skipped": why} for those that need more of them."""
    figures = {}
    for extractor in extractors:
        pair, shortest = FrechetPair(extractor), getattr(extractor, "shortest", 1)
        if (frames := min(video.shape[1] for video in made)) < shortest:
            figures[pair.metric] = {"skipped": f"needs {shortest} frames of each video, there are {frames}"}
            continue
        for result, truth in zip(made, true, strict=True):
            pair.update(result[None].to(device), truth[None].to(device))
        enough = pair.made.count > 1
        figures[pair.metric] = pair.figures() if enough else {"skipped": "needs two videos or more, there is one"}
    return figures


def load_extractors(
    inception: str | Path | None, i3d: str | Path | None, efficientnet: bool, device: str | torch.device = "cpu"
) -> list[nn.Module]:
    """Those of FID and FVD for which there are files, after our own where it is wanted."""
    extractors = [EfficientNetFeatures()] if efficientnet else []
    extractors += [TorchScriptFeatures(inception, "inception")] if inception else []
    extractors += [TorchScriptFeatures(i3d, "i3d")] if i3d else []
    return [extractor.to(device) for extractor in extractors]


class EfficientNetFeatures(nn.Module):
    """Pooled last features (1280) of EfficientNet-Lite0, one row per frame: "efd". No download, and not FID.

    Raises ImportError naming the packages where its weights are not installed.
    """

    metric = "efd"
    shortest = 1

    def __init__(self):
        super().__init__()
        self.network = lite0_network().requires_grad_(False)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        frames = _frames(video, 224)
        return self.network.extract_features(frames).mean((2, 3))


class TorchScriptFeatures(nn.Module):
    """The usual extractors, from the TorchScript files of StyleGAN2-ADA and StyleGAN-V.

    Args:
        path: `inception-2015-12-05.pt` (kind "inception": FID, one row of 2048 per frame) or `i3d_torchscript.pt` (kind
            "i3d": FVD, one row of 400 per video of at least 10 frames).
        kind: "inception" or "i3d".

    The file is a program: load it only from a source that you trust. Raises FileNotFoundError saying where it is to be had,
    ValueError for a file that is none or gives something else.
    """

    KINDS = {
        "inception": dict(
            metric="fid", width=2048, name="inception-2015-12-05.pt", home="github.com/NVlabs/stylegan2-ada-pytorch"
        ),
        "i3d": dict(metric="fvd", width=400, name="i3d_torchscript.pt", home="github.com/universome/stylegan-v"),
    }
    SHORTEST = 10  # frames that I3D's strides leave something of

    def __init__(self, path: str | Path, kind: str):
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}, got {kind!r}")
        self.kind, self.metric, self.width = kind, self.KINDS[kind]["metric"], self.KINDS[kind]["width"]
        self.shortest = self.SHORTEST if kind == "i3d" else 1
        if not Path(path).is_file():
            wanted = self.KINDS[kind]
            raise FileNotFoundError(
                f"no such file: {path}. {self.metric.upper()} needs {wanted['name']}, to which the metrics code in "
                f"{wanted['home']} links"
            )
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is not a TorchScript file: {error}") from error

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        if self.kind == "i3d":
            if video.shape[2] < self.shortest:
                raise ValueError(f"FVD needs videos of at least {self.shortest} frames, got {video.shape[2]}")
            # It rescales 0..255 and resizes to 224 itself.
            features = self.network((video + 1) * 127.5, rescale=True, resize=True, return_features=True)
        else:
            frames = video.transpose(1, 2).flatten(0, 1)
            features = self.network(((frames + 1) * 127.5).round().to(torch.uint8), return_features=True)
        features = features.flatten(1)
        if features.shape[1] != self.width:
            raise ValueError(
                f"{self.kind} features have {self.width} numbers, this file gives {features.shape[1]}: not the usual one"
            )
        return features


def _frames(video: torch.Tensor, side: int) -> torch.Tensor:
    """[B, 3, T, H, W] -> frames [B T, 3, side, side], resized with antialiasing."""
    frames = video.transpose(1, 2).flatten(0, 1)
    return nn.functional.interpolate(frames, (side, side), mode="bilinear", antialias=True, align_corners=False)
