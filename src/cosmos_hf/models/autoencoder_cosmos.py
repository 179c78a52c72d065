"""The causal video tokenizer, continuous and discrete (arXiv 2501.03575, section 3).

A Haar wavelet transform, a residual encoder of factorised causal convolutions and attention, and the mirrored decoder.
Everything is causal in time: a latent frame depends on no later pixel frame, so a clip may be coded chunk by chunk
(`encoder_stream`, `decoder_stream`) with the result of coding it at once, and a single image is a clip of one frame.

Axes: B batch, C channels, T pixel frames, H and W height and width; T', H', W' the same of the latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .quantizers import FiniteScalarQuantizer
from .strict_loading import StrictLoadingMixin
from .video_layers import (
    CausalConv3d,
    Downsample,
    FactorizedAttention,
    FactorizedConv,
    FrameNorm,
    ResBlock,
    StreamState,
    Upsample,
    haar_patch,
    haar_unpatch,
    start_as_projection,
)

# Sizes by the name of the published model; `CosmosVideoTokenizer(**PRESETS["cv8x8x8"])`.
PRESETS = {
    "cv4x8x8": dict(temporal_compression=4, decoder_channels_mult=(2, 4)),
    "cv8x8x8": dict(),
    "cv8x16x16": dict(spatial_compression=16),
    "dv4x8x8": dict(temporal_compression=4, quantizer="fsq", latent_channels=6),
    "dv8x8x8": dict(quantizer="fsq", latent_channels=6),
    "dv8x16x16": dict(spatial_compression=16, quantizer="fsq", latent_channels=6),
    "cv4x8x8-360p": dict(temporal_compression=4, patch_size=2),
    "dv4x8x8-360p": dict(temporal_compression=4, patch_size=2, quantizer="fsq", latent_channels=6, z_channels=256),
    "nano": dict(temporal_compression=4, channels=48, channels_mult=(1, 2, 2), num_res_blocks=1),
    "tiny": dict(temporal_compression=4, channels=8, channels_mult=(1, 2, 2), num_res_blocks=1),
}
# Codebooks of the sizes that the FSQ paper recommends for 2^12 and 2^10 codes: an output of 64 000 would be most of a nano model.
PRESETS["nano-discrete"] = PRESETS["nano"] | dict(quantizer="fsq", fsq_levels=(7, 5, 5, 5, 5), latent_channels=5)
PRESETS["tiny-discrete"] = PRESETS["tiny"] | dict(quantizer="fsq", fsq_levels=(8, 5, 5, 5), latent_channels=4)


@dataclass
class TokenizerOutput(BaseOutput):
    """`latents` [B, C, T', H', W'] (codes when discrete); `indices` [B, T', H', W'] int64, None when continuous."""

    latents: torch.Tensor
    indices: torch.Tensor | None = None


@dataclass
class TokenizerDecoderOutput(BaseOutput):
    """`sample` [B, 3, T, H, W], about [-1, 1], not clamped."""

    sample: torch.Tensor


class _Level(nn.Module):
    """Residual blocks (with attention after each where `attention`) and a resampling module or none."""

    def __init__(self, in_channels, out_channels, num_blocks, attention: bool, resample: nn.Module | None):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResBlock(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.attentions = nn.ModuleList(FactorizedAttention(out_channels) for _ in range(num_blocks * attention))
        self.resample = resample

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, stream)
            if self.attentions:
                x = self.attentions[i](x, stream)
        return x if self.resample is None else self.resample(x, stream)


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attention = FactorizedAttention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        return self.block_2(self.attention(self.block_1(x, stream), stream), stream)


class _Coder(nn.Module):
    """What encoder and decoder share: the run of stages between `conv_in` and `conv_out`."""

    gradient_checkpointing = False

    def _run(self, stages, x: torch.Tensor, stream: StreamState | None) -> torch.Tensor:
        for stage in stages:
            if self.gradient_checkpointing and torch.is_grad_enabled() and stream is None:
                x = self._gradient_checkpointing_func(stage, x)
            else:
                x = stage(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class VideoEncoder(_Coder):
    """Pixels [B, T, H, W, 3] -> features before `quant_conv` [B, T', H', W', z_channels]."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.channels * m for m in config.channels_mult]
        halvings_s, halvings_t = _resamplings(config)
        self.conv_in = FactorizedConv(config.in_channels * config.patch_size**3, config.channels)
        self.levels = nn.ModuleList()
        resolution, width = config.resolution // config.patch_size, config.channels
        for i, out_width in enumerate(widths):
            spatial, temporal, last = i < halvings_s, i < halvings_t, i == len(widths) - 1
            resample = Downsample(out_width, spatial, temporal) if (spatial or temporal) and not last else None
            attention = resolution in config.attn_resolutions
            self.levels.append(_Level(width, out_width, config.num_res_blocks, attention, resample))
            resolution, width = resolution // 2, out_width
        self.mid = _Middle(width)
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorizedConv(width, config.z_channels)

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        x = haar_patch(x, self.patch_size, stream is None or stream.first)
        return self._run([*self.levels, self.mid], self.conv_in(x, stream), stream)


class VideoDecoder(_Coder):
    """Features after `post_quant_conv` [B, T', H', W', z_channels] -> pixels [B, T, H, W, 3]."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.channels * m for m in config.decoder_channels_mult or config.channels_mult]
        doublings_s, doublings_t = _resamplings(config)
        width = widths[-1]
        self.conv_in = FactorizedConv(config.z_channels, width)
        self.mid = _Middle(width)
        self.levels = nn.ModuleList()  # in the order of use: the narrowest resolution first
        resolution = config.resolution // config.patch_size // 2 ** (len(widths) - 1)
        for i, out_width in enumerate(reversed(widths)):
            last = i == len(widths) - 1
            temporal = not last and 0 < i <= doublings_t
            spatial = not last and (temporal or (i < doublings_s and doublings_s > doublings_t))
            resample = Upsample(out_width, spatial, temporal) if spatial or temporal else None
            attention = resolution in config.attn_resolutions
            self.levels.append(_Level(width, out_width, config.num_res_blocks + 1, attention, resample))
            resolution, width = resolution * 2, out_width
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorizedConv(width, config.out_channels * config.patch_size**3)
        made = [level.resample for level in self.levels if level.resample is not None]
        if [sum(m.conv2 is not None for m in made), sum(m.conv1 is not None for m in made)] != [
            doublings_s,
            doublings_t,
        ]:
            raise ValueError(
                f"patch_size={config.patch_size} with {len(widths)} decoder levels cannot reach a compression of "
                f"{config.temporal_compression}x{config.spatial_compression}x{config.spatial_compression}: the "
                f"decoder would not restore the input's size. Use patch_size=4, or 4x8x8 with patch_size=2."
            )

    def forward(self, z: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        x = self._run([self.mid, *self.levels], self.conv_in(z, stream), stream)
        return haar_unpatch(x, self.patch_size, stream is None or stream.first)


def _resamplings(config) -> tuple[int, int]:
    """How often the network itself halves space and time, beyond the wavelet patches."""
    counts = []
    for name in ("spatial_compression", "temporal_compression"):
        factor = getattr(config, name)
        if factor not in (4, 8, 16) or factor < config.patch_size:
            raise ValueError(f"{name} must be 4, 8 or 16 and at least patch_size={config.patch_size}, got {factor}")
        counts.append((factor // config.patch_size).bit_length() - 1)
    if max(counts) >= len(config.channels_mult):
        raise ValueError(
            f"channels_mult {tuple(config.channels_mult)} has too few levels for {max(counts)} resamplings"
        )
    return counts[0], counts[1]


class CosmosVideoTokenizer(StrictLoadingMixin, ModelMixin, ConfigMixin):
    """Causal video autoencoder: continuous when `quantizer` is None, discrete when it is "fsq".

    Args:
        channels, channels_mult, num_res_blocks: width of the first level, factors per level, blocks per level.
        decoder_channels_mult: factors of the decoder where they differ (published 0.1 CV4x8x8), else None.
        patch_size: 2 or 4, side of the Haar patches in all three axes.
        z_channels, latent_channels: width at the bottleneck and of the latents (6 for FSQ, one per level).
        spatial_compression, temporal_compression: pixels per latent position along H and W, frames per latent frame.
        attn_resolutions, resolution: attention in levels whose nominal size, counted from `resolution`, is listed.
        quantizer, fsq_levels: None or "fsq", and the number of values per code channel.
        latents_mean, latents_std: statistics [C] or [C][T'] that `normalize` uses; None means identity.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock", "FactorizedAttention"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 128,
        channels_mult: tuple[int, ...] = (2, 4, 4),
        decoder_channels_mult: tuple[int, ...] | None = None,
        num_res_blocks: int = 2,
        patch_size: int = 4,
        z_channels: int = 16,
        latent_channels: int = 16,
        spatial_compression: int = 8,
        temporal_compression: int = 8,
        attn_resolutions: tuple[int, ...] = (32,),
        resolution: int = 1024,
        quantizer: str | None = None,
        fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
        latents_mean: list | None = None,
        latents_std: list | None = None,
    ):
        super().__init__()
        if patch_size not in (2, 4):
            raise ValueError(f"patch_size must be 2 or 4, got {patch_size}")
        if quantizer not in (None, "fsq"):
            raise ValueError(f"quantizer must be None (continuous) or 'fsq' (discrete), got {quantizer!r}")
        if quantizer == "fsq" and latent_channels != len(fsq_levels):
            raise ValueError(
                f"latent_channels={latent_channels} must equal the number of fsq_levels, {len(fsq_levels)}"
            )
        if (latents_mean is None) != (latents_std is None):
            raise ValueError("latents_mean and latents_std must be given together")
        self.encoder = VideoEncoder(self.config)
        self.decoder = VideoDecoder(self.config)
        self.quant_conv = CausalConv3d(z_channels, latent_channels, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(latent_channels, z_channels, (1, 1, 1))
        self.fsq = FiniteScalarQuantizer(fsq_levels) if quantizer == "fsq" else None
        start_as_projection(self)

    # ---- sizes -------------------------------------------------------------------------------------------------

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames that hold `num_frames` pixel frames, the last of them perhaps in part."""
        return 1 + -(-(num_frames - 1) // self.config.temporal_compression)

    def num_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` decode to."""
        return 1 + (latent_frames - 1) * self.config.temporal_compression

    def pad_frames(self, video: torch.Tensor) -> torch.Tensor:
        """Repeat the last frame up to a legal count; `decode(..., num_frames=T)` crops it again."""
        missing = self.num_frames(self.latent_frames(video.shape[2])) - video.shape[2]
        return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) if missing else video

    def _check_video(self, video: torch.Tensor, frames_in_first: int):
        """Refuse what the strides would mangle. `frames_in_first`: 1 at a clip's start, 0 for a further chunk."""
        if video.ndim != 5 or video.shape[1] != self.config.in_channels:
            raise ValueError(f"video must be [B, {self.config.in_channels}, T, H, W], got {tuple(video.shape)}")
        if not video.is_floating_point():
            raise ValueError(f"video must be floating point in [-1, 1], got {video.dtype}: use video / 127.5 - 1")
        for name, size in (("height", video.shape[3]), ("width", video.shape[4])):
            factor = self.config.spatial_compression
            if size % factor or size == 0:
                below, above = size // factor * factor, -(-max(size, 1) // factor) * factor
                legal = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"{name} must be a multiple of {factor}, got {size}; the nearest legal is {legal}")
        factor, frames = self.config.temporal_compression, video.shape[2]
        if frames == 0 or (frames - frames_in_first) % factor:
            below = (frames - frames_in_first) // factor * factor + frames_in_first
            legal = f"{below} or {below + factor}" if below > 0 else f"{below + factor}"
            raise ValueError(
                f"the number of frames must be {frames_in_first} + k * {factor}, got {frames}; the nearest legal is "
                f"{legal}. encode(..., pad_frames=True) repeats the last frame and decode(..., num_frames={frames}) "
                f"crops."
            )

    # ---- coding ------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, video: torch.Tensor, pad_frames: bool = False) -> TokenizerOutput:
        """Video [B, 3, T, H, W] in [-1, 1] -> `TokenizerOutput`.

        Raises ValueError where H or W is no multiple of `spatial_compression`, or where T is not
        1 + k * `temporal_compression` and `pad_frames` is off (on: the last frame is repeated; decode with
        `num_frames=T`).
        """
        if pad_frames and video.ndim == 5 and video.shape[2]:
            video = self.pad_frames(video)
        self._check_video(video, frames_in_first=1)
        return self._encode(video)

    def _encode(self, video: torch.Tensor, stream: StreamState | None = None) -> TokenizerOutput:
        z = self.quant_conv(self.encoder(video.permute(0, 2, 3, 4, 1), stream))  # [B, T', H', W', C]
        indices = None
        if self.fsq is not None:
            z, indices = self.fsq(z)
        return TokenizerOutput(z.permute(0, 4, 1, 2, 3).contiguous(), indices)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, num_frames: int | None = None) -> TokenizerDecoderOutput:
        """Latents (or codes) [B, C, T', H', W'] -> video; `num_frames` crops what `encode(pad_frames=True)` added."""
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents must be [B, {self.config.latent_channels}, T', H', W'], got {tuple(latents.shape)}"
            )
        full = self.num_frames(latents.shape[2])
        if num_frames is not None and self.latent_frames(num_frames) != latents.shape[2]:
            raise ValueError(
                f"num_frames={num_frames} is not held by {latents.shape[2]} latent frames (at most {full})"
            )
        return TokenizerDecoderOutput(self._decode(latents)[:, :, :num_frames])

    def _decode(self, latents: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        z = self.post_quant_conv(latents.permute(0, 2, 3, 4, 1))
        return self.decoder(z, stream).permute(0, 4, 1, 2, 3).contiguous()

    @apply_forward_hook
    def decode_indices(self, indices: torch.Tensor, num_frames: int | None = None) -> TokenizerDecoderOutput:
        """Indices [B, T', H', W'] of a discrete tokenizer -> video. Raises ValueError for a continuous one."""
        if self.fsq is None:
            raise ValueError("this tokenizer is continuous (quantizer=None) and has no indices; use decode(latents)")
        codes = self.fsq.decode(indices).to(self.dtype)
        return self.decode(codes.permute(0, 4, 1, 2, 3), num_frames)

    def forward(self, sample: torch.Tensor) -> TokenizerDecoderOutput:
        """Reconstruct: decode(encode(sample))."""
        return self.decode(self.encode(sample).latents)

    def encoder_stream(self) -> "TokenizerStream":
        """Encode a clip chunk by chunk: `push(video chunk) -> TokenizerOutput`. The first chunk has
        1 + k * `temporal_compression` frames, later ones a multiple of it; together they equal `encode` of all."""
        return TokenizerStream(self, self._push_video)

    def decoder_stream(self) -> "TokenizerStream":
        """Decode a clip chunk by chunk: `push(latents chunk) -> video chunk`, any number of latent frames each."""
        return TokenizerStream(self, self._decode)

    def _push_video(self, video: torch.Tensor, stream: StreamState) -> TokenizerOutput:
        self._check_video(video, frames_in_first=int(stream.first))
        return self._encode(video, stream)

    # ---- statistics of the latents --------------------------------------------------------------------------------

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.config.latents_mean is None:
            return None
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=latents.device).view(len(v), -1)
            for v in (self.config.latents_mean, self.config.latents_std)
        )
        frames = latents.shape[2]
        if mean.shape[1] > 1 and frames > mean.shape[1]:
            raise ValueError(
                f"statistics are kept for {mean.shape[1]} latent frames, got {frames}: code in shorter chunks"
            )
        return tuple(t[None, :, : max(frames if t.shape[1] > 1 else 1, 1), None, None] for t in (mean, std))

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """(latents - mean) / std per channel (and latent frame, from the clip's start); identity if there are none."""
        stats = self._statistics(latents)
        return latents if stats is None else ((latents - stats[0]) / stats[1]).to(latents.dtype)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `normalize`."""
        stats = self._statistics(latents)
        return latents if stats is None else (latents * stats[1] + stats[0]).to(latents.dtype)


class TokenizerStream:
    """Codes one clip chunk by chunk with constant convolution state; temporal attention keeps its keys and values."""

    def __init__(self, tokenizer: CosmosVideoTokenizer, step):
        self._step, self._state = step, StreamState()

    @torch.no_grad()
    def push(self, chunk: torch.Tensor):
        result = self._step(chunk, self._state)
        self._state.first = False
        return result
