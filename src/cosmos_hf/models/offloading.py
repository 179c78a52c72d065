"""Models whose weights wait elsewhere until they are called (accelerate's hooks, as diffusers' pipelines attach them)."""

from torch import nn


def wake(model: nn.Module):
    """Bring an offloaded model to its device, where something other than its `forward` is about to be called."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)
