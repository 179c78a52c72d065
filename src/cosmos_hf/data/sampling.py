"""The order in which a run sees its samples: a function of a seed and of the position, so that it can go on from anywhere."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler


class ResumableSampler(Sampler):
    """An endless sequence of (index, draw), from any position on: position p is the same sample in every run.

    Position p lies in epoch p // n, a permutation by (seed, epoch). Process `rank` of `world_size` takes every
    `world_size`-th position, so together the processes see what one would. To resume, start at the number of samples
    that all processes have consumed. Give it to a plain DataLoader and leave that out of `accelerator.prepare`, which would
    share the samples out a second time.

    Args:
        length: of the data set.
        kinds: per sample what all samples of one batch must have in common, such as their shape. Then `batch_size` positions of
            every process are of one kind, and what is left of a kind at an epoch's end waits: n is that much smaller, and
            since every epoch is shuffled anew no sample waits for ever.
        batch_size: of one process.

    Raises ValueError for a kind with fewer samples than all processes take at once: they would never be seen.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        kinds: Sequence[Hashable] | None = None,
        batch_size: int = 1,
    ):
        if length < 1:
            raise ValueError("the data set is empty")
        if not 0 <= rank < world_size or start < 0:
            raise ValueError(f"need 0 <= rank < world_size and start >= 0, got {rank}, {world_size} and {start}")
        self.seed, self.start, self.rank, self.world_size = seed, start, rank, world_size
        self._kinds, self._group, self._length = None, batch_size * world_size, length
        if kinds is not None and len(set(kinds)) > 1:
            self._kinds = _indices_by_kind(kinds)
            for kind, indices in self._kinds.items():
                if len(indices) < self._group:
                    raise ValueError(
                        f"{len(indices)} samples are of the kind {kind}, and {self._group} of a kind are needed at a time "
                        f"(batch_size times processes): lower batch_size, or resize the data to one shape"
                    )
            self._length = sum(len(indices) // self._group * self._group for indices in self._kinds.values())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order, position = -1, None, self.start + self.rank
        while True:
            if position // self._length != epoch:
                epoch = position // self._length
                order = self._order(np.random.default_rng([self.seed, epoch]))
            draw = int(np.random.default_rng([self.seed, 1, position]).integers(2**31))
            yield int(order[position % self._length]), draw
            position += self.world_size

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        if self._kinds is None:
            return rng.permutation(self._length)
        groups = []
        for indices in self._kinds.values():
            whole = len(indices) // self._group * self._group
            groups.append(rng.permutation(indices)[:whole].reshape(-1, self._group))
        return rng.permutation(np.concatenate(groups)).reshape(-1)


def _indices_by_kind(kinds: Sequence[Hashable]) -> dict[Hashable, np.ndarray]:
    found = defaultdict(list)
    for index, kind in enumerate(kinds):
        found[kind].append(index)
    return {kind: np.array(indices) for kind, indices in found.items()}


def in_order(dataset: Dataset, batch_size: int, collate: Callable[[list], dict]) -> DataLoader:
    """Every sample once, in batches of one of the dataset's `kinds`, kind after kind: how a data set is measured."""
    groups = _indices_by_kind(dataset.kinds).values()
    batches = [group[i : i + batch_size].tolist() for group in groups for i in range(0, len(group), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
