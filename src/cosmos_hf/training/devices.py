"""One process, DDP, FSDP2 or DeepSpeed ZeRO: what the loops need to know of how the weights lie on the devices.

Which of them it is, is said at launch (`accelerate launch --config_file training/launch/fsdp2.yaml ...`); the precision is
said by the run's config. The rules of precision are the same everywhere: weights, their average, gradients' sums across
processes and the optimizer's state are float32, and the network's matrix products run in bf16 or fp16 under autocast.
"""

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, convert_outputs_to_fp32
from torch import nn

from .config import RunConfig

logger = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def start_accelerator(config: RunConfig) -> Accelerator:
    """The Accelerator of a run.

    Raises ValueError for what accelerate would replace unsaid: fp16 on a processor (by float32), FSDP and DeepSpeed where it
    finds no GPUs for them (by DDP).
    """
    deepspeed = _asked_for("DEEPSPEED")
    handlers = []
    if deepspeed and (_asked_for("CPU") or not torch.cuda.is_available()):
        # Without a backend DeepSpeed takes every process for a world of its own.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        # DeepSpeed's own bf16 and fp16 would cast the weights; its torch_autocast (below) does not.
        mixed_precision="no" if deepspeed else config.mixed_precision,
        gradient_accumulation_steps=1,  # counted in the loop, since accelerate also steps at the end of an epoch
        log_with=config.report_to or None,
        project_dir=config.output_dir,
        kwargs_handlers=handlers,
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision: fp16 needs a GPU; on a processor take bf16 or no")
    _check_kind(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size
        settings["gradient_clipping"] = config.clip_norm
        # Small parameters that stay whole would be missed by the average, which follows each process's part.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        if config.mixed_precision != "no":
            dtype = str(AUTOCAST[config.mixed_precision]).removeprefix("torch.")
            settings["torch_autocast"] = {"enabled": True, "dtype": dtype}
    if accelerator.is_fsdp2 and config.mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Weights travel in 16 bits, gradients are summed in 32; inputs stay as they are (a noise level must), for autocast.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=AUTOCAST[config.mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return accelerator


def process_state() -> PartialState:
    """Which of how many processes this is, before there is an Accelerator, which would take over a state without the others:
    `PartialState()` alone does not ask whether the run is on processors."""
    return PartialState(cpu=_asked_for("CPU"))


@contextmanager
def at_work(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block a model beside the trained one (a tokenizer, a text encoder) is on this process's GPU, where there is one
    with room for it; afterwards it is back where it was, and the room is free for training."""
    before, device = next(model.parameters()).device, process_state().device
    try:
        model.to(device)
    except torch.OutOfMemoryError:
        logger.warning(
            "%s does not fit on %s: it works on %s, which takes longer", type(model).__name__, device, before
        )
        model.to(before)
    try:
        yield model
    finally:
        model.to(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def launched_as() -> str | None:
    """FSDP or DEEPSPEED, where the launch asks for one of them."""
    return next((kind for kind in ("FSDP", "DEEPSPEED") if _asked_for(kind)), None)


def _asked_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _check_kind(accelerator: Accelerator):
    made = accelerator.distributed_type
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if _asked_for(kind.value) and made != kind:
            raise ValueError(
                f"the launch file asks for {kind.value}, accelerate made {made.value} of it: it needs GPUs (see training/launch/)"
            )
    if made == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("only fsdp_version: 2 is supported (training/launch/fsdp2.yaml)")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether something of the model's state is shared out among the processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def weights_are_sharded(accelerator: Accelerator) -> bool:
    """Whether a process has a part of the weights only: FSDP2 and ZeRO-3."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def compute_in_16_bits(accelerator: Accelerator, model: nn.Module, config: RunConfig):
    """Autocast around the prepared model's forward, with float32 results, where accelerate does not see to it itself."""
    if config.mixed_precision == "no" or not is_sharded(accelerator):
        return
    forward = model.forward

    def forward_under_autocast(*args, **kwargs):
        with accelerator.autocast() if accelerator.is_fsdp2 else nullcontext():  # DeepSpeed's engine has its own
            return forward(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(forward_under_autocast)


def compile_blocks(model: nn.Module, backend: str):
    """Compile every block that the classes within name as a unit, in place: names of weights stay. Nothing without a backend.

    Block by block, as `compile_repeated_blocks` of diffusers does: equal blocks are compiled once. ValueError for a backend that
    torch does not know, and where nothing is named.
    """
    if not backend:
        return
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"compile_backend must be one of {', '.join(known)}, got {backend!r}")
    units = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks = [part for part in model.modules() if type(part).__name__ in units]
    if not blocks:
        raise ValueError(f"compile_backend={backend}: {type(model).__name__} has no blocks to compile, leave it empty")
    for block in blocks:
        block.compile(backend=backend)
    logger.info("%d blocks are compiled by %s at their first use", len(blocks), backend)


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes in float32, as one that is loaded will, without accelerate's autocast."""
    wrapped = vars(model).pop("forward", None)
    try:
        yield model
    finally:
        if wrapped is not None:
            model.forward = wrapped


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside the block products of float32 matrices are exact where a run has TF32, so that two copies of a model can agree."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def loading_alone(accelerator: Accelerator) -> Iterator[None]:
    """Inside the block one process may load models that the others do not load: under ZeRO-3 transformers would share them
    out, and wait for the others for ever."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
    from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(accelerator.state.deepspeed_plugin.dschf)


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this process updates: ZeRO-3's flat shard, FSDP2's DTensor, else the parameter itself."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def reshard(model: nn.Module):
    """FSDP2 leaves the outermost module's weights whole after a forward pass without a backward one: take them apart again."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):  # an FSDPModule
            module.reshard()


def gradient_norm(accelerator: Accelerator, parameters, clip_norm: float) -> torch.Tensor:
    """Clip the gradients and return their norm over all processes. Under DeepSpeed, whose `backward` steps, it is past."""
    norm = accelerator.clip_grad_norm_(parameters, clip_norm)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return torch.as_tensor(0.0 if norm is None else norm).detach()


def blueprint(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters take no memory, taken before they are sharded (see `full_copy`)."""
    stand_ins = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, stand_ins)


def full_copy(accelerator: Accelerator, model: nn.Module, plan: nn.Module) -> nn.Module | None:
    """Gather the weights of a sharded model into a whole one on the CPU: the main process gets it, the others None.

    All processes must call it. `plan` is the `blueprint` of the model.
    """
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    whole = copy.deepcopy(plan)
    kinds = {name: tensor.dtype for name, tensor in plan.state_dict().items()}
    whole.load_state_dict({name: state[name].cpu().to(kind) for name, kind in kinds.items()}, assign=True)
    return whole.cpu()
