"""How a long video drifts: sharpness, colour and seams per chunk, and the distance to a true video where there is one."""

import torch
import torch.nn.functional as F


class DriftMeter:
    """Figures of one chunk of frames after the other, in `entries`; `count` is the number of frames so far.

    Every entry has "frames" [first, past the last], "sharpness" (mean absolute Laplacian of the brightness, range [0, 1]),
    "colour" (mean red, green, blue), and, from the second on, "sharpness_ratio" to the first chunk, "colour_shift" (distance of
    the mean colours to the first chunk's) and "seam": the change across the chunk's first frame as a multiple of the mean change
    across every `period`-th frame after it (of the chunk before, where there is none); 1 where nothing is to be seen. With
    the tokenizer's temporal factor as period, the frames compared are all the first of a latent frame. "psnr" in dB is there
    as long as the truth lasts.
    """

    def __init__(self, period: int = 1):
        self.period = period
        self.entries = []
        self._last, self._usual, self.count = None, 0.0, 0

    def add(self, frames: torch.Tensor, truth: torch.Tensor | None = None) -> dict:
        """Frames uint8 [3, T, H, W] that follow the earlier ones, and the true ones [3, up to T, H, W] -> their entry."""
        video = frames.float() / 255
        colour = video.mean((1, 2, 3))
        entry = dict(
            frames=[self.count, self.count + frames.shape[1]],
            sharpness=_sharpness(video),
            colour=[round(c, 6) for c in colour.tolist()],
        )
        # The first chunk's first latent frame has one frame; in later ones all latent frames have `period`.
        changes = video.diff(dim=1).abs().mean((0, 2, 3))[0 if not self.entries else self.period - 1 :: self.period]
        usual = changes.mean().item() if len(changes) else self._usual
        if self.entries:
            first = self.entries[0]
            entry["sharpness_ratio"] = entry["sharpness"] / max(first["sharpness"], 1e-9)
            entry["colour_shift"] = (colour - torch.tensor(first["colour"])).norm().item()
            if usual:
                entry["seam"] = (video[:, 0] - self._last).abs().mean().item() / usual
        if truth is not None and truth.shape[1]:
            error = (video[:, : truth.shape[1]] - truth.float() / 255).square().mean((0, 2, 3))
            entry["psnr"] = (-10 * error.clamp(min=1e-10).log10()).mean().item()
        self._last, self._usual = video[:, -1], usual
        self.count += frames.shape[1]
        self.entries.append(entry)
        return entry


def _sharpness(video: torch.Tensor) -> float:
    """Mean absolute Laplacian of the brightness of [3, T, H, W] in [0, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)
    brightness = (video * weights).sum(0)[:, None]  # [T, 1, H, W]
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return F.conv2d(brightness, kernel).abs().mean().item()
