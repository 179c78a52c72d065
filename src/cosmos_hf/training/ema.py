"""Power-function exponential moving average of weights (EDM2, arXiv 2312.02696; the reference keeps s = 0.10, 0.05, 0.025).

The averaging profile is t^gamma over the whole run, so its width is a share `s` of the run's length so far, and no
half-life has to be chosen beforehand: gamma is the largest root of (gamma + 1)^(1/2) / ((gamma + 2) (gamma + 3)^(1/2)) = s.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .devices import own_part


def gamma_from_width(s: float) -> float:
    """Largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0; s in (0, 0.28)."""
    if not 0 < s < 0.28:
        raise ValueError(f"the EMA's width s must be between 0 and 0.28 of the run, got {s}")
    roots = np.roots([1, 7, 16 - s**-2, 12 - s**-2])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


class PowerEMA:
    """A float32 average of a module's trainable parameters. Where they are sharded, each process averages its own part.

    Args:
        module: what to follow; the parameters' names identify them.
        s: width of the profile as a share of the run.
    """

    def __init__(self, module: nn.Module, s: float = 0.1):
        self.gamma, self.step = gamma_from_width(s), 0
        self.average = {n: own_part(p).float().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module):
        """Take in the weights after an optimizer step: beta_i = (1 - 1 / (i + 1))^(gamma + 1), beta_0 = 0."""
        beta = (1 - 1 / (self.step + 1)) ** (self.gamma + 1)
        self.step += 1
        for name, parameter in module.named_parameters():
            if name in self.average:
                self.average[name].lerp_(own_part(parameter).float().to(self.average[name].device), 1 - beta)

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[nn.Module]:
        """Inside the block the module has the averaged weights."""
        own = {name: own_part(p).clone() for name, p in module.named_parameters() if name in self.average}
        self._copy(self.average, module)
        try:
            yield module
        finally:
            self._copy(own, module)

    @staticmethod
    @torch.no_grad()
    def _copy(weights: dict[str, torch.Tensor], module: nn.Module):
        for name, parameter in module.named_parameters():
            if name in weights:
                own_part(parameter).copy_(weights[name])

    def state_dict(self) -> dict:
        return {"step": self.step, "gamma": self.gamma, "average": self.average}

    def load_state_dict(self, state: dict):
        if state["average"].keys() != self.average.keys():
            different = sorted(state["average"].keys() ^ self.average.keys())
            raise ValueError(
                f"the checkpoint's EMA is of other parameters: {different[:5]}{'...' * (len(different) > 5)}"
            )
        self.step, self.gamma = state["step"], state["gamma"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)

    def save_shards(self, folder: Path):
        """Write the parts of all processes; all must call it."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self._shards(), checkpoint_id=folder)

    def load_shards(self, folder: Path):
        """Read what `save_shards` wrote: under FSDP2 with any number of processes, under ZeRO-3 with the same number."""
        import torch.distributed.checkpoint as dcp

        state = self._shards()
        dcp.load(state, checkpoint_id=folder)  # in place
        self.step = int(state["step"])

    def _shards(self) -> dict[str, torch.Tensor]:
        """A DTensor knows its place in the whole; the plain parts of other processes differ and need names of their own."""
        from torch.distributed.tensor import DTensor

        place = f"{torch.distributed.get_rank()}_of_{torch.distributed.get_world_size()}"
        state = {"step": torch.tensor(self.step)}
        for name, value in self.average.items():
            state[name if isinstance(value, DTensor) else f"{place}.{name}"] = value
        return state
