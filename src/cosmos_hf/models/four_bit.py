"""The blocks' linear layers in 4 bits (NF4, QLoRA, arXiv 2305.14314): a frozen base takes an eighth of its float32 memory.

By bitsandbytes, on GPUs and, for small models, on processors. Quantisation depends on the weights alone, so the same base gives the
same layers again: that is why nothing of them needs to be saved.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel


def four_bit_blocks(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> int:
    """Quantise every linear layer in the blocks of a transformer of ours, in place; returns how many.

    compute_dtype: what weights are unpacked to for a product.

    Raises ValueError without bitsandbytes, and where adapters are loaded, whose layers would be quantised, too.
    """
    check_available()
    if getattr(model, "peft_config", None):
        raise ValueError("quantise a model before adapters are loaded: unload_lora_weights first")
    kind, count = _layer_class(), 0
    for parent in list(blocks_of(model).modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, kind.of(layer, compute_dtype))
                count += 1
    model.is_loaded_in_4bit = True  # what peft and the pipelines ask for
    return count


def check_available():
    if find_spec("bitsandbytes") is None:
        raise ValueError("weights in 4 bits need bitsandbytes: pip install 'cosmos-hf[quantized]', or take bfloat16")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """A transformer's blocks, where nearly all of its weights are."""
    return model.model.layers if isinstance(model, PreTrainedModel) else model.transformer_blocks


@cache
def _layer_class() -> type[nn.Linear]:
    import bitsandbytes as bnb

    class FrozenLinear4bit(bnb.nn.Linear4bit):
        """Weights that never change. A checkpoint of a run holds them; to load it, they must be those of its base."""

        @classmethod
        def of(cls, linear: nn.Linear, compute_dtype: torch.dtype) -> "FrozenLinear4bit":
            layer = cls(
                linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype, device="meta"
            )
            layer.bias = linear.bias
            # Else the first evaluation on some processors would repack the weights, and fail for sizes that do not suit it.
            layer.support_avx512bf16_for_cpu = False
            weight = linear.weight.detach()
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            if weight.device.type != "meta":
                layer.weight = layer.weight.to(weight.device)  # this is what quantises
            return layer.train(linear.training)

        def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
            stored = state_dict.get(f"{prefix}weight")
            if stored is None:
                missing.append(f"{prefix}weight")
            elif stored.shape != self.weight.shape or not torch.equal(stored.to(self.weight.device), self.weight.data):
                errors.append(f"{prefix}weight: the 4-bit weights of the base are others than those of the checkpoint")
            if self.bias is not None and f"{prefix}bias" in state_dict:
                self.bias.data.copy_(state_dict[f"{prefix}bias"])

    return FrozenLinear4bit
