"""Layers of the causal video tokenizer (arXiv 2501.03575, section 3.1): wavelet patches, convolutions, attention.

Axes: B batch, T frames, H and W height and width, C channels. Activations are **channels-last**, [B, T, H, W, C]:
then a 1x3x3 convolution is a 2-D one over the batch of all frames, and a 3x1x1 one a 2-D one over (T, H W).

A layer that looks back in time takes `stream`, a `StreamState` or None. With None the clip starts here: the past is
the first frame repeated. With a state the layer continues where the last chunk ended, so coding a clip chunk by
chunk equals coding it in one go.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .blockwise import add, by_frames, by_rows, in_inference
from .linear import linear
from .streaming import KeyValues, StreamState
from .wavelets import haar_merge, haar_split
from .winograd import convolve_pairs, minimal_taps, pays


def haar_patch(x: torch.Tensor, patch_size: int, first: bool = True) -> torch.Tensor:
    """3-D Haar wavelet patches: [B, T, H, W, C] -> [B, 1 + (T - 1) / p, H / p, W / p, C p^3], p = patch_size.

    Every band is an average or a half difference. At a clip's start (`first`) frame 0 is repeated p times, so that it
    fills a patch alone.
    Channel order: band of the last pass slowest, within a pass time, height, width; then the input channels.
    """
    if first:
        x = torch.cat([x[:, :1].expand(-1, patch_size - 1, -1, -1, -1), x], dim=1)
    groups = x.unflatten(1, (-1, patch_size))  # of frames, one patch each
    return by_frames(lambda x: haar_split(x.flatten(1, 2), patch_size, axes=(1, 2, 3)), groups)


def haar_unpatch(x: torch.Tensor, patch_size: int, first: bool = True) -> torch.Tensor:
    """Exact inverse of `haar_patch`; drops the p - 1 repeated frames at a clip's start."""
    x = by_frames(lambda x: haar_merge(x, patch_size, axes=(1, 2, 3)).unflatten(1, (-1, patch_size)), x).flatten(1, 2)
    return x[:, patch_size - 1 :] if first else x


class CausalConv3d(nn.Module):
    """A convolution with kernel (1, k, k), (3, 1, 1) or (1, 1, 1); weights are stored as a 3-D convolution's.

    In space the border is zero; in time the past of the first frame is that frame itself.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], padding: int | None = None):
        super().__init__()
        layer = nn.Conv3d(in_channels, out_channels, kernel)  # for its initialisation
        self.weight, self.bias = layer.weight, layer.bias
        self.temporal = kernel[0] > 1
        self.pointwise = max(kernel) == 1
        self.padding = kernel[1] // 2 if padding is None else padding

    def forward(
        self,
        x: torch.Tensor,
        stream: StreamState | None = None,
        stride: int = 1,
        norm: "FrameNorm | None" = None,
        into: torch.Tensor | None = None,
        doubled: bool = False,
    ) -> torch.Tensor:
        """The convolution of x [B, T, H, W, C].

        Args:
            norm: goes before together with SiLU; not over time.
            into: may be overwritten with the result, also x.
            doubled: of x with every row and column repeated, kernel (1, 3, 3); the result is [B, T, H, 2, W, 2, C].
        """
        if doubled:
            return self._over_doubled(x)
        if self.temporal:
            return self._over_time(x, stream, stride, into)
        before = nn.Identity() if norm is None else norm.activated
        if self.pointwise:
            weight = self.weight[:, :, 0, 0, 0]
            return by_frames(lambda frames: linear(before(frames), weight, self.bias), x, into=into)
        if stride == self.padding == 1 and pays(x, self.weight):
            taps = minimal_taps(self.weight.squeeze(2))
            return by_frames(lambda frames: self._over_row_pairs(before(frames), taps), x, into=into)
        weight = self._weight2d()
        return by_frames(lambda frames: self._over_space(before(frames), weight, stride, self.padding), x, into=into)

    def _over_doubled(self, x: torch.Tensor) -> torch.Tensor:
        """Two of three taps see the same pixel then: four kernels of 2x2, one for each place in a pair of rows and of columns, need
        16 products where the repeated picture needs 36.
        """
        height, width = x.shape[2:4]
        kernels = [
            (i, j, _channels_last(weight))
            for i, rows in enumerate(_merged_taps(self._weight2d(), 2))
            for j, weight in enumerate(_merged_taps(rows, 3))
        ]

        def convolve(x):
            x = F.pad(x, (0, 0, 1, 1, 1, 1))
            y = [
                self._over_space(x[:, :, i : i + height + 1, j : j + width + 1].contiguous(), w) for i, j, w in kernels
            ]
            y = [torch.stack(y[:2], dim=4), torch.stack(y[2:], dim=4)]
            return torch.stack(y, dim=3)

        return by_frames(convolve, x, growth=4)

    def _weight2d(self) -> torch.Tensor:
        """[O, I, rows, columns], in memory as channels-last input wants it."""
        weight = self.weight.squeeze(-1) if self.temporal else self.weight.squeeze(2)
        return _channels_last(weight)

    def _over_row_pairs(self, x: torch.Tensor, taps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """3x3 kernels as products of rows with their three rows."""

        def multiply(x, tap, bias):
            return F.conv2d(x.permute(0, 3, 1, 2), tap, bias, padding=(0, 1)).permute(0, 2, 3, 1)

        y = convolve_pairs(F.pad(x.flatten(0, 1), (0, 0, 0, 0, 1, 1)), taps, self.bias, multiply)
        return y.unflatten(0, x.shape[:2])

    def _over_space(self, x: torch.Tensor, weight: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        batch, frames = x.shape[:2]
        return self._conv2d(x.flatten(0, 1), weight, (stride, stride), padding).unflatten(0, (batch, frames))

    def _over_time(self, x: torch.Tensor, stream, stride: int, into: torch.Tensor | None) -> torch.Tensor:
        """y[t] = W0 x[t-2] + W1 x[t-1] + W2 x[t]; with stride 2 of the even t, plus the mean of the two newest frames of each."""
        past = stream.get(self) if stream is not None else None
        if past is None:
            past = x[:, :1].expand(-1, 2, -1, -1, -1)
        if stream is not None:
            newest = x if stride == 2 or x.shape[1] > 1 else torch.cat([past, x], dim=1)
            stream[self] = newest[:, -2 if stride == 1 else -1 :].clone()
        if stride == 1 and x.shape[1] > 1 and pays(x, self.weight):
            taps = [tap[:, :, 0, 0] for tap in minimal_taps(self.weight.squeeze(4))]

            def convolve(x, past):
                return convolve_pairs(torch.cat([past, x], dim=1), taps, self.bias, linear)

            return by_rows(convolve, x, past, into=into)
        weight = self._weight2d()

        def convolve(x, past):
            x = torch.cat([past, x], dim=1)
            y = self._conv2d(x.flatten(2, 3), weight, (stride, 1), 0).unflatten(2, x.shape[2:4])
            return y if stride == 1 else add(y, (x[:, 1:-1:2] + x[:, 2::2]) * 0.5)

        return by_rows(convolve, x, past, into=into)

    def _conv2d(self, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: int) -> torch.Tensor:
        """Of [N, rows, columns, C], which lies in memory as conv2d's channels-last layout wants it."""
        return F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, stride, padding).permute(0, 2, 3, 1)


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _merged_taps(weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernels of 2 taps that see what 3 taps see at the first and at the second pixel of a repeated pair."""
    first, middle, last = weight.split(1, axis)
    return torch.cat([first, middle + last], axis), torch.cat([first + middle, last], axis)


class FactorizedConv(nn.Sequential):
    """A spatial 1x3x3 and then a temporal 3x1x1 convolution, no activation between."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            CausalConv3d(in_channels, out_channels, (1, 3, 3)), CausalConv3d(out_channels, out_channels, (3, 1, 1))
        )

    def forward(
        self,
        x: torch.Tensor,
        stream: StreamState | None = None,
        norm: "FrameNorm | None" = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`norm`, `into`: as of `CausalConv3d`."""
        h = self[0](x, norm=norm, into=into)
        return self[1](h, stream, into=h)


class FrameNorm(nn.Module):
    """Group normalisation with one group, statistics per frame over H, W and C: no frame sees another."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, x.shape[2:], eps=1e-6)
        out = x if in_inference() and x.dtype == self.weight.dtype else None
        return torch.addcmul(self.bias, x, self.weight, out=out)

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """SiLU of the normalised frames."""
        return F.silu(self(x), inplace=in_inference())


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = FactorizedConv(in_channels, out_channels)
        self.norm2 = FrameNorm(out_channels)
        self.conv2 = FactorizedConv(out_channels, out_channels)
        changes = in_channels != out_channels
        self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1)) if changes else nn.Identity()

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        h = self.conv1(x, stream, self.norm1)
        h = self.conv2(h, stream, self.norm2, into=h)
        return by_frames(lambda h, x: add(h, self.shortcut(x)), h, x, into=h)

    def start_silent(self):
        for conv in (*self.conv1, *self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        nn.init.zeros_(self.conv2[1].weight)


class Attention(nn.Module):
    """Single-head self-attention with a residual: over the positions of each frame, or over time at each position."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.norm = FrameNorm(channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (CausalConv3d(channels, channels, (1, 1, 1)) for _ in range(4))

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        if not self.temporal:
            return by_frames(lambda x: self._residual(x, self.norm(x), self._over_space), x)
        h = by_frames(self.norm, x)
        if stream is None:
            return by_rows(lambda x, h: self._residual(x, h, self._over_time), x, h, into=h)
        return self._residual(x, h, lambda q, k, v: self._over_stream(q, k, v, stream))

    def _residual(self, x: torch.Tensor, h: torch.Tensor, attend) -> torch.Tensor:
        return add(self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h))), x)

    def start_silent(self):
        nn.init.zeros_(self.to_out.weight)

    def _over_space(self, q, k, v):
        size = q.shape[2:4]
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))  # [B, T, H W, C]
        return F.scaled_dot_product_attention(q, k, v).unflatten(2, size)

    def _over_time(self, q, k, v):
        """Causal over the whole clip."""
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (q, k, v))  # [B, H, W, T, C]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(0, 3, 1, 2, 4)

    def _over_stream(self, q, k, v, stream):
        """The same with all keys and values kept, with no window unless the stream has one."""
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (q, k, v))
        kept = stream.get(self, KeyValues()).append(k, v)
        stream[self] = kept.last(stream.window)
        return kept.attend(q, stream.window).permute(0, 3, 1, 2, 4)


class FactorizedAttention(nn.Sequential):
    """Spatial attention inside each frame, then causal temporal attention at each position."""

    def __init__(self, channels: int):
        super().__init__(Attention(channels, temporal=False), Attention(channels, temporal=True))

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        return self[1](self[0](x), stream)


class Downsample(nn.Module):
    """Halve height and width (`spatial`) and frames (`temporal`, 1 + 2k -> 1 + k): strided plus average."""

    def __init__(self, channels: int, spatial: bool, temporal: bool):
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, (1, 3, 3), padding=0) if spatial else None
        self.conv2 = CausalConv3d(channels, channels, (3, 1, 1)) if temporal else None
        self.conv3 = CausalConv3d(channels, channels, (1, 1, 1))

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        if self.conv1 is not None:
            x = by_frames(self._halve, x)
        if self.conv2 is not None:
            x = self.conv2(x, stream, stride=2)
        return self.conv3(x)

    def _halve(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return add(self.conv1(F.pad(x, (0, 0, 0, 1, 0, 1)), stride=2), pooled.unflatten(0, x.shape[:2]))

    def start_silent(self):
        _silence(self.conv1, self.conv2)


class Upsample(nn.Module):
    """Double frames (1 + k -> 1 + 2k) and then height and width by repetition, each with a residual convolution."""

    def __init__(self, channels: int, spatial: bool, temporal: bool):
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, (3, 1, 1)) if temporal else None
        self.conv2 = CausalConv3d(channels, channels, (1, 3, 3)) if spatial else None
        self.conv3 = CausalConv3d(channels, channels, (1, 1, 1))

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        if self.conv1 is not None:
            x = x.repeat_interleave(2, dim=1)
            if stream is None or stream.first:
                x = x[:, 1:]  # frame 0 stands alone
            x = add(self.conv1(x, stream), x)
        if self.conv2 is not None:
            x = add(self.conv2(x, doubled=True), x[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)
        return self.conv3(x, into=x)

    def start_silent(self):
        _silence(self.conv1, self.conv2)


def _silence(*convolutions: CausalConv3d | None):
    for conv in filter(None, convolutions):
        nn.init.zeros_(conv.weight)
