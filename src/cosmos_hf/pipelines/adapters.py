"""LoRA adapters of the pipelines, also such as bring new conditions along (`models.condition_adapters`).

The calls are diffusers': `load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights` and so on. What is added here:
the transformer is extended by the conditions of the adapters that are active, and by no others, so that the pipeline asks
for exactly the inputs that it then uses.
"""

import logging
from dataclasses import asdict
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.lora_pipeline import CosmosLoraLoaderMixin
from diffusers.utils import get_adapter_name
from torch import nn

from ..conditioning.action import FILE_NAME, ActionSpec
from ..conditioning.views import PUBLISHED_VIEWS, check_view_names
from ..models.condition_adapters import COMPANIONS, RECORD, WEIGHTS, ConditionAdapter, has_condition

logger = logging.getLogger(__name__)

FILES = (LORA_WEIGHT_NAME_SAFE, RECORD, WEIGHTS, FILE_NAME)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


class ConditionAdaptersMixin(CosmosLoraLoaderMixin):
    """For pipelines whose `transformer` is a `CosmosWorldTransformer3D` or a `CosmosARForCausalLM`.

    `start_adapters` belongs into the constructor.
    """

    takes_views = False  # whether a call is of several views

    def start_adapters(self):
        self._adapters: dict[str, tuple[ConditionAdapter, ActionSpec | None]] = {}  # those with conditions, by name
        self._weights: dict[str, float] = {}  # of the active ones
        self._fused: dict[str, float] = {}
        self._present: list[str] = []  # whose conditions the transformer has now
        self._enabled = True

    @property
    def action_spec(self) -> ActionSpec | None:
        """What actions mean to the model: of the adapter that brought them, else the pipeline's own."""
        specs = [self._adapters[name][1] for name in self._present if self._adapters[name][1] is not None]
        return specs[0] if specs else ActionSpec.of(self.config.action_spec)

    @property
    def views(self) -> tuple[str, ...] | None:
        """Names of the model's views: of the adapter that brought them, else the pipeline's own; None for a model of one view."""
        count = self.transformer.config.num_views
        if count == 1:
            return None
        told = [self._adapters[name][0].record.get("views") for name in self._present]
        names = next((names for names in told if names), None) or self.config.views
        if names is None and count == len(PUBLISHED_VIEWS):
            names = PUBLISHED_VIEWS
        if names is None:
            raise ValueError(f"nobody has named this model's {count} views: make the pipeline with views=[...]")
        return check_view_names(names, count)

    @property
    def trained_settings(self) -> dict:
        """Size, frames and rate that the active adapters were trained at, where they tell and agree."""
        told = self._settings_by_adapter()
        return {n: next(iter(values.values())) for n, values in told.items() if len(set(values.values())) == 1}

    def call_default(self, name: str):
        """What a call uses that leaves the argument `name` out: what the active adapters were trained at, else the pipeline's own.

        Raises ValueError where two of them were trained at different values.
        """
        values = self._settings_by_adapter().get(name, {})
        if len(set(values.values())) > 1:
            raise ValueError(f"the adapters were trained at different {name} ({_listed(values)}): give {name}=")
        return next(iter(values.values()), self.config[name])

    def _settings_by_adapter(self) -> dict[str, dict]:
        """Argument of a call -> active adapter that was trained at a value of it -> the value."""
        told = {}
        for adapter in self._present:
            for name, value in (self._adapters[adapter][0].record.get("settings") or {}).items():
                told.setdefault(name, {})[adapter] = value
        return told

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """Load an adapter and make it active beside those that are: a folder that `training/posttrain.py` wrote, such a
        repository of the Hub, or a plain LoRA file or state dict.

        Raises ValueError for another kind of base, a condition that the model or an adapter already has, a name in use, weights
        for layers that the transformer does not have, and while adapters are fused.
        """
        self._refuse_fused("a further adapter would not act")
        name = adapter_name or get_adapter_name(self.transformer)
        if name in getattr(self.transformer, "peft_config", {}):
            raise ValueError(
                f"an adapter {name!r} is loaded already: choose another adapter_name, or delete_adapters first"
            )
        source = _local(pretrained_model_name_or_path_or_dict, kwargs)
        adapter = spec = None
        if isinstance(source, Path) and source.is_dir() and (source / RECORD).exists():
            adapter = ConditionAdapter.load(source)
            spec = ActionSpec.load(source) if "action_dim" in adapter.changes else None
            self._check_new(adapter, name)
        source = str(source) if isinstance(source, Path) else source
        self._check_lora(self.lora_state_dict(source, **kwargs))
        active = dict(self._weights)
        super().load_lora_weights(source, adapter_name=name, **kwargs)
        if adapter is not None:
            self._adapters[name] = (adapter, spec)
            if "cross_attention_dim" in adapter.changes:  # a base without text has no length of it either
                self.register_to_config(max_sequence_length=adapter.record["max_sequence_length"])
        try:
            self.set_adapters([*active, name], [*active.values(), 1.0])
        except ValueError:
            self.delete_adapters(name)
            raise

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights=None):
        """Which adapters act, and how strongly; the conditions of the others leave the transformer until they are set again."""
        self._refuse_fused("set_adapters would change nothing")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        known = list(getattr(self.transformer, "peft_config", {}))
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"no adapter {', '.join(missing)} is loaded; there is {', '.join(known) or 'none'}")
        for name, weight in zip(names, weights, strict=True):
            if name in self._adapters and isinstance(weight, dict):
                raise ValueError(f"the adapter {name!r} brings conditions along and takes one number for a weight")
        super().set_adapters(names, adapter_weights)
        self._weights = {n: 1.0 if w is None else w for n, w in zip(names, weights, strict=True)}
        self._update_conditions()

    def fuse_lora(self, components=("transformer",), lora_scale: float = 1.0, adapter_names=None, **kwargs):
        """Merge adapters into the weights; their conditions stay, also when the adapters are unloaded afterwards."""
        self._refuse_fused("a second fuse_lora could not be undone")
        if adapter_names and (left := sorted(self._weights.keys() - set(adapter_names))):
            raise ValueError(
                f"{', '.join(left)} would not act beside fused adapters: fuse them too, or first call "
                f"set_adapters({list(adapter_names)})"
            )
        super().fuse_lora(list(components), lora_scale=lora_scale, adapter_names=adapter_names, **kwargs)
        names = adapter_names or list(self._weights)
        self._fused |= {n: lora_scale * self._weights.get(n, 1.0) for n in names if n in self._adapters}
        self._update_conditions()

    def unfuse_lora(self, components=("transformer",), **kwargs):
        """Take fused adapters out of the weights again; they act as they did before `fuse_lora`."""
        super().unfuse_lora(list(components), **kwargs)
        self._fused = {}
        if self._weights:  # diffusers leaves them at fuse_lora's lora_scale
            super().set_adapters(list(self._weights), list(self._weights.values()))
        self._update_conditions()

    def disable_lora(self):
        self._refuse_fused("disable_lora would take the LoRA out of the weights and leave the conditions")
        super().disable_lora()
        self._enabled = False
        self._update_conditions()

    def enable_lora(self):
        super().enable_lora()
        self._enabled = True
        self._update_conditions()

    def delete_adapters(self, adapter_names: list[str] | str):
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if self.fused_loras & set(names):
            self._refuse_fused("what they learned would stay there")
        self._weights = {n: w for n, w in self._weights.items() if n not in names}
        self._update_conditions()
        super().delete_adapters(names)
        for name in names:
            self._adapters.pop(name, None)

    def unload_lora_weights(self):
        """Back to the base: without all adapters, but with those that were fused, which now are the pipeline's own."""
        spec, self._weights = self.action_spec, {}
        views = [self._adapters[name][0].record.get("views") for name in self._fused]
        self._update_conditions()
        if any(self._adapters[name][1] for name in self._fused):
            self.register_to_config(action_spec=asdict(spec))
        if named := [names for names in views if names]:
            self.register_to_config(views=list(named[0]))
        for name, values in self._settings_by_adapter().items():
            if name not in self.trained_settings:
                logger.warning(
                    "the fused adapters were trained at different %s (%s): the pipeline keeps its own, %s; another one is told by "
                    "pipe.register_to_config(%s=...)",
                    *(name, _listed(values), self.config[name], name),
                )
        self.register_to_config(**self.trained_settings)
        super().unload_lora_weights()
        self._merged_adapters = set()
        self.start_adapters()

    def save_pretrained(self, *args, **kwargs):
        """Save the whole pipeline. Raises ValueError while adapters are loaded, whose layers would be taken for the base's."""
        if names := list(getattr(self.transformer, "peft_config", None) or {}):
            raise ValueError(
                f"the adapters {', '.join(names)} are loaded: call fuse_lora() and unload_lora_weights() to save a pipeline "
                "with them, or unload_lora_weights() alone for one without"
            )
        if getattr(self.transformer, "is_loaded_in_4bit", False):
            raise ValueError(
                "the transformer's weights are in 4 bits: save the pipeline as it was before four_bit_blocks"
            )
        return super().save_pretrained(*args, **kwargs)

    def _refuse_fused(self, why: str):
        if fused := sorted(self.fused_loras):
            raise ValueError(
                f"the adapters {', '.join(fused)} are fused into the weights, where {why}: call unfuse_lora() first, or "
                "unload_lora_weights() to make them part of the pipeline"
            )

    # ---- the transformer's conditions --------------------------------------------------------------------------------

    def _update_conditions(self):
        """Give the transformer the conditions of the fused adapters and of the active ones, at their weights."""
        wanted = {n: w for n, w in self._weights.items() if n in self._adapters} if self._enabled else {}
        wanted |= self._fused
        for name in reversed(self._present):
            self._adapters[name][0].remove_from(self.transformer)
        self._present = []
        for name, weight in wanted.items():
            self._adapters[name][0].add_to(self.transformer, weight)
            self._present.append(name)

    def _check_new(self, adapter: ConditionAdapter, name: str):
        if any(parameter.is_meta for parameter in self.transformer.parameters()):
            raise ValueError(
                "load adapters before enable_sequential_cpu_offload: the transformer's weights are elsewhere now"
            )
        adapter.check_base(self.transformer)
        for field in adapter.changes:
            owners = [other for other, (known, _) in self._adapters.items() if field in known.changes]
            if field not in COMPANIONS and owners:
                raise ValueError(
                    f"the adapters {owners[0]!r} and {name!r} both bring {field}: only one can be loaded at a time; call "
                    f"delete_adapters({owners[0]!r}) first"
                )
            if field not in COMPANIONS and has_condition(self.transformer, field):
                raise ValueError(f"the adapter {name!r} brings {field}, which this pipeline's transformer has already")

    def _check_lora(self, state: dict):
        unknown = []
        for key in state:
            path, _, _ = key.removeprefix("transformer.").partition(".lora_")
            try:
                known = isinstance(self.transformer.get_submodule(path), nn.Module)
            except AttributeError:
                known = False
            if not known or not key.startswith("transformer."):
                unknown.append(key)
        if unknown:
            raise ValueError(
                f"{len(unknown)} of the adapter's {len(state)} weights are for layers that this transformer does not have, such "
                f"as {unknown[0]}: it was trained on another base"
            )


def _listed(values: dict) -> str:
    return ", ".join(f"{name!r} {value}" for name, value in values.items())


def _local(source, kwargs: dict):
    """A folder or file on this disk, where `source` is or names one; a state dict as it is."""
    if isinstance(source, dict):
        return source
    path = Path(source)
    if not path.exists():
        from huggingface_hub import snapshot_download

        given = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        within = f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""
        patterns = [within + name for name in (*FILES, kwargs.get("weight_name") or LORA_WEIGHT_NAME_SAFE)]
        path = Path(snapshot_download(str(source), allow_patterns=patterns, **given))
    if kwargs.get("subfolder"):
        path = path / kwargs.pop("subfolder")
    return path
