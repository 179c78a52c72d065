"""TorchScript files as the reference publishes them, traced from our networks under the reference's names."""

import torch
from torch import nn

from cosmos_hf.convert import load_original
from cosmos_hf.convert.tokenizer import convert_tokenizer_keys
from golden_files import golden, weights

PARTS = {
    "encoder": ("encoder.", "quant_conv.", "quantizer."),
    "decoder": ("decoder.", "post_quant_conv.", "inv_quant."),
    "autoencoder": ("encoder.", "quant_conv.", "quantizer.", "decoder.", "post_quant_conv."),
}


def fixture(name: str):
    """(our model, the reference's state dict, its config) of a fixture."""
    tensors, metadata, config = golden("tokenizers", name)
    state = weights(tensors)
    return load_original(metadata["cls"].rsplit(".", 1)[-1], config, state), state, config


class Reference(nn.Module):
    """Holds tensors under the reference's names; our network, whose parameters become these tensors, computes with them.

    `change` is applied to the latents between encoder and decoder: the names stay, the network becomes another.
    """

    def __init__(self, model, state: dict, part: str, change=None):
        super().__init__()
        ours = {id(tensor): name for name, tensor in convert_tokenizer_keys(state, model).items()}
        if part == "decoder":
            state = {key.replace("quantizer.", "inv_quant.quantizer."): value for key, value in state.items()}
        for key, tensor in state.items():
            if not key.startswith(PARTS[part]):
                continue
            if id(tensor) in ours:
                parameter = nn.Parameter(tensor, requires_grad=False)
                path, _, name = ours[id(tensor)].rpartition(".")
                setattr(model.get_submodule(path), name, parameter)
                self._home(key).register_parameter(key.rsplit(".", 1)[-1], parameter)
            else:
                self._home(key).register_buffer(key.rsplit(".", 1)[-1], tensor)
        self._hidden = (model, part, change)  # in a tuple: not a submodule

    def _home(self, key: str) -> nn.Module:
        module = self
        for step in key.split(".")[:-1]:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module._modules[step]
        return module

    def forward(self, x):
        model, part, change = self._hidden
        if part == "encoder":
            return self._encode(model, x, change)
        if part == "decoder":
            z = x if model.fsq is None else model.fsq.decode(x).to(model.dtype).movedim(-1, 1)
            return self._decode(model, z if change is None else change(z))
        latents = self._encode(model, x, change)[-1]
        return self._decode(model, latents), latents

    def _encode(self, model, x, change):
        z = _first(model.quant_conv(model.encoder(_last(x))))
        z = z if change is None else change(z)
        if model.fsq is None:
            return (z,)
        codes, indices = model.fsq(z.movedim(1, -1))
        return indices.int(), codes.movedim(-1, 1).contiguous()

    def _decode(self, model, z):
        return _first(model.decoder(model.post_quant_conv(_last(z))))


def _last(x):
    """Our video network is channels-last, our image network is not."""
    return x.movedim(1, -1) if x.ndim == 5 else x


def _first(x):
    return x.movedim(-1, 1).contiguous() if x.ndim == 5 else x


@torch.no_grad()
def save_torchscript(path, model, state: dict, part: str, dtype=torch.float32, change=None):
    cast = {key: value.to(dtype, copy=True) if value.is_floating_point() else value for key, value in state.items()}
    model = model.to(dtype)
    frames = [1 + 2 * model.config.temporal_compression] if len(model.pixel_axes) == 3 else []
    side = 2 * model.config.spatial_compression
    x = torch.rand(1, 3, *frames, side, side, dtype=dtype)
    if part == "decoder":
        encoded = model.encode(x)
        x = encoded.latents if model.fsq is None else encoded.indices.int()
    reference = Reference(model, cast, part, change).eval()
    torch.jit.trace(reference, x, check_trace=False).save(str(path))
    model.float()
    return path
