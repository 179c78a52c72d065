"""How a long video drifts: sharpness, colour and seams per chunk, and the distance to a true video where there is one."""

import torch
import torch.nn.functional as F


class DriftMeter:
    """Figures of one chunk of frames after the other, in `entries`; `count` is the number of frames so far.

    Every entry has "frames" [first, past the last], "sharpness" (mean absolute Laplacian of the brightness, range [0, 1]),
    "colour" (mean red, green, blue), and, from the second on, "sharpness_ratio" to the first chunk, "colour_shift" (distance of
    the mean colours to the first chunk's) and "seam": the change across the chunk's first frame as a multiple of the mean change
    between its other frames, 1 where nothing is to be seen. "psnr" in dB is there as long as the truth lasts.
    """

    def __init__(self):
        self.entries = []
        self._last, self.count = None, 0

    def add(self, frames: torch.Tensor, truth: torch.Tensor | None = None) -> dict:
        """Frames uint8 [3, T, H, W] that follow the earlier ones, and the true ones [3, up to T, H, W] -> their entry."""
        video = frames.float() / 255
        colour = video.mean((1, 2, 3))
        entry = dict(
            frames=[self.count, self.count + frames.shape[1]],
            sharpness=_sharpness(video),
            colour=[round(c, 6) for c in colour.tolist()],
        )
        if self.entries:
            first = self.entries[0]
            entry["sharpness_ratio"] = entry["sharpness"] / max(first["sharpness"], 1e-9)
            entry["colour_shift"] = (colour - torch.tensor(first["colour"])).norm().item()
            inner = video.diff(dim=1).abs().mean().item() if video.shape[1] > 1 else 0.0
            if inner:
                entry["seam"] = (video[:, 0] - self._last).abs().mean().item() / inner
        if truth is not None and truth.shape[1]:
            error = (video[:, : truth.shape[1]] - truth.float() / 255).square().mean((0, 2, 3))
            entry["psnr"] = (-10 * error.clamp(min=1e-10).log10()).mean().item()
        self._last = video[:, -1]
        self.count += frames.shape[1]
        self.entries.append(entry)
        return entry


def _sharpness(video: torch.Tensor) -> float:
    """Mean absolute Laplacian of the brightness of [3, T, H, W] in [0, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)
    brightness = (video * weights).sum(0)[:, None]  # [T, 1, H, W]
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return F.conv2d(brightness, kernel).abs().mean().item()
