"""The diffusion transformer of Cosmos-1 (arXiv 2501.03575, section 5.1): one class for every condition over video.

Names of parameters and config fields are those of diffusers' `CosmosTransformer3DModel`, whose published folders load, and new
ones for what it lacks: actions, camera rays, tokens and views, which `dit_conditions` describes.
The network knows nothing of noise: what it is given and what its output means is the scheduler's
(`schedulers/scheduling_edm_cosmos.py`).

Axes: B batch, V views, C channels, T latent frames of all views (view slowest), H and W latent height and width, L tokens,
M text tokens of a view, D width; F is 1, or T where noise levels or actions differ from frame to frame.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .dit_conditions import (
    check_actions,
    check_condition_config,
    check_shape,
    condition_parts,
    start_at_zero,
    with_condition_channels,
)
from .dit_layers import (
    AdaptiveLayerNorm,
    CosmosBlock,
    KeysValues,
    LearnablePositionEmbedding,
    RotaryEmbedding3D,
    SincosPositionEmbedding,
    TimeEmbedding,
)
from .feature_caching import FeatureCachingMixin
from .linear import speed_up
from .parallelism import ParallelismMixin, is_fully_sharded
from .strict_loading import StrictLoadingMixin

_14B = dict(num_layers=36, num_attention_heads=40, rope_scale=(2.0, 2.0, 2.0))
_MULTIVIEW = dict(num_views=6, view_embed_dim=6, frame_repeat_embed=True, extra_pos_embed_type="sincos")
_NANO = dict(
    num_attention_heads=4,
    attention_head_dim=64,
    text_embed_dim=128,
    adaln_lora_dim=32,
    max_size=(32, 48, 48),
)
_TINY = dict(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    text_embed_dim=32,
    adaln_lora_dim=16,
    max_size=(16, 48, 48),
)
_DECODER = dict(in_channels=48, condition_channels=32, rope_scale=(1.0, 1.5, 1.5), extra_pos_embed_type=None)

# Sizes by the name of the published model; `CosmosWorldTransformer3D(**PRESETS["7b-text2world"])`.
PRESETS = {
    "7b-text2world": dict(),
    "7b-video2world": dict(in_channels=17),
    "14b-text2world": _14B,
    "14b-video2world": dict(in_channels=17, **_14B),
    "7b-text2world-multiview": _MULTIVIEW,
    "7b-video2world-multiview": dict(in_channels=17, **_MULTIVIEW),
    "7b-video2world-action": dict(in_channels=17, action_dim=7),
    "7b-diffusion-decoder": dict(condition_vocab_size=64000, **_DECODER),
    "nano-video2world": dict(in_channels=17, num_layers=6, **_NANO),
    "nano-diffusion-decoder": dict(num_layers=4, condition_vocab_size=4375, **_NANO, **_DECODER),
    "tiny": _TINY,
    "tiny-video2world": dict(in_channels=17, **_TINY),
    "tiny-diffusion-decoder": dict(condition_vocab_size=1000, **_TINY, **_DECODER),
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
        return self.proj(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)).flatten(2, 3)  # [B, T', H' * W', D]


class CosmosWorldTransformer3D(
    StrictLoadingMixin, ParallelismMixin, FeatureCachingMixin, ModelMixin, ConfigMixin, PeftAdapterMixin
):
    """The one world transformer. Text is its only condition unless the config has more; `conditions` lists them.

    Args:
        in_channels: `out_channels`, plus one where the model takes a `condition_mask` (video-to-world), plus `camera_channels`
            and `condition_channels`. Padding and views, which have their own fields, are not counted.
        out_channels: latent channels; those of `hidden_states` and of the output.
        num_attention_heads, attention_head_dim, num_layers, mlp_ratio: size of the blocks.
        text_embed_dim: width of `encoder_hidden_states`.
        adaln_lora_dim: rank of the noise level's low-rank modulation.
        max_size: largest latent (T, H, W) of a view.
        patch_size: latent positions per token along (T, H, W).
        rope_scale: stretch of the rotary wavelengths along (T, H, W).
        concat_padding_mask: whether a channel tells which pixels are padding.
        extra_pos_embed_type: "learnable" tables or fixed "sincos" ones, added before every block, or None.
        camera_channels: channels of `camera`, 6 for Plücker rays; 0 is none.
        condition_channels: channels of `condition`; 0 is none.
        condition_vocab_size: `condition` is token ids below this, embedded into `condition_channels`; None is real channels.
        action_dim: width of an action; None is none.
        action_form: "intended", or "as_written" for checkpoints of the published training code (`ActionEmbedding`).
        action_hidden_dim: width within the actions' MLPs; None is 4 times that of the network, as published.
        text_refiner_layers: layers that read the text once more before the blocks do (`TextRefiner`); 0 is none.
        num_views: views that the time and text axes hold, each with its own positions and its own text.
        view_embed_dim: channels that tell the views apart; 0 is none.
        frame_repeat_embed: whether these channels also hold how often a view's frame repeats (`frame_repeat`).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CosmosBlock"]
    _repeated_blocks = ["CosmosBlock"]
    _keep_in_fp32_modules = ["learnable_pos_embed"]
    # parts that keep their precision where the weights are stored in less
    _skip_layerwise_casting_patterns = (
        *("patch_embed", "condition_embed", "view_embed", "action_embed", "time_embed", "learnable_pos_embed"),
        "text_refiner",
        *("norm1", "norm2", "norm3", "norm_out", "proj_out"),
    )

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
        camera_channels: int = 0,
        condition_channels: int = 0,
        condition_vocab_size: int | None = None,
        action_dim: int | None = None,
        action_form: str = "intended",
        action_hidden_dim: int | None = None,
        text_refiner_layers: int = 0,
        num_views: int = 1,
        view_embed_dim: int = 0,
        frame_repeat_embed: bool = False,
    ):
        super().__init__()
        check_condition_config(self.config)
        if extra_pos_embed_type not in (None, "learnable", "sincos"):
            raise ValueError(
                f"extra_pos_embed_type must be None, 'learnable' or 'sincos', got {extra_pos_embed_type!r}"
            )
        if any(size % patch for size, patch in zip(max_size, patch_size, strict=True)):
            raise ValueError(f"max_size {tuple(max_size)} must be a multiple of patch_size {tuple(patch_size)}")
        hidden_size = num_attention_heads * attention_head_dim
        patch_size = tuple(patch_size)

        for name, part in condition_parts(self.config, hidden_size).items():
            setattr(self, name, part)
        self.patch_embed = PatchEmbedding(in_channels + concat_padding_mask + view_embed_dim, hidden_size, patch_size)
        self.rope = RotaryEmbedding3D(attention_head_dim, rope_scale)
        self.learnable_pos_embed = None
        if extra_pos_embed_type == "learnable":
            tables = tuple(size // patch for size, patch in zip(max_size, patch_size, strict=True))
            self.learnable_pos_embed = LearnablePositionEmbedding(hidden_size, tables)
        self.sincos_pos_embed = SincosPositionEmbedding(hidden_size) if extra_pos_embed_type == "sincos" else None
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
        speed_up(self)
        self._initialize()

    @property
    def takes_condition_mask(self) -> bool:
        """Whether `forward` needs a `condition_mask` (video-to-world) or refuses it (text-to-world)."""
        config = self.config
        return config.in_channels > config.out_channels + config.camera_channels + config.condition_channels

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions that `forward` needs; it refuses the other ones."""
        needed = dict(
            condition_mask=self.takes_condition_mask,
            camera=self.config.camera_channels > 0,
            condition=self.config.condition_channels > 0,
            actions=self.config.action_dim is not None,
        )
        return tuple(name for name, need in needed.items() if need)

    @torch.no_grad()
    def _initialize(self):
        """As the reference starts a training: every modulation is the shared MLP's, and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for module in self.modules():
            if isinstance(module, AdaptiveLayerNorm):
                nn.init.zeros_(module.linear_2.weight)
        start_at_zero(self)
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
        encoder_hidden_states: torch.Tensor | list[KeysValues],
        *,
        fps: float | torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        camera: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        frame_repeat: torch.Tensor | None = None,
        num_views: int | None = None,
        view_indices: tuple[int, ...] | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """One evaluation of the network.

        Args:
            hidden_states: noisy latents [B, C, T, H, W], already times c_in; the views one after the other along T.
            timestep: c_noise = ln(sigma) / 4, a scalar, [B], or [B, T] where every latent frame has its own.
            encoder_hidden_states: text [B, V * M, text_embed_dim], the views' texts one after the other. All positions are
                attended; the published models were trained with zero vectors after the prompt's end and no mask. Or what
                `prepare_text` made of it.
            fps: pixel frames per second, one for the whole batch; None is 24.
            condition_mask: [B or 1, 1, T, H, W], 1 on the conditioning frames; needed by a video-to-world model.
            padding_mask: [B or 1, 1, height, width] at any resolution, 1 where the picture is padding; None is all zeros.
            actions: [B, 1, action_dim], one for the clip, or [B, T, action_dim], one per latent frame.
            camera: rays [B or 1, camera_channels, T, H, W].
            condition: [B or 1, condition_channels, T, H, W], or token ids [B or 1, 1, T, H', W'], resized to H and W.
            frame_repeat: [B or 1, V], a tenth of how often each view's frame repeats; None is zeros.
            num_views: views in this call, the config's first ones; None is all of them.
            view_indices: which of the config's views this call holds, in the order of the time axis, in place of `num_views`.
            attention_mask: [B or 1, V * M], nonzero where text may be attended; None, as in the published models, is everywhere.
            return_dict: False returns a tuple.

        Returns:
            The network's raw output in `.sample`, [B, C, T, H, W].

        Raises:
            ValueError: inputs of a wrong shape, latents larger than `max_size` or no multiple of `patch_size`, a condition
                that the model cannot use or lacks, different fps within a batch.
        """
        views = self._check_views(num_views, view_indices)
        batch, _, *size = self._check_latents(hidden_states, views)
        texts = self._texts_of_blocks(encoder_hidden_states, batch, views)  # [B * V, M, ...] for each block
        mask = self._text_mask(attention_mask, texts[0], batch)
        check_actions(self.config, actions, batch, size[0])
        dtype, device = self.time_embed.norm.weight.dtype, hidden_states.device
        patch = self.patch_embed.patch_size
        grid = tuple(s // p for s, p in zip(size, patch, strict=True))
        self._check_shares(grid)

        # 1. Conditions that are channels of the input
        x = with_condition_channels(
            self,
            hidden_states.to(dtype),
            tuple(range(views)) if view_indices is None else tuple(view_indices),
            condition_mask,
            camera,
            condition,
            padding_mask,
            frame_repeat,
        )  # [B, C + conditions, T, H, W]
        x = self.patch_embed(x).flatten(1, 2)  # [B, L, D]

        # 2. Positions, which start again in every view
        view_grid = (grid[0] // views, *grid[1:])
        rotary = self.rope(view_grid, single_fps(fps), device)  # [T' / V, H' * W', 1, d / 2] each
        rotary = tuple(table.repeat(views, 1, 1, 1).flatten(0, 1) for table in rotary)
        positions = self._extra_positions(view_grid, device)
        if positions is not None:
            positions = positions.to(x.dtype).repeat(views, 1, 1).flatten(0, 1)  # [L, D]

        # 3. Noise level and actions
        action = (None, None) if actions is None else self.action_embed(actions.to(dtype))
        timestep = self._check_timestep(timestep, batch, size[0], device)  # [B, F]
        time, offsets = self.time_embed(timestep, dtype, action)  # [B, F, D], [B, F, 3D]

        # 4. Blocks
        for block, text in zip(self.transformer_blocks, texts, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, text, time, offsets, rotary, positions, mask)
            else:
                x = block(x, text, time, offsets, rotary, positions, mask)  # [B, L, D]

        # 5. Tokens to latents. A token's output lists row, column and frame in the patch, then channels: not the input's order
        (x,) = self.norm_out(x, time, offsets)
        x = self.proj_out(x.unflatten(1, (grid[0], -1)))  # [B, T', H' * W', p_h * p_w * p_t * C]
        x = x.view(batch, *grid, patch[1], patch[2], patch[0], -1)  # [B, T', H', W', p_h, p_w, p_t, C]
        x = x.permute(0, 7, 1, 6, 2, 4, 3, 5).reshape(batch, -1, *size)  # [B, C, T, H, W]
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    @apply_forward_hook
    def prepare_text(self, encoder_hidden_states: torch.Tensor, num_views: int | None = None) -> list[KeysValues]:
        """The text's keys and values in every block, which `forward` takes in the text's place.

        They depend neither on the noise level nor on the latents, so a generation computes them once. They take 4 D bytes per
        block and text position in a 16-bit precision: 235 MB for the published 7B models.
        """
        batch, views = len(encoder_hidden_states), self._check_views(num_views)
        text = self._read_text(encoder_hidden_states, batch, views)
        return [block.attn2.keys_values(text) for block in self.transformer_blocks]

    @property
    def can_prepare_text(self) -> bool:
        """False where a block's weights are brought to it when its forward is called: they are not there outside it."""
        return not (
            any(hasattr(block, "_hf_hook") or is_fully_sharded(block) for block in self.transformer_blocks)
            or _is_group_offload_enabled(self)
        )

    def _texts_of_blocks(self, text, batch: int, views: int) -> list:
        if isinstance(text, torch.Tensor):
            return [self._read_text(text, batch, views)] * len(self.transformer_blocks)
        if len(text) != len(self.transformer_blocks) or len(text[0].key) != batch * views:
            raise ValueError(
                f"encoder_hidden_states holds keys and values of {len(text)} blocks and {len(text[0].key)} texts, this call "
                f"has {len(self.transformer_blocks)} blocks and {batch * views} texts: prepare_text makes them"
            )
        return text

    def _read_text(self, text: torch.Tensor, batch: int, views: int) -> torch.Tensor:
        """[B, V * M, D] -> [B * V, M, D] as the blocks read it."""
        text = self._split_text(text, batch, views).to(self.time_embed.norm.weight.dtype)
        return text if self.text_refiner is None else self.text_refiner(text)

    def _extra_positions(self, grid: tuple[int, int, int], device) -> torch.Tensor | None:
        if self.sincos_pos_embed is not None:
            return self.sincos_pos_embed(grid, device)
        return None if self.learnable_pos_embed is None else self.learnable_pos_embed(grid)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check_views(self, num_views: int | None, indices: tuple[int, ...] | None = None) -> int:
        if indices is not None:
            known = set(range(self.config.num_views))
            if num_views is not None or not indices or len(set(indices)) < len(indices) or not set(indices) <= known:
                raise ValueError(
                    f"view_indices must be different views of 0..{self.config.num_views - 1} (num_views in the config), in "
                    f"place of num_views; got view_indices={tuple(indices)}, num_views={num_views}"
                )
            return len(indices)
        if num_views is None:
            return self.config.num_views
        if not 1 <= num_views <= self.config.num_views:
            raise ValueError(
                f"num_views must be between 1 and {self.config.num_views} (num_views in the config), got {num_views}"
            )
        return num_views

    def _check_latents(self, latents: torch.Tensor, views: int) -> torch.Size:
        if latents.ndim != 5 or latents.shape[1] != self.config.out_channels:
            raise ValueError(
                f"hidden_states must be [B, {self.config.out_channels}, T, H, W], got {tuple(latents.shape)}"
            )
        frames, *sides = latents.shape[2:]
        if frames % views:
            raise ValueError(f"the {frames} latent frames must be a multiple of the {views} views that they hold")
        for name, size, patch, largest in zip(
            ("latent frames", "latent height", "latent width"),
            (frames // views, *sides),
            self.config.patch_size,
            self.config.max_size,
            strict=True,
        ):
            name = f"{name} of a view" if views > 1 and name == "latent frames" else name
            if size == 0 or size % patch:
                raise ValueError(f"{name} must be a positive multiple of {patch} (patch_size), got {size}")
            if size > largest:
                raise ValueError(f"{name} must be at most {largest} (max_size in the config), got {size}")
        return latents.shape

    def _split_text(self, text: torch.Tensor, batch: int, views: int) -> torch.Tensor:
        """[B, V * M, D] -> [B * V, M, D]."""
        check_shape("encoder_hidden_states", text, ((batch,), None, (self.config.text_embed_dim,)))
        if text.shape[1] % views:
            raise ValueError(
                f"encoder_hidden_states has {text.shape[1]} positions, which is no multiple of the {views} views: "
                f"every view needs its own text of equal length"
            )
        return text.reshape(batch * views, -1, text.shape[-1])

    @staticmethod
    def _text_mask(mask: torch.Tensor | None, text: torch.Tensor | KeysValues, batch: int) -> torch.Tensor | None:
        """[B or 1, V * M] -> [B * V, 1, 1, M] for text [B * V, M, D] or its keys and values."""
        if mask is None:
            return None
        text = text.key if isinstance(text, KeysValues) else text
        length = text.shape[1]
        check_shape("attention_mask", mask, ((batch, 1), (len(text) // batch * length,)))
        return mask.to(text.device).bool().expand(batch, -1).reshape(-1, 1, 1, length)

    def _check_timestep(self, timestep, batch: int, frames: int, device) -> torch.Tensor:
        """A scalar, [1], [B] or [B, T] -> [B, 1] or [B, T]."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=device)
        if timestep.ndim == 2 and timestep.shape == (batch, frames) and self.config.patch_size[0] == 1:
            return timestep
        if timestep.shape not in ((), (1,), (batch,)):
            raise ValueError(
                f"timestep must be a scalar, [{batch}] (one per sample) or [{batch}, {frames}] (one per latent frame, where "
                f"patch_size is 1 along T), got {tuple(timestep.shape)}"
            )
        return timestep.expand(batch)[:, None]


def single_fps(fps) -> float | None:
    """A number, or a tensor or list of equal numbers -> float. Raises ValueError where they differ or are not positive."""
    if fps is None:
        return None
    plain = isinstance(fps, int | float)  # without a tensor, which tracing could not look into
    values = {float(fps)} if plain else set(torch.as_tensor(fps, dtype=torch.float64).flatten().tolist())
    if len(values) != 1:
        raise ValueError(f"fps must be the same for a whole batch, got {sorted(values)}: group videos by fps")
    value = values.pop()
    if not 0 < value < float("inf"):
        raise ValueError(f"fps must be positive, got {value}")
    return value
