"""The diffusion transformer of Cosmos-1 (arXiv 2501.03575, section 5.1): text, frame and padding conditions over video.

Names of parameters and config fields are those of diffusers' `CosmosTransformer3DModel`; its published folders load.
The network knows nothing of noise: what it is given and what its output means is the scheduler's
(`schedulers/scheduling_edm_cosmos.py`).

Axes: B batch, C channels, T latent frames, H and W latent height and width, L tokens, M text tokens, D width.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .dit_layers import AdaptiveLayerNorm, CosmosBlock, LearnablePositionEmbedding, RotaryEmbedding3D, TimeEmbedding
from .strict_loading import StrictLoadingMixin

_14B = dict(num_layers=36, num_attention_heads=40, rope_scale=(2.0, 2.0, 2.0))
_TINY = dict(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    text_embed_dim=32,
    adaln_lora_dim=16,
    max_size=(16, 48, 48),
)

# Sizes by the name of the published model; `CosmosWorldTransformer3D(**PRESETS["7b-text2world"])`.
PRESETS = {
    "7b-text2world": dict(),
    "7b-video2world": dict(in_channels=17),
    "14b-text2world": _14B,
    "14b-video2world": dict(in_channels=17, **_14B),
    "nano-video2world": dict(
        in_channels=17,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        text_embed_dim=128,
        adaln_lora_dim=32,
        max_size=(32, 48, 48),
    ),
    "tiny": _TINY,
    "tiny-video2world": dict(in_channels=17, **_TINY),
}


class PatchEmbedding(nn.Module):
    """Latents -> tokens; a token's vector lists channels slowest, then frame, row and column within the patch."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: tuple[int, int, int]):
        super().__init__()
        self.patch_size = patch_size
        volume = patch_size[0] * patch_size[1] * patch_size[2]
        self.proj = nn.Linear(in_channels * volume, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for axis, patch in zip((2, 4, 6), self.patch_size, strict=True):
            x = x.unflatten(axis, (-1, patch))  # [B, C, T, p_t, H, p_h, W, p_w] in the end
        return self.proj(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)).flatten(1, 3)  # [B, L, D]


class CosmosWorldTransformer3D(StrictLoadingMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The one world transformer: text-to-world, and video-to-world where `in_channels` has a channel for the mask.

    Args:
        in_channels: channels of `hidden_states` plus one where the model takes a `condition_mask`.
        out_channels: latent channels; those of `hidden_states` and of the output.
        num_attention_heads, attention_head_dim, num_layers, mlp_ratio: size of the blocks.
        text_embed_dim: width of `encoder_hidden_states`.
        adaln_lora_dim: rank of the noise level's low-rank modulation.
        max_size: largest latent (T, H, W).
        patch_size: latent positions per token along (T, H, W).
        rope_scale: stretch of the rotary wavelengths along (T, H, W).
        concat_padding_mask: whether a channel tells which pixels are padding.
        extra_pos_embed_type: "learnable" (tables added before every block) or None.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CosmosBlock"]
    _repeated_blocks = ["CosmosBlock"]
    _keep_in_fp32_modules = ["learnable_pos_embed"]
    _skip_layerwise_casting_patterns = ["patch_embed", "learnable_pos_embed", "norm", "proj_out"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        num_attention_heads: int = 32,
        attention_head_dim: int = 128,
        num_layers: int = 28,
        mlp_ratio: float = 4.0,
        text_embed_dim: int = 1024,
        adaln_lora_dim: int = 256,
        max_size: tuple[int, int, int] = (128, 240, 240),
        patch_size: tuple[int, int, int] = (1, 2, 2),
        rope_scale: tuple[float, float, float] = (2.0, 1.0, 1.0),
        concat_padding_mask: bool = True,
        extra_pos_embed_type: str | None = "learnable",
    ):
        super().__init__()
        if in_channels - out_channels not in (0, 1):
            raise ValueError(
                f"in_channels must be out_channels, or one more for the condition mask; got in_channels={in_channels} "
                f"and out_channels={out_channels}"
            )
        if extra_pos_embed_type not in (None, "learnable"):
            raise ValueError(f"extra_pos_embed_type must be None or 'learnable', got {extra_pos_embed_type!r}")
        if any(size % patch for size, patch in zip(max_size, patch_size, strict=True)):
            raise ValueError(f"max_size {tuple(max_size)} must be a multiple of patch_size {tuple(patch_size)}")
        hidden_size = num_attention_heads * attention_head_dim
        patch_size = tuple(patch_size)

        self.patch_embed = PatchEmbedding(in_channels + concat_padding_mask, hidden_size, patch_size)
        self.rope = RotaryEmbedding3D(attention_head_dim, rope_scale)
        self.learnable_pos_embed = None
        if extra_pos_embed_type == "learnable":
            tables = tuple(size // patch for size, patch in zip(max_size, patch_size, strict=True))
            self.learnable_pos_embed = LearnablePositionEmbedding(hidden_size, tables)
        self.time_embed = TimeEmbedding(hidden_size)
        self.transformer_blocks = nn.ModuleList(
            CosmosBlock(hidden_size, num_attention_heads, text_embed_dim, mlp_ratio, adaln_lora_dim)
            for _ in range(num_layers)
        )
        self.norm_out = AdaptiveLayerNorm(hidden_size, adaln_lora_dim, gated=False)
        self.proj_out = nn.Linear(
            hidden_size, patch_size[0] * patch_size[1] * patch_size[2] * out_channels, bias=False
        )
        self.gradient_checkpointing = False
        self._initialize()

    @property
    def takes_condition_mask(self) -> bool:
        """Whether `forward` needs a `condition_mask` (video-to-world) or refuses it (text-to-world)."""
        return self.config.in_channels > self.config.out_channels

    @torch.no_grad()
    def _initialize(self):
        """As the reference starts a training: every modulation is the shared MLP's, and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for module in self.modules():
            if isinstance(module, AdaptiveLayerNorm):
                nn.init.zeros_(module.linear_2.weight)
        for linear in self.time_embed.t_embedder.children():
            nn.init.normal_(linear.weight, std=0.02)
        if self.learnable_pos_embed is not None:
            for table in self.learnable_pos_embed.parameters():
                std = table.shape[1] ** -0.5
                nn.init.trunc_normal_(table, std=std, a=-3 * std, b=3 * std)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        *,
        fps: float | torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """One evaluation of the network.

        Args:
            hidden_states: noisy latents [B, C, T, H, W], already times c_in.
            timestep: c_noise = ln(sigma) / 4, a scalar or [B].
            encoder_hidden_states: text [B, M, text_embed_dim]. All M positions are attended; the published models were
                trained with zero vectors after the prompt's end and no mask.
            fps: pixel frames per second, one for the whole batch; None is 24.
            condition_mask: [B or 1, 1, T, H, W], 1 on the conditioning frames; needed by a video-to-world model.
            padding_mask: [B or 1, 1, height, width] at any resolution, 1 where the picture is padding; None is all zeros.
            attention_mask: [B or 1, M], nonzero where text may be attended; None, as in the published models, is everywhere.
            return_dict: False returns a tuple.

        Returns:
            The network's raw output in `.sample`, [B, C, T, H, W].

        Raises:
            ValueError: inputs of a wrong shape, latents larger than `max_size` or no multiple of `patch_size`, a condition
                that the model has no channel for or lacks, different fps within a batch.
        """
        batch, _, *size = self._check_latents(hidden_states)
        text = self._check_text(encoder_hidden_states, batch)
        mask = self._text_mask(attention_mask, text)
        dtype, device = self.time_embed.norm.weight.dtype, hidden_states.device
        patch = self.patch_embed.patch_size
        grid = tuple(s // p for s, p in zip(size, patch, strict=True))

        # 1. Conditions that are channels of the input
        x = self._with_channels(hidden_states.to(dtype), condition_mask, padding_mask)  # [B, C + conditions, T, H, W]
        x = self.patch_embed(x)  # [B, L, D]

        # 2. Positions and noise level
        rotary = self.rope(grid, single_fps(fps), device)
        positions = None if self.learnable_pos_embed is None else self.learnable_pos_embed(grid).to(x.dtype)  # [L, D]
        time, offsets = self.time_embed(self._check_timestep(timestep, batch, device), dtype)  # [B, D], [B, 3D]

        # 3. Blocks
        text = text.to(dtype)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, text, time, offsets, rotary, positions, mask)
            else:
                x = block(x, text, time, offsets, rotary, positions, mask)  # [B, L, D]

        # 4. Tokens to latents. A token's output lists row, column and frame in the patch, then channels: not the input's order
        (x,) = self.norm_out(x, time, offsets)
        x = self.proj_out(x).view(batch, *grid, patch[1], patch[2], patch[0], -1)  # [B, T', H', W', p_h, p_w, p_t, C]
        x = x.permute(0, 7, 1, 6, 2, 4, 3, 5).reshape(batch, -1, *size)  # [B, C, T, H, W]
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    # ---- conditions and checks -------------------------------------------------------------------------------------

    def _with_channels(self, latents, condition_mask, padding_mask) -> torch.Tensor:
        """Latents with the condition mask's and the padding mask's channel behind them, in this order."""
        batch, _, frames, height, width = latents.shape
        channels = [latents]
        if self.takes_condition_mask:
            if condition_mask is None:
                raise ValueError(
                    "condition_mask is missing: this model was made for video-to-world (in_channels has a channel for it). "
                    "Pass [B, 1, T, H, W], 1 on the conditioning frames, all 0 for none."
                )
            _check_shape("condition_mask", condition_mask, ((batch, 1), (1,), (frames,), (height,), (width,)))
            channels.append(condition_mask.to(latents).expand(batch, -1, -1, -1, -1))
        elif condition_mask is not None:
            raise ValueError(
                "this model takes no condition_mask: its in_channels has no channel for it (text-to-world)"
            )
        if self.config.concat_padding_mask:
            if padding_mask is None:
                padding_mask = latents.new_zeros(1, 1, height, width)
            _check_shape("padding_mask", padding_mask, ((batch, 1), (1,), None, None))
            # nearest takes source index floor(i * height_in / height)
            padding_mask = F.interpolate(padding_mask.to(latents), size=(height, width), mode="nearest")
            channels.append(padding_mask.unsqueeze(2).expand(batch, -1, frames, -1, -1))
        elif padding_mask is not None:
            raise ValueError("this model takes no padding_mask: concat_padding_mask is off in its config")
        return torch.cat(channels, dim=1) if len(channels) > 1 else latents

    def _check_latents(self, latents: torch.Tensor) -> torch.Size:
        if latents.ndim != 5 or latents.shape[1] != self.config.out_channels:
            raise ValueError(
                f"hidden_states must be [B, {self.config.out_channels}, T, H, W], got {tuple(latents.shape)}"
            )
        for name, size, patch, largest in zip(
            ("latent frames", "latent height", "latent width"),
            latents.shape[2:],
            self.config.patch_size,
            self.config.max_size,
            strict=True,
        ):
            if size == 0 or size % patch:
                raise ValueError(f"{name} must be a positive multiple of {patch} (patch_size), got {size}")
            if size > largest:
                raise ValueError(f"{name} must be at most {largest} (max_size in the config), got {size}")
        return latents.shape

    def _check_text(self, text: torch.Tensor, batch: int) -> torch.Tensor:
        _check_shape("encoder_hidden_states", text, ((batch,), None, (self.config.text_embed_dim,)))
        return text

    @staticmethod
    def _text_mask(mask: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor | None:
        if mask is None:
            return None
        _check_shape("attention_mask", mask, ((text.shape[0], 1), (text.shape[1],)))
        return mask.to(text.device).bool()[:, None, None].expand(text.shape[0], -1, -1, -1)  # [B, 1, 1, M]

    @staticmethod
    def _check_timestep(timestep, batch: int, device) -> torch.Tensor:
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=device)
        if timestep.shape not in ((), (1,), (batch,)):
            raise ValueError(f"timestep must be a scalar or [{batch}] (one per sample), got {tuple(timestep.shape)}")
        return timestep.expand(batch)


def single_fps(fps) -> float | None:
    """A number, or a tensor or list of equal numbers -> float. Raises ValueError where they differ or are not positive."""
    if fps is None:
        return None
    values = set(torch.as_tensor(fps, dtype=torch.float64).flatten().tolist())
    if len(values) != 1:
        raise ValueError(f"fps must be the same for a whole batch, got {sorted(values)}: group videos by fps")
    value = values.pop()
    if not 0 < value < float("inf"):
        raise ValueError(f"fps must be positive, got {value}")
    return value


def _check_shape(name: str, tensor: torch.Tensor, allowed: tuple):
    """`allowed` has, per axis, the legal sizes or None for any."""
    fits = tensor.ndim == len(allowed) and all(
        sizes is None or size in sizes for size, sizes in zip(tensor.shape, allowed, strict=True)
    )
    if not fits:
        wanted = ["any" if s is None else " or ".join(map(str, dict.fromkeys(s))) for s in allowed]
        raise ValueError(f"{name} must be [{', '.join(wanted)}], got {tuple(tensor.shape)}")
