"""What the video and the image tokenizer share: results, quantisation, statistics of the latents, checks of what is passed in.

Latents are [B, C, T', H', W'] of videos and [B, C, H', W'] of images.
"""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from .quantizers import FiniteScalarQuantizer

# Pixels lie in [-1, 1]; this much beyond is put down to rounding.
PIXEL_LIMIT = 1.01
# What `from_pretrained` hands on to find a folder or a repository.
_PLACE = (
    *("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder"),
    *("local_dir", "local_dir_use_symlinks", "user_agent"),
)


@dataclass
class TokenizerOutput(BaseOutput):
    """`latents` [B, C, T', H', W'] (codes when discrete); `indices` [B, T', H', W'] int64, None when continuous.

    Those of an image have no T'.
    """

    latents: torch.Tensor
    indices: torch.Tensor | None = None


@dataclass
class TokenizerDecoderOutput(BaseOutput):
    """`sample` [B, 3, T, H, W] (of an image [B, 3, H, W]), about [-1, 1], not clamped."""

    sample: torch.Tensor


class LatentCodingMixin:
    """Put before `ModelMixin`. A subclass names its axes and sets `fsq`, a quantiser or None."""

    pixel_axes: tuple[str, ...]  # after batch and channels, e.g. ("T", "H", "W")
    latent_axes: tuple[str, ...]
    pixel_name: str

    @classmethod
    def stored_class(cls, place, kwargs: dict) -> str:
        """Name of the class that wrote a folder; ValueError for one that this class cannot read."""
        config = cls.load_config(place, **{key: kwargs[key] for key in _PLACE if key in kwargs})
        name = config.get("_class_name", cls.__name__)
        if name not in cls.readable_classes:
            raise ValueError(
                f"{place} holds a {name}, {cls.__name__} reads {' and '.join(cls.readable_classes)}: "
                f"use {name}.from_pretrained"
            )
        return name

    def forward(self, sample: torch.Tensor, latent_noise: float = 0.0) -> TokenizerDecoderOutput:
        """Reconstruct: decode(encode(sample)).

        `latent_noise` is for training a decoder that forgives what a diffusion model makes: noise is added to the latents,
        of a level that is drawn for each sample, uniform from 0 to this, in units of the latents' standard deviation.
        """
        latents = self.encode(sample).latents
        if latent_noise:
            level = latent_noise * torch.rand(len(latents), *[1] * (latents.ndim - 1), device=latents.device)
            normal = self.normalize(latents)
            latents = self.denormalize(normal + level.to(normal) * torch.randn_like(normal))
        return self.decode(latents)

    # ---- quantisation ------------------------------------------------------------------------------------------

    def _quantize(self, z: torch.Tensor) -> TokenizerOutput:
        """z [B, C, ...] -> latents, and for a discrete tokenizer codes and indices."""
        if self.fsq is None:
            return TokenizerOutput(z.contiguous())
        codes, indices = self.fsq(z.movedim(1, -1))
        return TokenizerOutput(codes.movedim(-1, 1).contiguous(), indices)

    def _codes(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices [B, ...] -> codes [B, C, ...] in the model's dtype."""
        if self.fsq is None:
            raise ValueError("this tokenizer is continuous (quantizer=None) and has no indices; use decode(latents)")
        if indices.ndim != 1 + len(self.latent_axes):
            raise ValueError(f"indices must be [B, {', '.join(self.latent_axes)}], got {tuple(indices.shape)}")
        return self.fsq.decode(indices).to(self.dtype).movedim(-1, 1).contiguous()

    # ---- checks ------------------------------------------------------------------------------------------------

    def _check_pixels(self, pixels: torch.Tensor):
        """Rank, channels, dtype, height and width, values."""
        name, factor = self.pixel_name, self.config.spatial_compression
        if pixels.ndim != 2 + len(self.pixel_axes) or pixels.shape[1] != self.config.in_channels:
            axes = ", ".join(self.pixel_axes)
            raise ValueError(f"{name} must be [B, {self.config.in_channels}, {axes}], got {tuple(pixels.shape)}")
        if not pixels.is_floating_point():
            raise ValueError(f"{name} must be floating point in [-1, 1], got {pixels.dtype}: use {name} / 127.5 - 1")
        if pixels.shape[0] == 0:
            raise ValueError(f"{name} is an empty batch: {tuple(pixels.shape)}")
        for axis, size in zip(("height", "width"), pixels.shape[-2:], strict=True):
            if size % factor or size == 0:
                below, above = size // factor * factor, -(-max(size, 1) // factor) * factor
                legal = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"{axis} must be a multiple of {factor}, got {size}; the nearest legal is {legal}")
        self._check_values(
            name, pixels, PIXEL_LIMIT, f"scale 0..255 by {name} / 127.5 - 1, or use {name}.clamp(-1, 1)"
        )

    def _check_latents(self, latents: torch.Tensor):
        if not latents.is_floating_point():
            raise ValueError(f"latents must be floating point, got {latents.dtype}: decode_indices takes indices")
        self._check_rank(latents)
        if 0 in latents.shape:
            raise ValueError(f"latents are empty: {tuple(latents.shape)}")
        limit = None if self.fsq is None else PIXEL_LIMIT
        self._check_values(
            "latents", latents, limit, "codes of a discrete tokenizer are what encode(...).latents gives"
        )

    def _check_values(self, name: str, tensor: torch.Tensor, limit: float | None, advice: str):
        """Dtype, NaN, range. Values cannot be looked at where there are none: on the meta device and while compiling."""
        # In training the wrappers of sharded and mixed-precision models cast inputs and weights between here and the layers.
        casts = self.training or torch.is_autocast_enabled(tensor.device.type)
        if tensor.dtype != self.dtype and not casts:
            raise ValueError(
                f"{name} must have the tokenizer's dtype {self.dtype}, got {tensor.dtype}: use .to(dtype)"
            )
        if tensor.is_meta or torch.compiler.is_compiling() or not tensor.numel():
            return
        low, high = (value.item() for value in tensor.detach().aminmax())  # a NaN comes through
        if not (-torch.inf < low <= high < torch.inf):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        if limit is not None and max(-low, high) > limit:
            raise ValueError(f"{name} must lie in [-1, 1], got {low:.3g}..{high:.3g}: {advice}")

    # ---- statistics of the latents ---------------------------------------------------------------------------------

    def _statistics(self, latents: torch.Tensor, prolong: bool = False) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.config.latents_mean is None:
            return None
        self._check_rank(latents)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=latents.device).view(len(values), -1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        frames = latents.shape[2] if len(self.latent_axes) == 3 else 1
        if prolong and mean.shape[1] > 1:
            places = torch.arange(frames, device=mean.device).clamp(max=mean.shape[1] - 1)
            mean, std = mean[:, places], std[:, places]
        if mean.shape[1] > 1 and frames > mean.shape[1]:
            raise ValueError(
                f"statistics are kept for {mean.shape[1]} latent frames, got {frames}: code in shorter chunks"
            )
        further = [1] * (len(self.latent_axes) - 1)
        return tuple(
            t[:, : max(frames if t.shape[1] > 1 else 1, 1)].reshape(1, len(t), -1, *further) for t in (mean, std)
        )

    def _check_rank(self, latents: torch.Tensor):
        if latents.ndim != 2 + len(self.latent_axes) or latents.shape[1] != self.config.latent_channels:
            axes = ", ".join(self.latent_axes)
            raise ValueError(f"latents must be [B, {self.config.latent_channels}, {axes}], got {tuple(latents.shape)}")

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """(latents - mean) / std per channel (and latent frame, from the clip's start); identity if there are none."""
        stats = self._statistics(latents)
        return latents if stats is None else ((latents - stats[0]) / stats[1]).to(latents.dtype)

    def denormalize(self, latents: torch.Tensor, prolong: bool = False) -> torch.Tensor:
        """Inverse of `normalize`. `prolong`: latent frames after those that statistics are kept for have the last one's."""
        stats = self._statistics(latents, prolong)
        return latents if stats is None else (latents * stats[1] + stats[0]).to(latents.dtype)


def build_quantizer(config) -> FiniteScalarQuantizer | None:
    """The quantiser that a tokenizer's config asks for."""
    if config.quantizer not in (None, "fsq"):
        raise ValueError(f"quantizer must be None (continuous) or 'fsq' (discrete), got {config.quantizer!r}")
    if config.quantizer is None:
        return None
    if config.latent_channels != len(config.fsq_levels):
        raise ValueError(
            f"latent_channels={config.latent_channels} must equal the number of fsq_levels, {len(config.fsq_levels)}"
        )
    return FiniteScalarQuantizer(config.fsq_levels)


def check_statistics(config, per_frame: bool):
    """Refuse statistics that do not belong to the latents: [C], with `per_frame` also [C][T'], deviations above zero."""
    mean, std = config.latents_mean, config.latents_std
    if (mean is None) != (std is None):
        raise ValueError("latents_mean and latents_std must be given together")
    if mean is None:
        return
    mean, std = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (mean, std))
    legal = f"[{config.latent_channels}]" + (f" or [{config.latent_channels}][latent frames]" * per_frame)
    if mean.shape != std.shape or mean.ndim not in (1, 1 + per_frame) or len(mean) != config.latent_channels:
        raise ValueError(f"latents_mean and latents_std must be {legal}, got {list(mean.shape)} and {list(std.shape)}")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and std.min() > 0):
        raise ValueError("latents_mean must be finite and latents_std finite and above zero")


def count_halvings(config, name: str) -> int:
    """How often the network itself halves an axis, beyond the wavelet patches, to reach the compression of that `name`."""
    if config.patch_size not in (2, 4):
        raise ValueError(f"patch_size must be 2 or 4, got {config.patch_size}")
    factor = getattr(config, name)
    if factor not in (4, 8, 16) or factor < config.patch_size:
        raise ValueError(f"{name} must be 4, 8 or 16 and at least patch_size={config.patch_size}, got {factor}")
    return (factor // config.patch_size).bit_length() - 1
