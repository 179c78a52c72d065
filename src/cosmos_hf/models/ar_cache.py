"""The cache of a generation whose length is known: keys and values are written into memory that was reserved once."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class ReservedLayer(DynamicLayer):
    """transformers' growing layer, which copies all that it holds for every code, without the copying.

    `keys` and `values` [B, N, length, head_dim] are views of the reserved memory. Whoever replaces them (beams, a selection of the
    batch) may do so: what is there now is copied once, into new memory.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self._reserved = capacity, None

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, length = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if not self._holds(length):
            self._reserve(key_states, value_states, past, length)
        for memory, new in zip(self._reserved, (key_states, value_states), strict=True):
            memory[:, :, past:length] = new
        self.keys, self.values = (memory[:, :, :length] for memory in self._reserved)
        return self.keys, self.values

    def _holds(self, length: int) -> bool:
        """Whether the reserved memory is that of `keys` and `values`, and large enough."""
        if self._reserved is None or length > self._reserved[0].shape[2]:
            return False
        now = (self.keys, self.values)
        return all(
            memory.data_ptr() == tensor.data_ptr() and len(memory) == len(tensor)
            for memory, tensor in zip(self._reserved, now, strict=True)
        )

    def _reserve(self, key_states, value_states, past: int, length: int):
        size = max(self.capacity, length)
        made = []
        for new, old in ((key_states, self.keys), (value_states, self.values)):
            memory = new.new_empty(*new.shape[:2], size, new.shape[3])
            if past:
                memory[:, :, :past] = old
            made.append(memory)
        self._reserved = tuple(made)

    def keep(self, past: int, places: torch.Tensor):
        """Leave the first `past` positions and those at `places` [n], which are at or behind `past`."""
        end = past + len(places)
        for states in (self.keys, self.values):
            states[:, :, past:end] = states[:, :, places]
        self.keys, self.values = self.keys[:, :, :end], self.values[:, :, :end]

    def reset(self):
        self._reserved = None
        super().reset()


class ReservedCache(DynamicCache):
    """transformers' growing cache for at most `capacity` tokens; more still fit, at the price of a copy."""

    def __init__(self, config, capacity: int):
        super().__init__(config=config)
        self.layers = [ReservedLayer(capacity) for _ in self.layers]
