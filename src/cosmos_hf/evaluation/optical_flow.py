"""Optical flow between true frames, and how far a video's error strays from it.

The paper's second stage compares the RAFT flow of the reconstruction with that of the truth (arXiv 2501.03575, section 3.2).
RAFT's weights come with no package that runs here, so the flow is estimated on the *true* frames only, by an estimator that
can be exchanged, and the reconstruction is judged by warping: with the error e = reconstruction - truth and the flow of
the truth, `warp_error` is |e(t) - e(t + 1) carried back along the flow|. It is 0 for a perfect reconstruction and for an
error that moves with the things it sits on; shimmer, stutter and things that lag behind are what it sees. Its gradient
goes through the warp, not through an estimator.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

# (first, second), each float [N, 3, H, W] in [-1, 1] -> flow [N, 2, H, W], the step (right, down) in pixels that leads from a
# place in `first` to where it is seen in `second`.
FlowEstimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class DISFlow:
    """Dense inverse search (Kroeger et al. 2016, arXiv 1603.03590) as in OpenCV, on the processor.

    preset: "ultrafast", "fast" or "medium"; a pair of frames of 96x128 takes 1 to 5 ms. Raises ImportError without OpenCV.
    """

    PRESETS = {"ultrafast": 0, "fast": 1, "medium": 2}

    def __init__(self, preset: str = "medium"):
        try:
            import cv2
        except ImportError as error:
            raise ImportError("optical flow needs OpenCV: pip install opencv-python-headless") from error
        if preset not in self.PRESETS:
            raise ValueError(f"preset must be one of {', '.join(self.PRESETS)}, got {preset!r}")
        self._dis = cv2.DISOpticalFlow_create(self.PRESETS[preset])

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        flows = [
            torch.from_numpy(self._dis.calc(a, b, None))
            for a, b in zip(_grey(first), _grey(second), strict=True)  # [H, W, 2]
        ]
        return torch.stack(flows).permute(0, 3, 1, 2).to(first.device)


def load_estimator(name: str) -> FlowEstimator:
    """ "dis", or "module:name" of a class or function of your own: it is called without arguments and returns an estimator.

    Raises ValueError for a name of another form, or one that is not there.
    """
    if name == "dis":
        return DISFlow()
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)() if attribute else _unknown(name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"flow_estimator {name!r} cannot be loaded: {error}") from error


def _unknown(name: str):
    raise ValueError(f"flow_estimator must be 'dis' or 'module:name', got {name!r}")


def _grey(frames: torch.Tensor):
    """[N, 3, H, W] in [-1, 1] -> N uint8 arrays [H, W]."""
    weights = frames.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = ((frames.detach().float() * weights).sum(1).clamp(-1, 1) + 1) * 127.5
    return grey.round().to(torch.uint8).cpu().numpy()


def warp(frames: torch.Tensor, flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up `frames` [N, C, H, W] where `flow` [N, 2, H, W] leads (bilinear).

    Returns (what is seen there [N, C, H, W], bool [N, 1, H, W]: whether that place lies in the picture).
    """
    height, width = frames.shape[2:]
    rows = torch.arange(height, device=frames.device, dtype=flow.dtype).view(1, -1, 1)
    columns = torch.arange(width, device=frames.device, dtype=flow.dtype).view(1, 1, -1)
    x, y = columns + flow[:, 0], rows + flow[:, 1]  # [N, H, W]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1).to(frames.dtype)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=True), inside[:, None]


def visible(flow: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Places whose flow is undone by the flow back (Sundaram et al. 2010), that is, not covered up -> bool [N, 1, H, W]."""
    returned, inside = warp(back, flow)
    gap = (flow + returned).square().sum(1, keepdim=True)
    size = flow.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
    return inside & (gap < 0.01 * size + 0.5)


def warp_error(error: torch.Tensor, video: torch.Tensor, estimator: FlowEstimator) -> torch.Tensor:
    """Mean over visible places of |e(t) - e(t + 1) along the flow|, and the same backwards in time: a scalar.

    error, video [B, C, T, H, W] of T >= 2 frames; the flow is that of `video`, without gradient.
    """
    first, second = (video[:, :, i : video.shape[2] - 1 + i].transpose(1, 2).flatten(0, 1) for i in (0, 1))
    with torch.no_grad():
        ahead, back = estimator(first, second), estimator(second, first)
        seen_ahead, seen_back = visible(ahead, back), visible(back, ahead)
    e_first, e_second = (error[:, :, i : error.shape[2] - 1 + i].transpose(1, 2).flatten(0, 1) for i in (0, 1))
    total = _masked_mean(e_first - warp(e_second, ahead)[0], seen_ahead)
    return (total + _masked_mean(e_second - warp(e_first, back)[0], seen_back)) / 2


def _masked_mean(difference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (difference.abs() * mask).sum() / (mask.sum() * difference.shape[1]).clamp(min=1)
