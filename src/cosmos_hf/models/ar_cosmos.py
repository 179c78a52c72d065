"""The autoregressive world models (arXiv 2501.03575, section 5.2) as a causal language model over video codes.

A video is a grid [T, H, W] of codes of the discrete tokenizer, of several views one below the other. The transformer is a Llama
with normalised queries and keys and a rotary embedding in three dimensions; models that are told about text attend to T5 embeddings
after every self-attention and begin with `<bov>`. Axes: B batch, S tokens, D width, L text tokens, V codes.
"""

import torch
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .ar_checks import check_call, check_latent_shape
from .ar_generation import CosmosARGenerationMixin
from .ar_layers import (
    CosmosARActionEmbedding,
    CosmosARAttention,
    CosmosARDecoderLayer,
    CosmosARRMSNorm,
    GridPositions,
    action_mask,
    projection,
    self_attention_cache,
    view_of,
    with_context_cache,
)
from .ar_loss import chunked_loss
from .linear import speed_up
from .medusa_cosmos import MedusaHead
from .strict_loading import StrictLoadingMixin

_YARN = dict(yarn_scale=2.0, yarn_original_shape=(3, 40, 64))
_TEXT = dict(cross_attention_dim=1024, absolute_positions="every_layer", bov_token_id=64000, embedding_size=64064)
_LARGE = dict(hidden_size=5120, num_hidden_layers=40)
_NANO = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
# Sizes by the name of the published model; `CosmosARConfig(**PRESETS["4b"])`. The nano models go with the tokenizer
# "nano-discrete" (4375 codes, 4x8x8; 17 frames of 96x128), the tiny one with "tiny-discrete".
PRESETS = {
    "4b": dict(),
    "5b-video2world": dict(**_TEXT),
    "12b": dict(**_LARGE, **_YARN),
    "13b-video2world": dict(**_LARGE, **_YARN, **_TEXT),
    "nano": dict(**_NANO, vocab_size=4375, latent_shape=(5, 12, 16), head_dim=64),
    "nano-video2world": dict(
        **_NANO, vocab_size=4375, embedding_size=4439, latent_shape=(5, 12, 16), head_dim=64,
        cross_attention_dim=128, absolute_positions="every_layer", bov_token_id=4375,
    ),
    "tiny": dict(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        vocab_size=1000, latent_shape=(3, 4, 4),
    ),
}  # fmt: skip


class CosmosARConfig(PreTrainedConfig):
    """Configuration of `CosmosARForCausalLM`; the defaults are those of the published 4B.

    Args:
        vocab_size: rows of the output, one per code of the tokenizer.
        embedding_size: rows of the input embedding; more than `vocab_size` where there are special tokens.
        codebook_size: how many of the output's rows are codes; None: all. Others are never generated.
        latent_shape: latent grid [T, H, W] of a video; a call may give another.
        bov_token_id: token in front of a video, 64000 in the published Video2World models; None: none.
        absolute_positions: None, "every_layer" (the published models add the embedding before each layer) or "once".
        cross_attention_dim: width of the text embeddings; None: no text. cross_attention_every: in every n-th layer.
        action_dim: numbers that lead to a latent frame, which every layer attends to; None: no actions.
        actions_per_frame: how many actions these are, the tokenizer's temporal factor.
        num_views: how many views a frame of the grid holds, one below the other; H is the height of all of them.
        yarn_scale, yarn_beta_fast, yarn_beta_slow, yarn_original_shape: context extension by YaRN; yarn_scale None: none.
        yarn_width_from_height: count the original height for the width, too, as the published 12B and 13B do.
        yarn_attention_temperature: apply YaRN's temperature; the published models were trained without.
        z_loss_weight: weight of the squared logarithm of the softmax's denominator in the training loss.
        medusa_num_heads: heads that guess further tokens (`medusa_cosmos`); 0: none.
    """

    model_type = "cosmos_ar"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"text_embed_dim": "cross_attention_dim"}  # what the diffusion transformers call it
    base_model_tp_plan = {
        **{f"layers.*.{a}.{p}_proj": "colwise" for a in ("self_attn", "cross_attn", "action_attn") for p in "qkv"},
        **{f"layers.*.{a}.o_proj": "rowwise" for a in ("self_attn", "cross_attn", "action_attn")},
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 64000
    embedding_size: int | None = None
    codebook_size: int | None = None
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    latent_shape: list[int] | tuple[int, ...] = (5, 40, 64)
    bov_token_id: int | None = None
    absolute_positions: str | None = None
    cross_attention_dim: int | None = None
    cross_attention_every: int = 1
    action_dim: int | None = None
    actions_per_frame: int = 1
    num_views: int = 1
    yarn_scale: float | None = None
    yarn_beta_fast: float = 4.0
    yarn_beta_slow: float = 1.0
    yarn_original_shape: list[int] | tuple[int, ...] | None = None
    yarn_width_from_height: bool = True
    yarn_attention_temperature: bool = False
    attention_dropout: float = 0.0
    z_loss_weight: float = 1e-4
    medusa_num_heads: int = 0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.latent_shape = list(check_latent_shape(self.latent_shape))
        self.embedding_size = self.embedding_size or self.vocab_size
        self.codebook_size = self.codebook_size or self.vocab_size
        self.bos_token_id = self.bov_token_id
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.absolute_positions not in (None, "every_layer", "once"):
            raise ValueError(f"absolute_positions must be None, every_layer or once, got {self.absolute_positions!r}")
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True: input and output of this model have weights of their own, leave it out"
            )
        if not self.codebook_size <= self.vocab_size <= self.embedding_size:
            raise ValueError(
                f"codebook_size <= vocab_size <= embedding_size is needed, "
                f"got {self.codebook_size}, {self.vocab_size}, {self.embedding_size}"
            )
        for name in ("bov_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not self.codebook_size <= token < self.embedding_size:
                raise ValueError(
                    f"{name}={token} must be a row of the embedding that is no code: "
                    f"in {self.codebook_size}..{self.embedding_size - 1}"
                )
        if self.action_dim is not None and (self.action_dim < 1 or self.action_dim % self.actions_per_frame):
            raise ValueError(
                f"action_dim must be a multiple of actions_per_frame, got {self.action_dim} and {self.actions_per_frame}"
            )
        if self.num_views < 1 or self.latent_shape[1] % self.num_views:
            raise ValueError(
                f"latent_shape {self.latent_shape} must have rows for num_views={self.num_views} views, one below the other"
            )
        if self.yarn_scale is not None:
            self.yarn_original_shape = list(check_latent_shape(self.yarn_original_shape, "yarn_original_shape"))
        super().__post_init__(**kwargs)

    def has_cross_attention(self, layer_idx: int) -> bool:
        return self.cross_attention_dim is not None and layer_idx % self.cross_attention_every == 0

    @property
    def has_context(self) -> bool:
        """Whether layers attend to something besides the video."""
        return self.cross_attention_dim is not None or self.action_dim is not None

    def num_positions(self, latent_shape=None) -> int:
        """Tokens of a whole video, `<bov>` included."""
        time, height, width = latent_shape or self.latent_shape
        return time * height * width + (self.bov_token_id is not None)


class CosmosARPreTrainedModel(PreTrainedModel):
    config_class = CosmosARConfig
    config: CosmosARConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CosmosARDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": CosmosARDecoderLayer,
        "attentions": OutputRecorder(CosmosARAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(CosmosARAttention, index=1, layer_name="cross_attn"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The reference's: unit embeddings, small projections, those that write to the residual smaller with depth."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, CosmosARRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            std = getattr(module, "init_std", 0.02)
            if std:
                init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            else:
                init.zeros_(module.weight)
        elif isinstance(module, MedusaHead):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class CosmosARModel(CosmosARPreTrainedModel):
    """Embedding, layers and final norm: tokens [B, S] -> hidden states [B, S, D]."""

    def __init__(self, config: CosmosARConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.embedding_size, config.hidden_size)
        self.layers = nn.ModuleList([CosmosARDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = CosmosARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.positions = GridPositions(config)
        self.action_embed = None if config.action_dim is None else CosmosARActionEmbedding(config)
        self.view_embed = None if config.num_views == 1 else nn.Embedding(config.num_views, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        latent_shape: tuple[int, int, int] | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The arguments are those of `CosmosARForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        shape = check_latent_shape(config.latent_shape if latent_shape is None else latent_shape)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past_key_values = with_context_cache(past_key_values, config)
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(f"input_ids must be integers [B, S], got {input_ids.dtype} {tuple(input_ids.shape)}")
        batch, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        device = (inputs_embeds if input_ids is None else input_ids).device
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past, torch.Tensor) and device.type == "cpu" and not torch.compiler.is_compiling():
            past = int(past)  # a static cache's; costs a synchronisation on other devices
        check_call(
            config, shape, input_ids, batch, length, past, past_key_values, attention_mask, position_ids,
            encoder_hidden_states, encoder_attention_mask, actions,
        )  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.to(inputs_embeds.dtype)
        packed = position_ids is not None and past_key_values is None
        if position_ids is None:
            position_ids = default_positions(attention_mask, past, length, device)
        rotation, absolute = self.positions(position_ids, shape, inputs_embeds.dtype)
        if self.view_embed is not None:
            inputs_embeds = inputs_embeds + self.view_embed(view_of(config, position_ids, shape))

        # One new token sees all of the past, and a first chunk is causal by itself (flex attention apart): no mask is needed.
        causal = past == 0 and config._attn_implementation != "flex_attention" if isinstance(past, int) else False
        plain = attention_mask is None and not packed and isinstance(past, int) and (length == 1 or causal)
        static = past_key_values is not None and self_attention_cache(past_key_values).is_compileable
        mask, key_length = None, past + length if static and plain else None
        if not plain:
            mask = create_causal_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=self_attention_cache(past_key_values),
                position_ids=position_ids,
            )
        elif length > 1 and config._attn_implementation == "eager":
            mask = torch.full((length, length), torch.finfo(inputs_embeds.dtype).min, device=device).triu(1)
            mask = mask.to(inputs_embeds.dtype)[None, None]
        context_mask = None
        if encoder_attention_mask is not None:
            context_mask = create_bidirectional_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        acted = {}
        if self.action_embed is not None:
            acted["action_mask"] = action_mask(config, position_ids, shape, inputs_embeds.dtype)
            acted["actions"] = None if actions is None else self.action_embed(actions)
        hidden_states = inputs_embeds
        for i, layer in enumerate(self.layers[: config.num_hidden_layers]):  # fewer in transformers' early exit
            hidden_states = layer(
                hidden_states,
                rotation,
                absolute if i == 0 or config.absolute_positions == "every_layer" else None,
                attention_mask=mask,
                context=encoder_hidden_states,
                context_mask=context_mask,
                past_key_values=past_key_values,
                key_length=key_length,
                **acted,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def default_positions(attention_mask, past: int | torch.Tensor, length: int, device) -> torch.Tensor:
    """Position ids [B or 1, S]; padding on the left does not count."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
    return (torch.arange(length, device=device) + past).unsqueeze(0)


class CosmosARForCausalLM(StrictLoadingMixin, PeftAdapterMixin, CosmosARPreTrainedModel, CosmosARGenerationMixin):
    """A causal language model over video codes: `generate` continues a video, `labels` train it.

    Its adapters are those of diffusers (`PeftAdapterMixin`), as the diffusion transformer's are.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    accepts_loss_kwargs = False  # the loss is a mean: transformers' Trainer must divide it by the accumulated steps

    def __init__(self, config: CosmosARConfig):
        super().__init__(config)
        self.model = CosmosARModel(config)
        self.lm_head = projection(config.hidden_size, config.vocab_size, config.hidden_size**-0.5)
        self.medusa_heads = nn.ModuleList([MedusaHead(config.hidden_size) for _ in range(config.medusa_num_heads)])
        speed_up(self)
        self.post_init()

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions besides text that `forward` needs; it refuses the other ones."""
        return () if self.config.action_dim is None else ("actions",)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        latent_shape: tuple[int, int, int] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next code, or with `labels` the training loss.

        Args:
            input_ids: codes [B, S] of a video or its beginning, behind `<bov>` where the model has one.
            attention_mask: [B, past + S], 0 where a shorter prompt is padded (on the left), or a backend's mask in 4-D.
            position_ids: [B or 1, S], place in the sequence; default: from the past on.
            encoder_hidden_states: text embeddings [B, L, cross_attention_dim]; needed on the first call of a model with
                cross-attention, later ones take keys and values from the cache.
            encoder_attention_mask: [B, L], 0 for text tokens that must not be seen. The published models were trained and are
                run without, on embeddings that are zero past the text's end.
            actions: [B, T, action_dim], the numbers that lead to each latent frame of the grid (`conditioning.action`), for a
                model with action_dim; as with the text, later calls take them from the cache.
            latent_shape: grid [T, H, W] of this video; default: the config's.
            labels: codes [B, S] as in `input_ids`, shifted here; -100 is ignored. The loss is the mean cross-entropy of the
                others plus `z_loss_weight` times the mean squared log-denominator of all. Logits never exist whole.
            logits_to_keep: only the last so many positions' logits; 0: all.
            return_logits: whether to compute logits; default: unless there are labels.

        Raises ValueError, before anything is computed, for tokens outside the codebook, more tokens than the grid or the cache
        holds, a context of another width, and masks of another shape.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            actions=actions,
            latent_shape=latent_shape,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = chunked_loss(self.lm_head, hidden_states, labels, self.config.z_loss_weight).total
        if return_logits or (return_logits is None and labels is None):
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register("cosmos_ar", CosmosARConfig)
AutoModel.register(CosmosARConfig, CosmosARModel)
AutoModelForCausalLM.register(CosmosARConfig, CosmosARForCausalLM)
