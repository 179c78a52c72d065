"""The causal video tokenizer, continuous and discrete (arXiv 2501.03575, section 3).

A Haar wavelet transform, a residual encoder of factorised causal convolutions and attention, and the mirrored decoder.
Everything is causal in time: a latent frame depends on no later pixel frame, so a clip may be coded chunk by chunk
(`encoder_stream`, `decoder_stream`) with the result of coding it at once, and a single image is a clip of one frame.

Axes: B batch, C channels, T pixel frames, H and W height and width; T', H', W' the same of the latents.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .coder_stages import Coder, Level, Middle
from .diffusers_layout import DIFFUSERS_CLASS, load_diffusers_tokenizer
from .latent_coding import (
    LatentCodingMixin,
    TokenizerDecoderOutput,
    TokenizerOutput,
    build_quantizer,
    check_statistics,
    count_halvings,
)
from .starting_weights import start_as_projection
from .streaming import ChunkedDecodingMixin, StreamState, TokenizerStream
from .strict_loading import StrictLoadingMixin
from .tiling import TilingMixin
from .video_layers import (
    CausalConv3d,
    Downsample,
    FactorizedAttention,
    FactorizedConv,
    FrameNorm,
    ResBlock,
    Upsample,
    haar_patch,
    haar_unpatch,
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


class VideoEncoder(Coder):
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
            self.levels.append(_level(width, out_width, config.num_res_blocks, attention, resample))
            resolution, width = resolution // 2, out_width
        self.mid = _middle(width)
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorizedConv(width, config.z_channels)

    def forward(self, x: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        # No name for the patches: they go when `conv_in` has read them.
        x = self._run([*self.levels, self.mid], haar_patch(x, self.patch_size, stream is None or stream.first), stream)
        return self.conv_out(x, stream, self.norm_out)


class VideoDecoder(Coder):
    """Features after `post_quant_conv` [B, T', H', W', z_channels] -> pixels [B, T, H, W, 3]."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.channels * m for m in config.decoder_channels_mult or config.channels_mult]
        doublings_s, doublings_t = _resamplings(config)
        width = widths[-1]
        self.conv_in = FactorizedConv(config.z_channels, width)
        self.mid = _middle(width)
        self.levels = nn.ModuleList()  # in the order of use: the narrowest resolution first
        resolution = config.resolution // config.patch_size // 2 ** (len(widths) - 1)
        for i, out_width in enumerate(reversed(widths)):
            last = i == len(widths) - 1
            temporal = not last and 0 < i <= doublings_t
            spatial = not last and (temporal or (i < doublings_s and doublings_s > doublings_t))
            resample = Upsample(out_width, spatial, temporal) if spatial or temporal else None
            attention = resolution in config.attn_resolutions
            self.levels.append(_level(width, out_width, config.num_res_blocks + 1, attention, resample))
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
        x = self.conv_out(self._run([self.mid, *self.levels], z, stream), stream, self.norm_out)
        return haar_unpatch(x, self.patch_size, stream is None or stream.first)


def _level(in_channels: int, out_channels: int, num_blocks: int, attention: bool, resample: nn.Module | None) -> Level:
    blocks = [ResBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)]
    return Level(blocks, [FactorizedAttention(out_channels) for _ in range(num_blocks * attention)], resample)


def _middle(channels: int) -> Middle:
    return Middle(ResBlock(channels, channels), FactorizedAttention(channels), ResBlock(channels, channels))


def _resamplings(config) -> tuple[int, int]:
    """How often the network itself halves space and time, beyond the wavelet patches."""
    counts = count_halvings(config, "spatial_compression"), count_halvings(config, "temporal_compression")
    if max(counts) >= len(config.channels_mult):
        raise ValueError(
            f"channels_mult {tuple(config.channels_mult)} has too few levels for {max(counts)} resamplings"
        )
    return counts


class CosmosVideoTokenizer(
    LatentCodingMixin, TilingMixin, ChunkedDecodingMixin, StrictLoadingMixin, ModelMixin, ConfigMixin
):
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
    readable_classes = ("CosmosVideoTokenizer", DIFFUSERS_CLASS)
    pixel_name, pixel_axes, latent_axes = "video", ("T", "H", "W"), ("T'", "H'", "W'")

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
        check_statistics(self.config, per_frame=True)
        self.fsq = build_quantizer(self.config)
        self.encoder = VideoEncoder(self.config)
        self.decoder = VideoDecoder(self.config)
        self.quant_conv = CausalConv3d(z_channels, latent_channels, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(latent_channels, z_channels, (1, 1, 1))
        start_as_projection(self, CausalConv3d)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As of every diffusers model; also reads a folder of diffusers' `AutoencoderKLCosmos`.

        ValueError for a folder of another class or weights that do not fit its config.
        """
        if cls.stored_class(pretrained_model_name_or_path, kwargs) == DIFFUSERS_CLASS:
            return load_diffusers_tokenizer(cls, pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

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

    def _check_video(self, video: torch.Tensor, frames_in_first: int = 1):
        """Refuse what the strides would mangle. `frames_in_first`: 1 at a clip's start, 0 for a further chunk."""
        self._check_pixels(video)
        factor, frames = self.config.temporal_compression, video.shape[2]
        if frames == 0 or (frames - frames_in_first) % factor:
            below = (frames - frames_in_first) // factor * factor + frames_in_first
            legal = f"{below} or {below + factor}" if below > 0 else f"{below + factor}"
            remedy = (
                f"encode(..., pad_frames=True) repeats the last frame and decode(..., num_frames={frames}) crops"
                if frames_in_first
                else "the stream is as it was before this chunk"
            )
            raise ValueError(
                f"the number of frames must be {frames_in_first} + k * {factor}, got {frames}; the nearest legal is "
                f"{legal}. {remedy}."
            )

    # ---- coding ------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, video: torch.Tensor, pad_frames: bool = False, chunk: int | None = None) -> TokenizerOutput:
        """Video [B, 3, T, H, W] in [-1, 1] -> `TokenizerOutput`.

        Args:
            pad_frames: repeat the last frame up to a legal number of frames; decode with `num_frames=T`.
            chunk: pixel frames to pass through the network at a time, a multiple of `temporal_compression` (the first time one
                more); the result is that of coding all at once, the memory that of one chunk.

        Raises ValueError where H or W is no multiple of `spatial_compression`, where T is not 1 + k * `temporal_compression`
        and `pad_frames` is off, for values outside [-1, 1] or not finite, and for another dtype than the tokenizer's.
        """
        if pad_frames and video.ndim == 5 and video.shape[2]:
            video = self.pad_frames(video)
        self._check_video(video)
        factor = self.config.temporal_compression
        if chunk is None:
            return self._encode(video)
        if chunk < 1 or chunk % factor:
            raise ValueError(f"chunk must be a positive multiple of {factor} pixel frames, got {chunk}")
        parts = self._in_chunks(self._encode, video, [1 + chunk, chunk])
        indices = None if self.fsq is None else torch.cat([part.indices for part in parts], dim=1)
        return TokenizerOutput(torch.cat([part.latents for part in parts], dim=2), indices)

    def _encode(self, video: torch.Tensor, stream: StreamState | None = None) -> TokenizerOutput:
        def network(x, stream):
            z = self.encoder(x.permute(0, 2, 3, 4, 1), stream)  # [B, T', H', W', C]
            return self.quant_conv(z).permute(0, 4, 1, 2, 3)

        return self._quantize(self._in_tiles(network, video, 1, self.config.spatial_compression, stream))

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, num_frames: int | None = None, chunk: int | None = None
    ) -> TokenizerDecoderOutput:
        """Latents (or codes) [B, C, T', H', W'] -> video.

        Args:
            num_frames: crop what `encode(pad_frames=True)` added.
            chunk: latent frames to pass through the network at a time, with the result of decoding all at once. None is what
                `enable_chunked_decoding` set, else all.
        """
        chunk = self.decode_chunk if chunk is None else chunk
        self._check_latents(latents)
        full = self.num_frames(latents.shape[2])
        if num_frames is not None and (num_frames < 1 or self.latent_frames(num_frames) != latents.shape[2]):
            raise ValueError(
                f"num_frames={num_frames} is not held by {latents.shape[2]} latent frames (at most {full})"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 latent frame, got {chunk}")
        video = (
            self._decode(latents) if chunk is None else torch.cat(self._in_chunks(self._decode, latents, [chunk]), 2)
        )
        return TokenizerDecoderOutput(video[:, :, :num_frames])

    def _decode(self, latents: torch.Tensor, stream: StreamState | None = None) -> torch.Tensor:
        def network(z, stream):
            z = self.post_quant_conv(z.permute(0, 2, 3, 4, 1))
            return self.decoder(z, stream).permute(0, 4, 1, 2, 3)

        return self._in_tiles(network, latents, self.config.spatial_compression, 1, stream).contiguous()

    @apply_forward_hook
    def decode_indices(
        self, indices: torch.Tensor, num_frames: int | None = None, chunk: int | None = None
    ) -> TokenizerDecoderOutput:
        """Indices [B, T', H', W'] of a discrete tokenizer -> video. Raises ValueError for a continuous one."""
        return self.decode(self._codes(indices), num_frames, chunk)

    # ---- coding chunk by chunk -------------------------------------------------------------------------------------

    def _in_chunks(self, code, x: torch.Tensor, lengths: list[int]) -> list:
        """Results of `code` on consecutive chunks of x along time; the last length is repeated to the end."""
        if x.shape[2] <= lengths[0]:
            return [code(x)]  # nothing to remember
        stream, parts, start = StreamState(), [], 0
        while start < x.shape[2]:
            length = lengths[min(len(parts), len(lengths) - 1)]
            parts.append(code(x[:, :, start : start + length], stream))
            stream.first, start = False, start + length
        return parts

    def encoder_stream(self, window: int | None = None) -> TokenizerStream:
        """Encode a clip chunk by chunk: `push(video chunk) -> TokenizerOutput`. The first chunk has
        1 + k * `temporal_compression` frames, later ones a multiple of it; together they equal `encode` of all.

        `window` bounds what is remembered: temporal attention then looks back at that many frames (latent frames; where it
        stands in levels of a higher rate, frames of that rate) instead of all, which is an approximation.
        """
        return TokenizerStream(self._push_video, window)

    def decoder_stream(self, window: int | None = None) -> TokenizerStream:
        """Decode a clip chunk by chunk: `push(latents chunk) -> video chunk`, any number of latent frames each.

        `window`: as of `encoder_stream`.
        """
        return TokenizerStream(self._push_latents, window)

    @apply_forward_hook
    def _push_video(self, video: torch.Tensor, stream: StreamState) -> TokenizerOutput:
        self._check_video(video, frames_in_first=int(stream.first))
        self._check_same_clip("video", video, stream)
        return self._encode(video, stream)

    @apply_forward_hook
    def _push_latents(self, latents: torch.Tensor, stream: StreamState) -> torch.Tensor:
        self._check_latents(latents)
        self._check_same_clip("latents", latents, stream)
        return self._decode(latents, stream)

    def _check_same_clip(self, name: str, chunk: torch.Tensor, stream: StreamState):
        """All chunks of a clip have one batch, height, width and dtype, and are cut into the same tiles."""
        clip = dict(
            batch=chunk.shape[0], height=chunk.shape[3], width=chunk.shape[4], dtype=chunk.dtype, tiling=self.tiling
        )
        if stream.first:
            stream.clip = clip
        for key, value in clip.items():
            if value != stream.clip[key]:
                raise ValueError(
                    f"{name} has {key} {value}, but the stream began with {stream.clip[key]}: use one stream per clip"
                )
