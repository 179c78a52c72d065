"""The image tokenizer, continuous and discrete (arXiv 2501.03575, section 3).

A Haar wavelet transform, a residual encoder of convolutions and attention, and the mirrored decoder, all in two dimensions.
A video tokenizer takes images, too, as clips of one frame; the published image tokenizers are networks of their own.

Axes: B batch, C channels, H and W height and width; H', W' the same of the latents.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .coder_stages import Coder, Level, Middle
from .image_layers import (
    NORM_GROUPS,
    ImageAttention,
    ImageDownsample,
    ImageResBlock,
    ImageUpsample,
    group_norm,
    image_patch,
    image_unpatch,
)
from .latent_coding import (
    LatentCodingMixin,
    TokenizerDecoderOutput,
    TokenizerOutput,
    build_quantizer,
    check_statistics,
    count_halvings,
)
from .starting_weights import start_as_projection
from .strict_loading import StrictLoadingMixin
from .tiling import TilingMixin

_DISCRETE = dict(quantizer="fsq", latent_channels=6, z_channels=256)
# Sizes by the name of the published model; `CosmosImageTokenizer(**PRESETS["ci8x8"])`.
PRESETS = {
    "ci8x8": dict(),
    "ci16x16": dict(spatial_compression=16),
    "di8x8": dict(**_DISCRETE),
    "di16x16": dict(**_DISCRETE, spatial_compression=16),
    "ci8x8-360p": dict(patch_size=2),
    "ci16x16-360p": dict(patch_size=2, spatial_compression=16),
    "di8x8-360p": dict(**_DISCRETE, patch_size=2),
    "di16x16-360p": dict(**_DISCRETE, patch_size=2, spatial_compression=16),
    "tiny": dict(channels=32, channels_mult=(1, 1, 1), num_res_blocks=1),
}


class ImageEncoder(Coder):
    """Pixels [B, 3, H, W] -> features before `quant_conv` [B, z_channels, H', W']."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        widths, halvings = _widths(config), count_halvings(config, "spatial_compression")
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        resolution, width = config.resolution // config.patch_size, config.channels
        for i, out_width in enumerate(widths):
            halves = i < halvings
            resample = ImageDownsample(out_width) if halves else None
            attention = resolution in config.attn_resolutions
            self.levels.append(_level(width, out_width, config.num_res_blocks, attention, resample))
            resolution, width = resolution // 2 if halves else resolution, out_width
        self.mid = _middle(width)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._run([*self.levels, self.mid], image_patch(x, self.patch_size))
        return self.conv_out(F.silu(self.norm_out(x)))


class ImageDecoder(Coder):
    """Features after `post_quant_conv` [B, z_channels, H', W'] -> pixels [B, 3, H, W]."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        widths, doublings = _widths(config), count_halvings(config, "spatial_compression")
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = _middle(width)
        self.levels = nn.ModuleList()  # in the order of use: the narrowest resolution first
        # As in the reference, which counts from the coarsest that the levels allow, also where not all of them resample.
        resolution = config.resolution // config.patch_size // 2 ** (len(widths) - 1)
        for i, out_width in enumerate(reversed(widths)):
            doubles = i < doublings
            resample = ImageUpsample(out_width) if doubles else None
            attention = resolution in config.attn_resolutions
            self.levels.append(_level(width, out_width, config.num_res_blocks + 1, attention, resample))
            resolution, width = resolution * 2 if doubles else resolution, out_width
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, config.out_channels * config.patch_size**2, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self._run([self.mid, *self.levels], z)
        return image_unpatch(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)


def _level(in_channels: int, out_channels: int, num_blocks: int, attention: bool, resample: nn.Module | None) -> Level:
    blocks = [ImageResBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)]
    return Level(blocks, [ImageAttention(out_channels) for _ in range(num_blocks * attention)], resample)


def _middle(channels: int) -> Middle:
    return Middle(ImageResBlock(channels, channels), ImageAttention(channels), ImageResBlock(channels, channels))


def _widths(config) -> list[int]:
    """Channels of each level, finest resolution first."""
    widths = [config.channels * factor for factor in config.channels_mult]
    if any(width % NORM_GROUPS for width in [config.channels, *widths]):
        raise ValueError(
            f"channels={config.channels} with channels_mult={tuple(config.channels_mult)}: the width of every level must "
            f"be a multiple of {NORM_GROUPS}, got {widths}"
        )
    if count_halvings(config, "spatial_compression") > len(widths):
        raise ValueError(
            f"channels_mult {tuple(config.channels_mult)} has too few levels for a spatial_compression of "
            f"{config.spatial_compression} with patch_size={config.patch_size}"
        )
    return widths


class CosmosImageTokenizer(LatentCodingMixin, TilingMixin, StrictLoadingMixin, ModelMixin, ConfigMixin):
    """Image autoencoder: continuous when `quantizer` is None, discrete when it is "fsq".

    Args:
        channels, channels_mult, num_res_blocks: width of the first level, factors per level, blocks per level.
        patch_size: 2 or 4, side of the Haar patches.
        z_channels, latent_channels: width at the bottleneck and of the latents (6 for FSQ, one per level).
        spatial_compression: pixels per latent position along H and W.
        attn_resolutions, resolution: attention in levels whose nominal size, counted from `resolution`, is listed.
        quantizer, fsq_levels: None or "fsq", and the number of values per code channel.
        latents_mean, latents_std: statistics [C] that `normalize` uses; None means identity.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ImageResBlock", "ImageAttention"]
    readable_classes = ("CosmosImageTokenizer",)
    pixel_name, pixel_axes, latent_axes = "image", ("H", "W"), ("H'", "W'")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 128,
        channels_mult: tuple[int, ...] = (2, 4, 4),
        num_res_blocks: int = 2,
        patch_size: int = 4,
        z_channels: int = 16,
        latent_channels: int = 16,
        spatial_compression: int = 8,
        attn_resolutions: tuple[int, ...] = (32,),
        resolution: int = 1024,
        quantizer: str | None = None,
        fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
        latents_mean: list | None = None,
        latents_std: list | None = None,
    ):
        super().__init__()
        check_statistics(self.config, per_frame=False)
        self.fsq = build_quantizer(self.config)
        self.encoder = ImageEncoder(self.config)
        self.decoder = ImageDecoder(self.config)
        self.quant_conv = nn.Conv2d(z_channels, latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, z_channels, 1)
        start_as_projection(self, nn.Conv2d)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As of every diffusers model; ValueError for a folder of another class or weights that do not fit its config."""
        cls.stored_class(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @apply_forward_hook
    def encode(self, image: torch.Tensor) -> TokenizerOutput:
        """Image [B, 3, H, W] in [-1, 1] -> `TokenizerOutput`. H and W are multiples of `spatial_compression`."""
        self._check_pixels(image)
        z = self._in_tiles(
            lambda x, _: self.quant_conv(self.encoder(x)), image, 1, self.config.spatial_compression, None
        )
        return self._quantize(z)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> TokenizerDecoderOutput:
        """Latents (or codes) [B, C, H', W'] -> image."""
        self._check_latents(latents)
        factor = self.config.spatial_compression
        image = self._in_tiles(lambda z, _: self.decoder(self.post_quant_conv(z)), latents, factor, 1, None)
        return TokenizerDecoderOutput(image.contiguous())

    @apply_forward_hook
    def decode_indices(self, indices: torch.Tensor) -> TokenizerDecoderOutput:
        """Indices [B, H', W'] of a discrete tokenizer -> image. Raises ValueError for a continuous one."""
        return self.decode(self._codes(indices))
