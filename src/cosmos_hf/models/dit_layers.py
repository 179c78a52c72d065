"""The parts of the diffusion transformer (arXiv 2501.03575, section 5.1): positions, time, attention, adaptive norms.

Module names are those of diffusers' `CosmosTransformer3DModel`, so that its published weights load unchanged.

Axes: B batch, V views, L tokens (view slowest, then frame, row and column), M text tokens of a view, D width, N heads,
d head width; F is 1 where a whole clip has one noise level, or the number of latent frames where each has its own.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

BASE_FPS = 24  # at this rate a latent frame is one position apart
_CACHED_TABLES = 8


class RotaryEmbedding3D(nn.Module):
    """Angles of rotary positions over (frame, row, column); the frame axis counts time, not frames.

    A head's d channels are split into h = w = 2 * (d // 6) and t = the rest. Axis a with n channels turns by
    position * theta_a^(-2j/n), theta_a = 10000 * scale_a^(n / (n - 2)); a frame is 24 / fps positions long.
    """

    def __init__(self, head_dim: int, scale: tuple[float, float, float]):
        super().__init__()
        side = head_dim // 6 * 2
        self.dims = (head_dim - 2 * side, side, side)
        if head_dim % 2 or side < 4:
            raise ValueError(f"attention_head_dim must be even and at least 12, got {head_dim}")
        self.scale = tuple(scale)
        self._tables = {}

    def angles(self, axis: int, positions: torch.Tensor) -> torch.Tensor:
        """Positions [P] -> angles [P, n / 2] of axis 0 (t), 1 (h) or 2 (w), float32."""
        n = self.dims[axis]
        theta = 10000.0 * self.scale[axis] ** (n / (n - 2))
        exponents = torch.arange(0, n, 2, device=positions.device, dtype=torch.float32) / n
        return torch.outer(positions, 1.0 / theta**exponents)

    def forward(self, grid: tuple[int, int, int], fps: float | None, device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, H * W, 1, d / 2] of a grid (T, H, W) of tokens. `fps` None counts frames as 24 per second."""
        if torch.compiler.is_compiling():
            return self._make(grid, fps, device)
        key = (*grid, fps, torch.device(device))
        if key not in self._tables:
            if len(self._tables) == _CACHED_TABLES:
                self._tables.pop(next(iter(self._tables)))
            with torch.inference_mode(False):  # a table made under inference_mode could not be used in training
                self._tables[key] = self._make(grid, fps, device)
        return self._tables[key]

    def _make(self, grid, fps, device):
        positions = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
        if fps is not None:
            positions[0] = positions[0] / fps * BASE_FPS
        views = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
        parts = [
            self.angles(axis, positions[axis]).view(*views[axis], self.dims[axis] // 2).expand(*grid, -1)
            for axis in range(3)
        ]
        angles = torch.cat(parts, dim=-1).flatten(1, 2).unsqueeze(2)  # [T, H * W, 1, d / 2]
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x [B, L, N, d]: channel j is paired with channel j + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LearnablePositionEmbedding(nn.Module):
    """Sum of three learned tables, scaled to root mean square 1, added to the tokens before every block."""

    def __init__(self, hidden_size: int, table_sizes: tuple[int, int, int]):
        super().__init__()
        for name, size in zip("thw", table_sizes, strict=True):
            self.register_parameter(f"pos_emb_{name}", nn.Parameter(torch.empty(size, hidden_size)))

    def forward(self, grid: tuple[int, int, int]) -> torch.Tensor:
        """[T, H * W, D] of a grid (T, H, W)."""
        frames, rows, columns = grid
        embedding = (
            self.pos_emb_t[:frames, None, None] + self.pos_emb_h[:rows, None] + self.pos_emb_w[:columns]
        ).flatten(1, 2)
        rms = torch.linalg.vector_norm(embedding, dim=-1, keepdim=True, dtype=torch.float32)
        rms = rms / math.sqrt(embedding.shape[-1])
        return embedding / (rms + 1e-6)


def sincos_positions(hidden_size: int, grid: tuple[int, int, int], device=None) -> torch.Tensor:
    """Fixed [L, D] of a grid (T, H, W), float32: on the frame's channels, then the row's, then the column's, sines and cosines.

    D is split like a head's channels: rows and columns have 2 * (D // 6) each, frames the rest.
    """
    side = hidden_size // 6 * 2
    parts = []
    for axis, width in enumerate((hidden_size - 2 * side, side, side)):
        steps = torch.arange(width // 2, device=device, dtype=torch.float64) / (width / 2)
        angles = torch.outer(torch.arange(grid[axis], device=device, dtype=torch.float64), 10000.0**-steps)
        shape = [1, 1, 1, width]
        shape[axis] = grid[axis]
        parts.append(torch.cat([angles.sin(), angles.cos()], dim=-1).float().view(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2)


class SincosPositionEmbedding(nn.Module):
    """`sincos_positions` as a module, as hooks that split tokens need it: [T, H * W, D] of a grid (T, H, W)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, grid: tuple[int, int, int], device) -> torch.Tensor:
        return sincos_positions(self.hidden_size, grid, device).unflatten(0, (grid[0], -1))


class RMSNorm(nn.RMSNorm):
    """With the gain in the input's precision, as the fused kernels need it under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _TimeMLP(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.linear_2 = nn.Linear(hidden_size, 3 * hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeEmbedding(nn.Module):
    """c_noise [B, F] -> (SiLU of the normalised sinusoid [B, F, D], shift/scale/gate offsets [B, F, 3D] shared by all blocks).

    It is the raw sinusoid that is normalised and modulates the blocks; the MLP's output is only added to the modulation.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.t_embedder = _TimeMLP(hidden_size)
        self.norm = RMSNorm(hidden_size, eps=1e-6)

    def forward(
        self,
        timestep: torch.Tensor,
        dtype: torch.dtype,
        action: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`action` is what `ActionEmbedding` adds to the sinusoid [B, F, D] and to the offsets [B, F, 3D]."""
        # downscale_freq_shift 0: k_i = 10000^(-i / (D / 2)); the cosines come first
        sinusoid = get_timestep_embedding(
            timestep.float().flatten(), self.hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        sinusoid = sinusoid.to(dtype).unflatten(0, timestep.shape)
        offsets = self.t_embedder(sinusoid)
        to_sinusoid, to_offsets = action
        if to_sinusoid is not None:
            sinusoid = sinusoid + to_sinusoid
        if to_offsets is not None:
            offsets = offsets + to_offsets
        return F.silu(self.norm(sinusoid)), offsets


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm whose shift, scale (and gate) come from the noise level through a low-rank map (adaLN-LoRA)."""

    def __init__(self, hidden_size: int, rank: int, gated: bool = True):
        super().__init__()
        self.parts = 3 if gated else 2
        self.linear_1 = nn.Linear(hidden_size, rank, bias=False)
        self.linear_2 = nn.Linear(rank, self.parts * hidden_size, bias=False)

    def forward(self, x: torch.Tensor, time: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, L, D], time [B, F, D], offsets [B, F, 3D] -> (modulated x,) or (modulated x, gate [B, F, 1, D])."""
        hidden_size, frames = x.shape[-1], time.shape[1]
        modulation = self.linear_2(self.linear_1(time)) + offsets[..., : self.parts * hidden_size]
        shift, scale, *gate = modulation.unsqueeze(2).chunk(self.parts, dim=-1)  # [B, F, 1, D] each
        x = F.layer_norm(x, (hidden_size,), eps=1e-6).unflatten(1, (frames, -1))  # [B, F, L / F, D]
        return torch.addcmul(shift, x, 1 + scale).flatten(1, 2), *gate


def add_gated(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """x + gate * update, with x and update [B, L, D] and the gate [B, F, 1, D] of the tokens' frames."""
    frames = gate.shape[1]
    return torch.addcmul(x.unflatten(1, (frames, -1)), gate, update.unflatten(1, (frames, -1))).flatten(1, 2)


class KeysValues(NamedTuple):
    """Of a context, as a layer attends to it: keys (normalised) and values, [B, M, N, d] each."""

    key: torch.Tensor
    value: torch.Tensor


class CosmosAttnProcessor:
    """Attention through diffusers' dispatcher, so that `set_attention_backend` and its context manager apply.

    Where tokens are split over processes (`_parallel_config`), self-attention exchanges them; the text is whole in every process.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "CosmosAttention", x, context=None, rotary=None, attention_mask=None) -> torch.Tensor:
        parallel_config = self._parallel_config if context is None else None
        context = x if context is None else context
        query = attn.norm_q(attn.to_q(x).unflatten(-1, (-1, attn.head_dim)))  # [B, L, N, d]
        key, value = context if isinstance(context, KeysValues) else attn.keys_values(context)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        out = dispatch_attention_fn(
            query.to(value.dtype),  # the angles are float32, and so are the norms under autocast
            key.to(value.dtype),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=parallel_config,
        )
        return attn.to_out[0](out.flatten(2))


class CosmosAttention(nn.Module, AttentionModuleMixin):
    """Attention with per-head RMSNorm of queries and keys; over the tokens themselves or, given a context, over text."""

    _default_processor_cls = CosmosAttnProcessor
    _available_processors = [CosmosAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, context_size: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, hidden_size // heads
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_k = nn.Linear(context_size, hidden_size, bias=False)
        self.to_v = nn.Linear(context_size, hidden_size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=False)])
        self.norm_q = RMSNorm(hidden_size // heads, eps=1e-6)
        self.norm_k = RMSNorm(hidden_size // heads, eps=1e-6)
        self.set_processor(CosmosAttnProcessor())

    def keys_values(self, context: torch.Tensor) -> KeysValues:
        """Of a context [B, M, context_size]."""
        key = self.norm_k(self.to_k(context).unflatten(-1, (-1, self.head_dim)))
        return KeysValues(key, self.to_v(context).unflatten(-1, (-1, self.head_dim)))

    def forward(self, x: torch.Tensor, context=None, rotary=None, attention_mask=None) -> torch.Tensor:
        """`context`: [B, M, context_size], its `KeysValues`, or None for the tokens themselves."""
        return self.processor(self, x, context, rotary, attention_mask)


class CosmosBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP: each y + gate * f(adaptive norm of y)."""

    def __init__(self, hidden_size: int, heads: int, text_size: int, mlp_ratio: float, rank: int):
        super().__init__()
        self.norm1 = AdaptiveLayerNorm(hidden_size, rank)
        self.attn1 = CosmosAttention(hidden_size, hidden_size, heads)
        self.norm2 = AdaptiveLayerNorm(hidden_size, rank)
        self.attn2 = CosmosAttention(hidden_size, text_size, heads)
        self.norm3 = AdaptiveLayerNorm(hidden_size, rank)
        self.ff = FeedForward(hidden_size, mult=mlp_ratio, activation_fn="gelu", bias=False)

    def forward(self, hidden_states, text, time, offsets, rotary, positions=None, attention_mask=None) -> torch.Tensor:
        """hidden_states [B, L, D]; text [B * V, M, text_size] or its `KeysValues`, so that each view attends to its own text;
        attention_mask [B * V, 1, 1, M]."""
        x = hidden_states
        if positions is not None:
            x = x + positions  # [B, L, D] + [L, D]
        modulated, gate = self.norm1(x, time, offsets)
        x = add_gated(x, gate, self.attn1(modulated, rotary=rotary))
        modulated, gate = self.norm2(x, time, offsets)
        texts = len(text.key if isinstance(text, KeysValues) else text)  # B * V
        per_view = modulated.reshape(texts, -1, x.shape[-1])  # [B * V, L / V, D]
        x = add_gated(x, gate, self.attn2(per_view, text, attention_mask=attention_mask).view_as(x))
        modulated, gate = self.norm3(x, time, offsets)
        return add_gated(x, gate, self.ff(modulated))
