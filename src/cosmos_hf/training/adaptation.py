"""What post-training of both families shares: adapter settings, a base in fewer bits, LoRA, the check of step 0, the export."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.loaders.lora_pipeline import CosmosLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..conditioning.action import FILE_NAME, ActionSpec
from ..conditioning.views import check_view_names
from ..data.sampling import in_order
from ..models.condition_adapters import RECORD, ConditionAdapter
from ..models.four_bit import blocks_of, check_available, four_bit_blocks
from .cache import LatentDataset
from .config import RunConfig
from .devices import AUTOCAST, launched_as
from .loop import TrainingError, to_device

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "nf4")  # of a frozen base's blocks


@dataclass
class AdapterSettings(RunConfig):
    """The settings of a post-training that do not depend on the kind of base."""

    init_adapter: str = field(
        default="",
        metadata={
            "help": "go on from this adapter of the same base and shape (a folder) instead of from the base alone"
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "0: train all weights instead"})
    lora_alpha: float = field(default=16.0, metadata={"help": "the LoRA counts lora_alpha / lora_rank"})
    base_precision: str = field(
        default="float32", metadata={"help": "of the frozen base's blocks: float32, bfloat16 or nf4 (QLoRA)"}
    )
    condition_dropout: float = field(default=0.1, metadata={"help": "share of samples whose conditions are zeroed"})
    condition_lr_scale: float = field(
        default=1.0,
        metadata={
            "help": "what conditions add to the base, which starts at zero, learns so many times as fast as the LoRA"
        },
    )
    action_spec: str = field(
        default="",
        metadata={
            "help": "what actions mean: bridge, driving, or a folder with action_spec.json; empty: what the LeRobot data say"
        },
    )
    action_normalisation: str = field(default="quantile", metadata={"help": "none, standard, range or quantile"})
    accumulate_actions: bool = field(
        default=False,
        metadata={"help": "also tell the network where the actions so far have led from the first frame on"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank < 0 or self.lora_alpha <= 0 or not self.lora_targets:
            raise ValueError("lora_rank must be >= 0 (0: train all weights), lora_alpha > 0, lora_targets not empty")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}")
        if self.condition_lr_scale <= 0 or (self.condition_lr_scale != 1 and not self.lora_rank):
            raise ValueError(
                f"condition_lr_scale must be positive and belongs to LoRA, got {self.condition_lr_scale} with "
                f"lora_rank={self.lora_rank}"
            )
        self._check_init_adapter()
        self._check_precision()

    def _check_init_adapter(self):
        if not self.init_adapter:
            return
        if not self.lora_rank:
            raise ValueError("init_adapter is gone on from by LoRA: lora_rank=0 would train the base's weights")
        if not (Path(self.init_adapter) / RECORD).exists():  # said before any clip is read
            raise FileNotFoundError(
                f"{Path(self.init_adapter) / RECORD} is missing: init_adapter must be a folder that a run with lora_rank above 0 "
                "exported"
            )
        _, settings = CosmosLoraLoaderMixin.lora_state_dict(self.init_adapter, return_lora_metadata=True)
        for name, entry in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
            known, asked = (settings or {}).get(f"transformer.{entry}"), getattr(self, name)
            if known != asked:
                raise ValueError(f"init_adapter {self.init_adapter} has {name} {known}, this run {asked}")
        if (Path(self.init_adapter) / FILE_NAME).exists():
            if self.action_spec:
                raise ValueError(
                    f"{self.init_adapter} says itself what its actions mean: leave out action_spec={self.action_spec}"
                )
            self.action_spec = self.init_adapter

    def _check_precision(self):
        if self.base_precision not in PRECISIONS:
            raise ValueError(f"base_precision must be one of {', '.join(PRECISIONS)}, got {self.base_precision!r}")
        if self.base_precision == "float32":
            return
        if not self.lora_rank:
            raise ValueError(
                f"base_precision={self.base_precision} is for a frozen base: lora_rank=0 trains all weights"
            )
        if self.base_precision == "bfloat16" and self.mixed_precision != "bf16":
            raise ValueError("base_precision=bfloat16 needs mixed_precision: bf16, or its products would not fit")
        if self.base_precision == "nf4":
            check_available()
            if (launch := launched_as()) in ("FSDP", "DEEPSPEED"):
                raise ValueError(f"base_precision=nf4 runs on one device or under DDP, not under {launch}")


def check_init_from(config: RunConfig, of_the_base: tuple[str, ...], defaults: dict):
    """ValueError without a base, or for a setting that is the base's."""
    if not config.init_from:
        raise ValueError("post-training starts from a pipeline: give its folder as init_from")
    if given := [name for name in of_the_base if getattr(config, name) != defaults[name]]:
        raise ValueError(f"{', '.join(given)} cannot be set in post-training: the base's are kept")


def pipeline_settings(folder: str) -> dict:
    """What `model_index.json` of a pipeline's folder says; empty where there is none."""
    index = Path(folder) / "model_index.json"
    return json.loads(index.read_text()) if index.exists() else {}


def check_run_views(config: AdapterSettings, base_views: list[str] | None) -> list[str]:
    """The cameras that a run reads together: those that it names where views are learned, else those of the base.

    ValueError where these disagree, and for a `camera` beside them.
    """
    views = config.views
    if "views" in config.conditions:
        if base_views:
            raise ValueError(f"the base has the views {', '.join(base_views)} already: leave views out of conditions")
        if len(check_view_names(views)) < 2:
            raise ValueError(
                f"views must name at least two cameras of the clips, got {views}; for one alone leave views out of conditions "
                "and name it as camera"
            )
    elif base_views:
        views = views or list(base_views)
        if views != list(base_views):
            raise ValueError(f"the base has the views {', '.join(base_views)}, not {', '.join(views)}")
    elif views:
        raise ValueError(
            "views names cameras, but the base has one view: add views to conditions, or name one as camera"
        )
    if views and config.camera:
        raise ValueError(f"camera names the one view to read, but this run has {', '.join(views)}: leave camera out")
    return views


@contextmanager
def errors_of(sample: dict) -> Iterator[None]:
    """A ValueError within says which clip it is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"clip {sample['key']!r}: {error}") from error


# ---- the base ------------------------------------------------------------------------------------------------------


def freeze(transformer: nn.Module, config: AdapterSettings):
    """No gradients for the base, whose blocks' weights get the run's precision."""
    transformer.requires_grad_(False)
    lower_precision(transformer, config)


def lower_precision(transformer: nn.Module, config: AdapterSettings):
    """In place; LoRA that is there already stays as it is."""
    if config.base_precision == "nf4":
        count = four_bit_blocks(transformer, AUTOCAST.get(config.mixed_precision, torch.float32))
        logger.info("%d linear layers of the base in 4 bits (NF4)", count)
    elif config.base_precision == "bfloat16":
        for name, layer in blocks_of(transformer).named_modules():
            if isinstance(layer, nn.Linear) and ".lora_" not in name:
                layer.to(torch.bfloat16)


def go_on_from(transformer: nn.Module, config: AdapterSettings, changes: dict):
    """Fill the run's LoRA and new parts, which stand at zero, with those of `init_adapter`; nothing without one.

    ValueError where it is of another base, adds other conditions than `changes`, or its LoRA is of other layers.
    """
    folder = config.init_adapter
    if not folder:
        return
    adapter = ConditionAdapter.load(folder)
    if adapter.changes != changes:
        raise ValueError(f"init_adapter {folder} adds {adapter.changes} to its base, this run adds {changes}")
    if (views := adapter.record.get("views", config.views)) != config.views:
        raise ValueError(f"init_adapter {folder} has the views {views}, this run {config.views}")
    adapter.check_base(transformer)
    lora = CosmosLoraLoaderMixin.lora_state_dict(folder)
    lora = {name.removeprefix("transformer."): value for name, value in lora.items()}
    layers = get_peft_model_state_dict(transformer, adapter_name="default")
    if different := sorted(lora.keys() ^ layers.keys()):
        raise ValueError(
            f"init_adapter {folder} has not the layers of this run's lora_targets: {len(different)} weights differ, the first "
            f"is {different[0]}"
        )
    adapter.fill(transformer)
    set_peft_model_state_dict(transformer, lora, adapter_name="default")
    logger.info("going on from the adapter in %s", folder)


def learn_as_new(parameters: Iterable[nn.Parameter], config: AdapterSettings):
    """What the base lacks is trained, at a learning rate of its own (`loop.build_optimizer`)."""
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.learning_rate_scale = config.condition_lr_scale


def add_lora(transformer: nn.Module, config: AdapterSettings, prefix: str, leave_out: tuple[str, ...] = ()):
    """LoRA on the layers below `prefix` (as `transformer_blocks`) whose names end in a target.

    `leave_out`: modules of a block, by their first name, that learn themselves. ValueError for a target that matches none.
    """
    depth = prefix.count(".") + 1
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    layers = [name.split(".", depth + 1)[depth:] for name in layers if name.startswith(f"{prefix}.")]
    layers = [(block, name) for block, name in layers if name.split(".")[0] not in leave_out]
    blocks, found = set(), set()
    for target in config.lora_targets:
        hits = [(block, name) for block, name in layers if f".{name}".endswith(f".{target}")]
        if not hits:
            there = ", ".join(dict.fromkeys(name for _, name in layers))
            raise ValueError(f"lora_targets: {target!r} ends the name of no layer; a block has {there}")
        blocks |= {block for block, _ in hits}
        found |= {name for _, name in hits}
    count = len(transformer.get_submodule(prefix))
    logger.info("LoRA of rank %d in %d/%d blocks: %s", config.lora_rank, len(blocks), count, ", ".join(sorted(found)))
    targets = "|".join(re.escape(target) for target in config.lora_targets)
    others = rf"(?!(?:{'|'.join(map(re.escape, leave_out))})\.)" if leave_out else ""
    pattern = rf"{re.escape(prefix)}\.\d+\.{others}(?:.*\.)?(?:{targets})"
    transformer.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=pattern))
    for parameter in transformer.parameters():
        if parameter.requires_grad:  # peft gives LoRA its layer's dtype
            parameter.data = parameter.data.float()


@torch.no_grad()
def check_same_output(output: Callable[[], torch.Tensor], change: Callable[[], None], tolerance: float = 1e-5):
    """Make the change and compare `output()` before and after it, which should have conditions that are not zero.

    Raises TrainingError where they differ by more than `tolerance` of the output's size.
    """
    before = output()
    change()
    off = (output() - before).abs().max() / before.square().mean().sqrt().clamp(min=1e-6)
    if not off <= tolerance:
        raise TrainingError(f"step 0 must be the base, but the output is off by {off:.2g} of its size")
    logger.info("step 0 is the base: the output is off by %.1g of its size", off)


def tell_trained(transformer: nn.Module):
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    total = sum(p.numel() for p in transformer.parameters())
    logger.info("%.3f M of %.1f M parameters are trained", trained / 1e6, total / 1e6)


def load_trained(pipeline_class: type, folder: Path, config: AdapterSettings):
    """A pipeline of the base with the adapter in `folder`, in the precision that it was trained in, to be compared."""
    pipe = pipeline_class.from_pretrained(config.init_from)
    if config.base_precision == "nf4":
        lower_precision(pipe.transformer, config)
    pipe.load_lora_weights(folder)
    if config.base_precision == "bfloat16":
        lower_precision(pipe.transformer, config)
    return pipe


def comparing(config: AdapterSettings, device) -> torch.autocast:
    """Around evaluations outside of the loop: autocast where the base's weights need it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.base_precision == "bfloat16")


# ---- validation ----------------------------------------------------------------------------------------------------


def sensitivities(model: nn.Module, loss, batches, datasets: dict[str, LatentDataset], batch_size: int) -> dict:
    """`loss.sensitivity` on every validation set, in batches of two samples or more; what collating draws is the same each time."""
    figures, device = {}, next(model.parameters()).device
    for name, dataset in datasets.items():
        measured = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for batch in in_order(dataset, max(2, batch_size), batches.collate):
                if len(batch["tokens" if "tokens" in batch else "latents"]) > 1:
                    measured.append(loss.sensitivity(model, to_device(batch, device)))
        for figure in measured[0] if measured else ():
            figures[f"{name}_{figure}"] = sum(part[figure] for part in measured) / len(measured)
    return figures


# ---- export --------------------------------------------------------------------------------------------------------


def save_adapter(transformer: nn.Module, folder: Path, changes: dict, spec: ActionSpec | None, **record):
    """Write what was learned beside the base: LoRA, new columns and modules, what actions mean."""
    lora = transformer.peft_config["default"].to_dict()
    lora = {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}
    CosmosLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name="default"),
        transformer_lora_adapter_metadata=lora,
    )
    ConditionAdapter.of(transformer, changes, **record).save(folder)
    if spec is not None:
        spec.save(folder)
