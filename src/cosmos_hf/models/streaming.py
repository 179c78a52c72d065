"""Coding a clip chunk by chunk with the result of coding it at once: what is remembered, and the stream that users push to."""

from collections.abc import Callable

import torch

# Keys and values are kept in blocks of about this many frames: few enough to copy, long enough for few matrix products.
BLOCK_FRAMES = 64


class StreamState(dict):
    """What each layer remembers between chunks of one clip, keyed by the layer.

    A temporal convolution keeps its last frames, a tensor [B, frames, H, W, C]; temporal attention keeps `KeyValues`. Values
    are replaced, never changed in place, so that a copy taken before a chunk is the state to go back to if the chunk fails.

    Attributes:
        first: until a chunk has passed.
        window: how many past frames temporal attention looks back at; None is all of them, as the published models do.
        clip: what all chunks of one clip have in common, as the first one had it.
    """

    def __init__(self, window: int | None = None):
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"window is a number of latent frames, at least 1, or None for all; got {window}")
        self.first, self.window, self.clip = True, window, None

    def copy(self) -> "StreamState":
        new = StreamState(self.window)
        new.first, new.clip = self.first, self.clip
        new.update((key, value.copy() if isinstance(value, StreamState) else value) for key, value in self.items())
        return new

    def tile(self, index: int) -> "StreamState":
        """The state of one of the tiles into which frames are cut."""
        nested = self.setdefault(("tile", index), StreamState(self.window))
        nested.first = self.first
        return nested

    def convolution_bytes(self) -> int:
        return sum(
            value.convolution_bytes() if isinstance(value, StreamState) else value.nbytes
            for value in self.values()
            if not isinstance(value, KeyValues)
        )

    def attention_bytes(self) -> int:
        return sum(
            value.attention_bytes() if isinstance(value, StreamState) else value.nbytes
            for value in self.values()
            if isinstance(value, (StreamState, KeyValues))
        )


class KeyValues(tuple):
    """Keys and values of past frames as pairs of tensors [B, H, W, frames, C], oldest block first."""

    @property
    def frames(self) -> int:
        return sum(k.shape[-2] for k, _ in self)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> "KeyValues":
        """With newer frames at the end; only the last block is copied, so memory never doubles."""
        blocks = list(self)
        if blocks and blocks[-1][0].shape[-2] < BLOCK_FRAMES:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(blocks.pop(), (k, v), strict=True))
        return KeyValues([*blocks, (k.contiguous(), v.contiguous())])

    def last(self, frames: int | None) -> "KeyValues":
        """The newest `frames`, for None all."""
        if frames is None:
            return self
        blocks, missing = [], frames
        for k, v in reversed(self):
            if missing <= 0:
                break
            # A slice would keep the whole block alive.
            cut = k.shape[-2] > missing
            blocks.append((k[..., -missing:, :].clone(), v[..., -missing:, :].clone()) if cut else (k, v))
            missing -= k.shape[-2]
        return KeyValues(reversed(blocks))

    def attend(self, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """Causal attention of the newest frames' queries [B, H, W, T, C] over all that is kept, in the manner of one softmax.

        A frame sees itself and, with a `window`, that many frames before it: what it sees does not depend on the chunks.
        """
        new, total = q.shape[-2], self.frames
        scores = torch.cat([q @ k.transpose(-1, -2) for k, _ in self], dim=-1) * q.shape[-1] ** -0.5
        seen = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        if window is not None:
            seen = seen.triu(total - new - window)
        weights = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        weights = weights.masked_fill(~seen, -torch.inf).softmax(-1).to(q.dtype)
        parts = weights.split([k.shape[-2] for k, _ in self], dim=-1)
        return sum(weight @ v for weight, (_, v) in zip(parts, self, strict=True))


class ChunkedDecodingMixin:
    """A tokenizer that decodes chunk by chunk wherever it is asked to decode: the same result with the memory of one chunk."""

    decode_chunk: int | None = None

    def enable_chunked_decoding(self, latent_frames: int = 1):
        """Have `decode` pass this many latent frames through the network at a time, unless a call says otherwise."""
        if latent_frames < 1:
            raise ValueError(f"latent_frames must be at least 1, got {latent_frames}")
        self.decode_chunk = latent_frames

    def disable_chunked_decoding(self):
        """Decode clips at once again."""
        self.decode_chunk = None


class TokenizerStream:
    """Codes one clip chunk by chunk: `push(chunk)` gives the result for these frames; together they equal coding all at once.

    A chunk that is refused leaves the stream as it was. What is kept between chunks: `convolution_bytes`, constant, and
    `attention_bytes`, the keys and values of temporal attention, which grow with every frame unless there is a window.
    """

    def __init__(self, step: Callable, window: int | None = None):
        self._step, self._state = step, StreamState(window)

    @torch.no_grad()
    def push(self, chunk: torch.Tensor):
        state = self._state.copy()
        result = self._step(chunk, state)
        state.first = False
        self._state = state
        return result

    @property
    def convolution_bytes(self) -> int:
        return self._state.convolution_bytes()

    @property
    def attention_bytes(self) -> int:
        return self._state.attention_bytes()
