"""Feature caching by diffusers' hooks: steps of a generation that reuse what the blocks computed in earlier ones.

Off unless `enable_cache` is called. It is an approximation, whose price `benchmarks/shortcuts.py` measures.
"""

import re
from dataclasses import replace

from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin

from .dit_layers import CosmosBlock

# Those that keep apart what the two branches of guidance compute, which are evaluated one after the other.
CACHES = (FirstBlockCacheConfig, TaylorSeerCacheConfig, MagCacheConfig)
# What TaylorSeer extrapolates unless its config names modules: all that costs time within a block.
_TAYLOR_MODULES = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]


class FeatureCachingMixin(CacheMixin):
    """Put before `ModelMixin`; for a model of `CosmosBlock`s in `transformer_blocks`."""

    def enable_cache(self, config):
        """As of diffusers' `CacheMixin`, with a config of one of `CACHES`.

        Raises ValueError for another kind, for one that names no module of this model, and together with context parallelism.
        """
        if not isinstance(config, CACHES):
            raise ValueError(
                f"caching by {type(config).__name__} is not offered: it would mix the two branches of guidance, repeat what "
                f"prepare_text does, or knows nothing of this model. Use {', '.join(cls.__name__ for cls in CACHES)}"
            )
        if self.splits_tokens:
            raise ValueError(
                "caching cannot be combined with context parallelism: each process would decide by its own tokens which "
                "blocks to skip, and wait for the others in vain"
            )
        if isinstance(config, TaylorSeerCacheConfig) and not config.use_lite_mode:
            if config.cache_identifiers is None:
                config = replace(config, cache_identifiers=_TAYLOR_MODULES)
            names = [name for name, _ in self.named_modules()]
            for pattern in (*config.cache_identifiers, *(config.skip_predict_identifiers or ())):
                if not any(re.fullmatch(pattern, name) for name in names):
                    raise ValueError(
                        f"{pattern!r} is the name of no module of this model; for example {_TAYLOR_MODULES[0]!r}"
                    )
        TransformerBlockRegistry.register(CosmosBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)
