"""A model over several processes by diffusers' `enable_parallelism`: its tokens split (context parallelism) or its weights
(tensor parallelism).

Context parallelism splits the positions of every latent frame, not the frames: whatever differs from frame to frame or from view
to view (noise levels, actions, texts) is then the same in every process, and all conditions work as they do in one.
"""

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import (
    ContextParallelConfig,
    ContextParallelInput,
    ContextParallelOutput,
    ParallelConfig,
    TensorParallelConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

# Modules whose outputs hold tokens as [..., frames, positions of a frame, ...]; a model lacks some of them.
CONTEXT_PLAN = {
    "patch_embed": {0: ContextParallelInput(split_dim=2, expected_dims=4, split_output=True)},
    "rope": {i: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True) for i in (0, 1)},
    "learnable_pos_embed": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
    "sincos_pos_embed": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
    "proj_out": ContextParallelOutput(gather_dim=2, expected_dims=4),
}
# Every process has some of the heads, and some of the MLP's channels.
TENSOR_PLAN = {
    f"transformer_blocks.*.{name}": style
    for style, names in dict(
        colwise=[f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v")]
        + ["ff.net.0.proj"],
        rowwise=["attn1.to_out.0", "attn2.to_out.0", "ff.net.2"],
    ).items()
    for name in names
}


def is_fully_sharded(module: torch.nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` has been applied to this very module."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


class ParallelismMixin:
    """Put before `ModelMixin`."""

    _cp_plan = CONTEXT_PLAN
    _tp_plan = TENSOR_PLAN

    @property
    def splits_tokens(self) -> bool:
        """Whether context parallelism is on."""
        config = self._parallel_config
        return config is not None and config.context_parallel_config is not None

    def enable_parallelism(self, *, config, cp_plan: dict | None = None):
        """As of diffusers' models, with a `ContextParallelConfig` or a `TensorParallelConfig`; also between processes without
        an accelerator, through gloo.

        All processes must be given the same inputs: the same noise and the same text.
        Raises ValueError for numbers that the heads cannot be divided by, an attention kernel that cannot do what is asked, and
        together with caching.
        """
        context, tensor = _kinds(config)
        if context is not None:
            self._check_context(context)
            plan = self._cp_plan if cp_plan is None else cp_plan
            cp_plan = {name: part for name, part in plan.items() if getattr(self, name, True) is not None}
        if tensor is None or torch.accelerator.is_available():
            super().enable_parallelism(config=config, cp_plan=cp_plan)
        else:
            self._split_weights(config, tensor)

    def _check_context(self, context: ContextParallelConfig):
        if self.is_cache_enabled:
            raise ValueError("context parallelism cannot be combined with caching: call disable_cache() first")
        heads = self.config.num_attention_heads
        if heads % context.ulysses_degree and not context.ulysses_anything:
            raise ValueError(
                f"ulysses_degree must divide the {heads} attention heads, got {context.ulysses_degree}: choose another, or "
                "ulysses_anything=True"
            )
        backend = self.transformer_blocks[0].attn1.processor._attention_backend
        backend = backend or _AttentionBackendRegistry.get_active_backend()[0]
        if context.ring_degree > 1 and AttentionBackendName(backend) == AttentionBackendName.NATIVE:
            raise ValueError(
                "ring attention adds up parts of a softmax, whose weights the native attention does not give: use ulysses_degree, "
                "or first set_attention_backend('_native_cudnn'), ('_native_flash') or ('flash')"
            )

    def _check_shares(self, grid: tuple[int, int, int]):
        """ValueError where the tokens of a frame cannot be split equally and have to."""
        if not self.splits_tokens:
            return
        context = self._parallel_config.context_parallel_config
        parts, positions = context.ring_degree * context.ulysses_degree, grid[1] * grid[2]
        uneven = context.ulysses_anything or context.ring_anything
        if positions % parts and (not uneven or dist.get_backend() == "gloo"):
            remedy = (
                "gloo gathers equal ones only" if uneven else "or ulysses_anything=True in the ContextParallelConfig"
            )
            raise ValueError(
                f"the {positions} positions of a latent frame ({grid[1]} x {grid[2]} patches) cannot be split into {parts} equal "
                f"parts: choose another size; {remedy}"
            )

    def _resolve_parallel_config(self, config) -> ParallelConfig:
        """The config with its mesh, kept by the model. diffusers' own counts accelerators, of which there may be none."""
        if torch.accelerator.is_available():
            return super()._resolve_parallel_config(config)
        if not dist.is_initialized():
            raise RuntimeError("parallelism needs torch.distributed: launch with torchrun and call init_process_group")
        context, tensor = _kinds(config)
        shape, names = (
            ((tensor.tp_degree,), ("tp",)) if context is None else (context.mesh_shape, context.mesh_dim_names)
        )
        mesh = (context or tensor).mesh or dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
        if not isinstance(config, ParallelConfig):
            config = ParallelConfig(context_parallel_config=context, tensor_parallel_config=tensor)
        config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
        self._parallel_config = config
        return config

    def _split_weights(self, config, tensor: TensorParallelConfig):
        """Tensor parallelism between processors, which diffusers leaves to accelerators; the plan and the layers are the same."""
        from diffusers.hooks.tensor_parallel import _check_tp_supported, resolve_tp_shard_specs
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self._parallel_config is not None:
            raise RuntimeError("parallelism is enabled already: load the model again to change it")
        degree = tensor.mesh.size() if tensor.mesh is not None else tensor.tp_degree
        _check_tp_supported(type(self).__name__, self._tp_plan, self.config.num_attention_heads, tensor, model=self)
        resolve_tp_shard_specs(self, self._tp_plan, degree)
        mesh = self._resolve_parallel_config(config).tensor_parallel_config._mesh
        styles = dict(colwise=ColwiseParallel, rowwise=RowwiseParallel)
        plan = {name.removeprefix("transformer_blocks.*."): styles[style]() for name, style in self._tp_plan.items()}
        for block in self.transformer_blocks:
            parallelize_module(block, mesh, plan)


def _kinds(config) -> tuple[ContextParallelConfig | None, TensorParallelConfig | None]:
    """The two kinds of parallelism that a config of any type asks for."""
    if isinstance(config, ParallelConfig):
        return config.context_parallel_config, config.tensor_parallel_config
    if isinstance(config, ContextParallelConfig):
        return config, None
    if isinstance(config, TensorParallelConfig):
        return None, config
    raise ValueError(
        f"config must be a ContextParallelConfig, TensorParallelConfig or ParallelConfig of diffusers, got {config!r}"
    )
