"""How much memory a run takes on each device: weights, gradients, optimizer, average; and the activations of a step.

`estimate_memory` counts the state of any run by its number of parameters. `estimate_posttraining` adds what forward and backward of
one step hold: the network runs on tensors that have sizes but no values.
"""

import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..models import ar_cosmos, transformer_cosmos
from ..models.ar_loss import chunked_loss
from ..models.four_bit import blocks_of
from ..models.peak_memory import peak_of

GIB = 2**30
# Which parts each kind of launch shares out among the processes.
SHARED = {
    "one": (),
    "ddp": (),
    "zero2": ("gradients", "optimizer", "master"),
    "zero3": ("weights", "gradients", "optimizer", "average"),
    "fsdp2": ("weights", "gradients", "optimizer", "average"),
}
# Bytes of a frozen base's weight: as it is, in 16 bits, in 4 bits with its scales (NF4, blocks of 64, double quantisation).
BASE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.516}


def estimate_memory(
    num_parameters: float,
    launch: str = "one",
    processes: int = 1,
    trained: float | None = None,
    base: str = "float32",
    average: bool = True,
    mixed_precision: bool = False,
) -> dict[str, float]:
    """GiB per device by part, and their "total"; AdamW in float32, as `fit` runs it.

    Args:
        num_parameters: of the whole model.
        launch: a name of `training/launch/`, or "one".
        processes: devices that share.
        trained: how many parameters learn (None: all); the others are a frozen base, as under LoRA.
        base: dtype of the frozen base: "float32", "bfloat16" or "nf4" (QLoRA).
        average: an EMA is kept.
        mixed_precision: adds the 16-bit copies that autocast keeps of whole weights ("casts"); FSDP2 and ZeRO-3 cast a block at a
            time and keep none.

    Raises ValueError for an unknown launch or base, or a base that is not float32 where nothing is frozen.
    """
    if launch not in SHARED or base not in BASE_BYTES:
        raise ValueError(f"launch must be one of {', '.join(SHARED)}, base one of {', '.join(BASE_BYTES)}")
    learns = num_parameters if trained is None else trained
    frozen = num_parameters - learns
    if frozen < 0 or processes < 1:
        raise ValueError(
            f"need trained <= num_parameters and processes >= 1, got {learns}, {num_parameters}, {processes}"
        )
    if not frozen and base != "float32":
        raise ValueError(f"base={base!r} is for frozen weights; those that learn are float32: set trained")
    parts = {
        "weights": 4 * learns + BASE_BYTES[base] * frozen,
        "gradients": 4 * learns,
        "optimizer": 8 * learns,
        "average": 4 * learns * average,
        "master": 4 * learns * (launch == "zero2"),  # DeepSpeed's own float32 copy of what it updates
        "casts": 2 * (learns + frozen * (base == "float32")) * (mixed_precision and launch in ("one", "ddp", "zero2")),
    }
    shared = {name: size / (processes if name in SHARED[launch] else 1) / GIB for name, size in parts.items()}
    return shared | {"total": sum(shared.values())}


# ---- a step of post-training -----------------------------------------------------------------------------------------

METHODS = {
    "full": "float32",
    "lora": "float32",
    "lora bfloat16": "bfloat16",
    "qlora": "nf4",
}  # precision of the base's blocks
LORA_TARGETS = {
    "diffusion": r"transformer_blocks\..*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)",
    "autoregressive": r"model\.layers\..*_proj",
}


def estimate_posttraining(
    model: str | nn.Module,
    method: str = "lora",
    latent_shape: tuple[int, int, int] = (16, 88, 160),
    batch_size: int = 1,
    text_length: int = 512,
    lora_rank: int = 16,
    launch: str = "one",
    processes: int = 1,
    average: bool = True,
    mixed_precision: bool = True,
    gradient_checkpointing: bool = True,
    contrast: bool = False,
) -> dict[str, float]:
    """GiB per device by part, and their "total": `estimate_memory` and the "activations" of a step, with fused attention.

    Args:
        model: the name of a preset of either family ("7b-video2world", "4b"), or a transformer on the meta device.
        method: "full", "lora", "lora bfloat16" (the frozen base's blocks in 16 bits) or "qlora" (in 4 bits).
        latent_shape: latent frames, height and width of the clips.
        contrast: for a run with that setting, which evaluates the network twice before it goes back.

    Counted are the tensors that the network makes, not the buffers that a kernel takes for itself nor what an allocator keeps
    aside; the blocks that FSDP2 and ZeRO-3 gather come on top. Raises ValueError for an unknown model, method or launch.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    transformer = _on_meta(model) if isinstance(model, str) else model
    total = sum(p.numel() for p in transformer.parameters())
    in_blocks = sum(m.weight.numel() for m in blocks_of(transformer).modules() if isinstance(m, nn.Linear))
    kind = "autoregressive" if isinstance(transformer, ar_cosmos.CosmosARForCausalLM) else "diffusion"
    learns = total
    if method != "full":
        transformer.requires_grad_(False)
        with torch.device("meta"):
            transformer.add_adapter(LoraConfig(r=lora_rank, target_modules=LORA_TARGETS[kind]))
        learns = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    if gradient_checkpointing:
        enable = "gradient_checkpointing_enable" if kind == "autoregressive" else "enable_gradient_checkpointing"
        getattr(transformer, enable)()
    state = estimate_memory(learns, launch, processes, average=average)
    if method != "full":
        frozen = 4 * (total - in_blocks) + BASE_BYTES[METHODS[method]] * in_blocks
        sharing = processes if "weights" in SHARED[launch] else 1
        state["weights"] += frozen / sharing / GIB
    evaluations = 2 if contrast else 1
    shape = latent_shape, batch_size, text_length
    held = _step(transformer.train(), shape, mixed_precision, METHODS[method], evaluations)
    state["activations"] = max(0.0, held - 4 * learns) / GIB  # the gradients are counted already
    state.pop("total")
    return state | {"total": sum(state.values())}


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        if name in transformer_cosmos.PRESETS:
            return transformer_cosmos.CosmosWorldTransformer3D(**transformer_cosmos.PRESETS[name])
        if name in ar_cosmos.PRESETS:
            return ar_cosmos.CosmosARForCausalLM(ar_cosmos.CosmosARConfig(**ar_cosmos.PRESETS[name]))
    there = ", ".join([*transformer_cosmos.PRESETS, *ar_cosmos.PRESETS])
    raise ValueError(f"unknown model {name!r}; there is {there}")


def _step(transformer, shape: tuple, mixed: bool, precision: str, evaluations: int) -> int:
    """Bytes that forward and backward hold at their worst moment, gradients of what learns among them.

    shape: (latent_shape, batch size, length of text).
    """
    if precision != "float32":  # unpacked or not, a product sees weights in the precision of the computation
        for name, layer in blocks_of(transformer).named_modules():
            if isinstance(layer, nn.Linear) and ".lora_" not in name:
                layer.to(torch.bfloat16 if mixed else torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = transformer.to_empty(device="cpu")
        run = language_step if isinstance(transformer, ar_cosmos.CosmosARForCausalLM) else diffusion_step

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = sum(run(transformer, *shape) for _ in range(evaluations))
            loss.backward()
            return [p.grad for p in transformer.parameters()]

        held = peak_of(step)
        if precision == "nf4":  # one layer at a time is unpacked
            linears = [m.weight for m in blocks_of(transformer).modules() if isinstance(m, nn.Linear)]
            held += max(weight.numel() for weight in linears) * (2 if mixed else 4)
    return held


def diffusion_step(transformer, latent_shape, batch_size: int, text_length: int) -> torch.Tensor:
    """A loss as the training of diffusion models has it: noisy latents, a text, given frames; and the model's other inputs."""
    config = transformer.config
    x = torch.zeros(batch_size, config.out_channels, *latent_shape)
    channels = dict(condition_mask=1, camera=config.camera_channels)
    given = {n: torch.zeros(batch_size, c, *latent_shape) for n, c in channels.items() if n in transformer.conditions}
    if "actions" in transformer.conditions:
        given["actions"] = torch.zeros(batch_size, latent_shape[0], config.action_dim)
    text = torch.zeros(batch_size, text_length, config.text_embed_dim)
    output = transformer(x, torch.zeros(batch_size), text, fps=24, **given).sample
    return (output.float() - x).square().mean()


def language_step(transformer, latent_shape, batch_size: int, text_length: int) -> torch.Tensor:
    """A loss as the training of autoregressive models has it."""
    config, given = transformer.config, {}
    length = config.num_positions(latent_shape)
    if config.cross_attention_dim is not None:
        given["encoder_hidden_states"] = torch.zeros(batch_size, text_length, config.cross_attention_dim)
    if config.action_dim is not None:
        given["actions"] = torch.zeros(batch_size, latent_shape[0], config.action_dim)
    tokens = torch.zeros(batch_size, length, dtype=torch.long)
    states = transformer.model(tokens, latent_shape=latent_shape, use_cache=False, **given)
    return chunked_loss(transformer.lm_head, states.last_hidden_state, tokens, config.z_loss_weight).total
