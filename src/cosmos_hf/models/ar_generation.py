"""Generation of video codes: transformers' `generate`, with checks before it, seeds per item, and a lean loop inside."""

import copy
from functools import partial

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import TopPLogitsWarper
from transformers.generation.stopping_criteria import MaxLengthCriteria

from .ar_cache import ReservedCache
from .ar_checks import (
    check_actions,
    check_cache,
    check_context,
    check_generators,
    check_latent_shape,
    check_length,
    check_mask,
    check_tokens,
)
from .ar_decoding import WORTH_PACKING, PackedDecoder, can_pack
from .ar_layers import with_context_cache

# Top-p first looks at so many of the most probable codes: a whole sort of 64 000 takes as long as the network of a small model.
SHORTLIST = 1024
# Ways of decoding that transformers' `generate` knows beside the own loop, which alone draws from generators.
OTHER_WAYS = (
    "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "penalty_alpha", "dola_layers",
    "constraints", "force_words_ids", "custom_generate",
)  # fmt: skip


class CodesOnly(LogitsProcessor):
    """Rows of the output that are no codes are never generated."""

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size

    def __call__(self, input_ids, scores):
        scores[:, self.codebook_size :] = -torch.inf
        return scores


class KnownCodes(LogitsProcessor):
    """Codes that are given anywhere in a video are taken as they are: `known` [B, positions], -1 where they are not."""

    def __init__(self, known: torch.Tensor):
        self.known = known

    def __call__(self, input_ids, scores):
        codes = self.known[:, input_ids.shape[1]]
        given = codes >= 0
        scores[given] = -torch.inf
        scores[given, codes[given]] = 0.0
        return scores


class CosmosARGenerationMixin(GenerationMixin):
    # Whether generation on a processor may hold the weights a second time while it runs (`ar_decoding`), for its speed.
    packs_weights = True

    def generate(self, inputs: torch.Tensor | None = None, generator=None, **kwargs):
        """Continue videos. transformers' `generate`, and:

        - top_k is off unless an argument, the `generation_config` given or the model's own sets it: transformers' default of
          50 cuts off most of what 64 000 codes may say;
        - without a length the rest of the video is generated, as `latent_shape` (an argument, or the config's) has it; prompts
          of different length in one batch need one, for their videos do not end together;
        - without a prompt, a model with `<bov>` starts from it, once per text;
        - `generator`: a torch generator, or one per sequence: then a seed gives the same video alone or in a batch. For greedy
          decoding and sampling of prompts without padding; beams and assisted decoding draw from torch's global one;
        - prompt, context, masks, cache and length are checked before anything is computed (ValueError).
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is None and kwargs.get("inputs_embeds") is None:
            prompt = inputs = self._empty_prompt(kwargs)
        if prompt is not None:
            count = self._check_request(prompt, kwargs)
            if not self._has_length(kwargs):
                _set(kwargs, "max_new_tokens", count)
        if self.config.codebook_size < self.config.vocab_size:
            kwargs["logits_processor"] = LogitsProcessorList(
                [*(kwargs.get("logits_processor") or []), CodesOnly(self.config.codebook_size)]
            )
        if self._setting(kwargs, "do_sample") and self._setting(kwargs, "top_k") is None:
            _set(kwargs, "top_k", 0)
        if generator is not None:
            batch = len(kwargs["inputs_embeds"] if prompt is None else prompt)
            check_generators(generator, batch * (self._setting(kwargs, "num_return_sequences") or 1), "sequences")
            beams = ["num_beams"] if (self._setting(kwargs, "num_beams") or 1) > 1 else []
            if other := beams + [name for name in OTHER_WAYS if self._setting(kwargs, name)]:
                raise ValueError(
                    f"generator would be ignored with {', '.join(other)}: leave one of them out, or seed torch's global "
                    f"generator instead"
                )
            # transformers hands a loop that it is given nothing but the loop's own arguments.
            loop = partial(type(self)._sample, generator=generator, streamer=kwargs.get("streamer"))
            kwargs["custom_generate"] = loop
        return super().generate(inputs, **kwargs)

    def _empty_prompt(self, kwargs) -> torch.Tensor:
        bov = self.config.bov_token_id
        if bov is None:
            raise ValueError("give a prompt: this model has no <bov> to start a video from")
        context = kwargs.get("encoder_hidden_states")
        batch = 1 if context is None else len(context)
        return torch.full((batch, 1), bov, dtype=torch.long, device=self.device)

    def _setting(self, kwargs: dict, name: str):
        """What holds for a call of `generate`, where it is set: an argument, the config given, or the model's own."""
        if name in kwargs:
            return kwargs[name]
        value = getattr(kwargs.get("generation_config"), name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    def _has_length(self, kwargs: dict) -> bool:
        return any(self._setting(kwargs, name) is not None for name in ("max_new_tokens", "max_length"))

    def _check_request(self, prompt: torch.Tensor, kwargs: dict) -> int:
        """Refuse what cannot be generated -> how many codes are to be, by the arguments or else to the video's end."""
        shape = kwargs.get("latent_shape")
        shape = check_latent_shape(self.config.latent_shape if shape is None else shape)
        check_tokens(self.config, prompt)
        batch, length = prompt.shape
        check_length(self.config, shape, length, 0)
        cache = kwargs.get("past_key_values")
        context, context_mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        check_context(self.config, batch, cache, context, context_mask)
        check_actions(self.config, shape, batch, cache, kwargs.get("actions"))
        real = self._real_lengths(kwargs.get("attention_mask"), batch, length)
        left = self.config.num_positions(shape) - max(real)
        new, total = self._setting(kwargs, "max_new_tokens"), self._setting(kwargs, "max_length")
        if new is None and total is None:
            if left == 0:
                raise ValueError("the prompt is a whole video already: nothing is left to generate")
            if min(real) != max(real):
                raise ValueError(
                    f"the prompts have {min(real)} to {max(real)} tokens, so their videos do not end together: give "
                    f"max_new_tokens (at most {left}), or generate prompts of one length at a time"
                )
            new = left
        new = total - length if new is None else new
        if new < 1:
            raise ValueError(f"max_new_tokens or max_length ask for {new} codes behind a prompt of {length} tokens")
        check_length(self.config, shape, max(real) + new, 0, "the video asked for")
        check_cache(cache, length + new - 1)
        return new

    @staticmethod
    def _real_lengths(mask: torch.Tensor | None, batch: int, length: int) -> list[int]:
        """How many tokens of each prompt are no padding."""
        if mask is None or mask.ndim != 2:
            return [length]
        check_mask(mask, batch, length)
        if (mask[:, -1] == 0).any() or (mask.diff(dim=1) < 0).any():
            raise ValueError("attention_mask must have its zeros on the left: pad shorter prompts in front")
        return mask.sum(1).int().tolist()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """transformers' own; guesses of assisted generation may stand behind the video's end, where nothing is kept of them."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("position_ids") is not None:
            end = self.config.num_positions(kwargs.get("latent_shape"))
            inputs["position_ids"] = inputs["position_ids"].clamp_max(end)
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        cache = model_kwargs.get("past_key_values")
        if given is None and type(cache) is DynamicCache and not cache.offloading and generation_config.num_beams == 1:
            model_kwargs["past_key_values"] = cache = ReservedCache(self.config, max_cache_length)
        if cache is not None:
            model_kwargs["past_key_values"] = wrapped = with_context_cache(cache, self.config)
            if wrapped is not cache and getattr(cache, "_is_user_defined", False):
                wrapped._is_user_defined = True

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        generator=None,
        **model_kwargs,
    ):
        """One code after the other. Videos have a known length and no end token, so nothing but the network, the processors
        and the draw happens per code; whatever else is asked for is left to transformers' loop."""
        plain = (
            model_kwargs.get("use_cache")
            and model_kwargs.get("attention_mask") is None
            and model_kwargs.get("inputs_embeds") is None
            and not (synced_gpus or generation_config.return_dict_in_generate)
            and generation_config.prefill_chunk_size is None
            and all(isinstance(criterion, MaxLengthCriteria) for criterion in stopping_criteria)
            and (generator is not None or not self._valid_auto_compile_criteria(model_kwargs, generation_config))
        )
        if not plain:
            if generator is not None:
                raise ValueError(
                    "generator works with prompts of one length, use_cache=True and a fixed number of tokens; leave out "
                    "stopping criteria, return_dict_in_generate and padding, or seed torch's global generator"
                )
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )  # fmt: skip
        processors, top_p = _split_top_p(logits_processor, generation_config)
        length, total = input_ids.shape[1], generation_config.max_length
        tokens = torch.cat([input_ids, input_ids.new_zeros(len(input_ids), total - length)], dim=1)
        names = ("past_key_values", "encoder_hidden_states", "encoder_attention_mask", "actions", "latent_shape")
        inputs = {name: model_kwargs[name] for name in names if model_kwargs.get(name) is not None}
        past = int(inputs["past_key_values"].get_seq_length())
        chunk = input_ids[:, past:] if past < length else input_ids[:, -1:]
        decoder = None
        for place in range(length, total):
            if decoder is None:
                logits = self(input_ids=chunk, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]
            else:
                logits = decoder.scores(decoder.states(chunk, place - 1, **inputs))[:, -1]
            scores = processors(tokens[:, :place], logits.float())
            chunk = draw(scores, generator, top_p) if generation_config.do_sample else scores.argmax(-1, keepdim=True)
            tokens[:, place] = chunk[:, 0]
            if streamer is not None:
                streamer.put(chunk[:, 0].cpu())
            if place == length:
                for name in ("encoder_hidden_states", "actions"):
                    inputs.pop(name, None)  # their keys and values are in the cache
                decoder = self._packed_decoder(total - length)
        if streamer is not None:
            streamer.end()
        return tokens

    def _packed_decoder(self, codes: int) -> PackedDecoder | None:
        """What generates the codes after the first faster than the model itself, where there is such."""
        return PackedDecoder(self) if codes >= WORTH_PACKING and can_pack(self) else None


def _set(kwargs: dict, name: str, value):
    """An argument of `generate`, in the config where one is given: transformers deprecates both together."""
    if kwargs.get("generation_config") is None:
        kwargs[name] = value
    else:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        setattr(kwargs["generation_config"], name, value)


def _split_top_p(processors: LogitsProcessorList, generation_config) -> tuple[LogitsProcessorList, float | None]:
    """Top-p, where it is the last processor, is done by `draw` without sorting all codes."""
    if generation_config.do_sample and processors and type(processors[-1]) is TopPLogitsWarper:
        return LogitsProcessorList(processors[:-1]), float(processors[-1].top_p)
    return processors, None


def draw(scores: torch.Tensor, generator=None, top_p: float | None = None) -> torch.Tensor:
    """Log-probabilities up to a constant [B, V] -> codes [B, 1].

    Top-p keeps the codes before whose cumulative probability, from the most probable on, is at most `top_p`. The draw is
    argmax(probability / Exp(1)), over the codes in the order of their probability with top-p and of their number without, as in
    the reference. `generator`: None, one for the batch, or a list of B.
    """
    probabilities = scores.softmax(-1)
    noise = exponential(probabilities, generator)
    if top_p is None:
        return (probabilities / noise).argmax(-1, keepdim=True)
    values, order = probabilities.topk(min(SHORTLIST, probabilities.shape[-1]))
    if values.shape[-1] < probabilities.shape[-1] and (values.sum(-1) <= top_p).any():
        values, order = probabilities.sort(dim=-1, descending=True)
    before = values.cumsum(-1) - values
    values = values.masked_fill(before > top_p, 0.0)
    return order.gather(-1, (values / noise[:, : values.shape[-1]]).argmax(-1, keepdim=True))


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities [B, V] with those that top-p cuts off at zero; not rescaled."""
    if top_p >= 1:
        return probabilities.clone()
    values, order = probabilities.sort(dim=-1, descending=True)
    values = values.masked_fill(values.cumsum(-1) - values > top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, values)


def exponential(like: torch.Tensor, generator) -> torch.Tensor:
    """Exp(1) noise of a shape [B, V], row i from its own generator where there is a list of them."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(like):
            raise ValueError(f"{len(generator)} generators for {len(like)} sequences: give one each, or a single one")
        return torch.cat([exponential(like[i : i + 1], g) for i, g in enumerate(generator)])
    device = like.device if generator is None else generator.device
    return torch.empty(like.shape, device=device).exponential_(1, generator=generator).to(like.device)
