"""Training of autoregressive world models (arXiv 2501.03575, section 5.2): what to build, the loss, validation.

The paper's stages: next-code prediction on short videos with one latent frame given, then a longer grid with YaRN
(`yarn_scale`), then cross-attention to text added to the trained base (`add_cross_attention`), with a cool-down at the end of
each (`cooldown_steps`). Codes come from `cache`, coded once; logits never exist whole (`models.ar_loss`).
"""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import T5EncoderModel

from ..data.sampling import in_order
from ..models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from ..models.ar_loss import IGNORED, chunked_loss, ignored_tokens
from .cache import LatentDataset
from .config import WindowSettings
from .diffusion import Texts
from .loop import TrainingError, to_device
from .text import build_text_encoder, embed_tokens


@dataclass
class AutoregressiveConfig(WindowSettings):
    family: str = field(default="autoregressive", metadata={"help": "kind of world model"})
    vae: str = field(default="", metadata={"help": "folder of the discrete video tokenizer"})
    num_frames: int = field(
        default=33, metadata={"help": "length of a window in pixel frames, 1 + k * the tokenizer's"}
    )
    condition_frames: int = field(default=1, metadata={"help": "latent frames given: their codes are no targets"})
    bov_hides_target: bool = field(
        default=True, metadata={"help": "off: with <bov> the last given code is a target, as in the reference"}
    )
    z_loss_weight: float = 1e-4
    add_cross_attention: bool = field(default=False, metadata={"help": "text stage: add cross-attention to init_from"})
    freeze_base: bool = field(default=False, metadata={"help": "text stage: train only what reads text, and the ends"})
    yarn_scale: float = field(
        default=0.0, metadata={"help": "context stage: extend init_from to the data's grid by YaRN"}
    )
    train_text_encoder: bool = field(default=False, metadata={"help": "train a small T5 encoder and vocabulary along"})
    text_preset: str = field(default="nano", metadata={"help": "its size: a name in TEXT_PRESETS"})
    vocab_size: int = 1024
    text_encoder: str = field(default="", metadata={"help": "else: folder with text_encoder/ and tokenizer/, frozen"})
    max_sequence_length: int = field(
        default=512, metadata={"help": "text tokens; shorter texts are padded with zeros"}
    )
    text_dropout: float = field(default=0.0, metadata={"help": "share of samples that see no text"})
    temperature: float = field(default=1.0, metadata={"help": "written into the exported pipeline"})
    top_p: float = field(default=0.8, metadata={"help": "written into the exported pipeline"})

    def __post_init__(self):
        super().__post_init__()
        expected = type(self).__dataclass_fields__["family"].default
        if self.family != expected:
            raise ValueError(f"family must be {expected}, got {self.family!r}")
        if self.train_text_encoder and self.text_encoder:
            raise ValueError("give either train_text_encoder: true or the folder of a frozen text_encoder")
        if not 0 <= self.text_dropout < 1:
            raise ValueError(f"text_dropout must be in [0, 1), got {self.text_dropout}")
        if self.condition_frames < 0:
            raise ValueError(f"condition_frames must be >= 0, got {self.condition_frames}")
        for name in ("add_cross_attention", "yarn_scale"):
            if getattr(self, name) and not self.init_from:
                raise ValueError(f"{name} is a stage that starts from a trained model: give init_from")
        if self.add_cross_attention and not self.has_text:
            raise ValueError("add_cross_attention attends to text: give train_text_encoder: true or text_encoder")
        if self.freeze_base and not self.add_cross_attention:
            raise ValueError("freeze_base belongs to the text stage (add_cross_attention)")

    @property
    def has_text(self) -> bool:
        return self.train_text_encoder or bool(self.text_encoder)


class ARWorldModel(nn.Module):
    """All that a run trains, as one module: the transformer, and where there is such the text encoder.

    A container, so that one `forward` goes through accelerate's wrappers; each part is saved on its own.
    """

    def __init__(self, transformer: CosmosARForCausalLM, text_encoder: T5EncoderModel | None = None):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(self, tokens, labels, latent_shape, text=None, keep=None, actions=None, with_states: bool = False):
        """`ARLoss`, and `with_states` the hidden states before the output layer [B, S, D].

        tokens and labels [B, S]; text: (ids, mask) for the encoder, or embeddings [B, N, D]; keep [B]: 0 drops a text; actions
        [B, T', action_dim].
        """
        states = self.states(tokens, latent_shape, text, keep, actions)
        loss = chunked_loss(self.transformer.lm_head, states, labels, self.transformer.config.z_loss_weight)
        return (loss, states) if with_states else loss

    def states(self, tokens, latent_shape, text=None, keep=None, actions=None) -> torch.Tensor:
        """Hidden states [B, S, D] before the output layer."""
        if text is not None:
            text = text if self.text_encoder is None else embed_tokens(self.text_encoder, *text)
            if keep is not None:
                text = text * keep[:, None, None].to(text.dtype)
        model = self.transformer.model
        given = dict(encoder_hidden_states=text, actions=actions, latent_shape=latent_shape)
        return model(tokens, use_cache=False, **given).last_hidden_state


# ---- what is trained ------------------------------------------------------------------------------------------------


def build_model(config: AutoregressiveConfig, codebook_size: int | None = None, latent_shape=None) -> ARWorldModel:
    """From `init_from` (a pipeline's folder) or with random weights, for the tokenizer's codebook and the data's grid."""
    base = Path(config.init_from) if config.init_from else None
    text_encoder = None
    if config.train_text_encoder:
        if base and (base / "text_encoder").is_dir():
            text_encoder = T5EncoderModel.from_pretrained(base / "text_encoder")
        else:
            text_encoder = build_text_encoder(config.text_preset, config.vocab_size)
    if base:
        transformer = CosmosARForCausalLM.from_pretrained(base / "transformer")
    else:
        transformer = CosmosARForCausalLM(preset_config(config.preset, codebook_size))
    if codebook_size not in (None, transformer.config.codebook_size):
        raise ValueError(
            f"the tokenizer has {codebook_size} codes, the model in {config.init_from} {transformer.config.codebook_size}"
        )
    if config.yarn_scale:
        extend_context(transformer, config.yarn_scale)
    if latent_shape is not None:
        transformer.config.latent_shape = list(latent_shape)
    width = text_encoder.config.d_model if text_encoder is not None else None
    if config.add_cross_attention:
        transformer = add_cross_attention(transformer, width or T5EncoderModel.config_class.from_pretrained(
            Path(config.text_encoder) / "text_encoder"
        ).d_model)  # fmt: skip
        if config.freeze_base:
            freeze_base(transformer)
    takes = transformer.config.cross_attention_dim
    if (takes is not None) != config.has_text:
        raise ValueError(
            "the transformer has no cross-attention: leave out train_text_encoder and text_encoder, or add_cross_attention"
            if takes is None
            else "the transformer attends to text: give train_text_encoder: true or text_encoder"
        )
    if width is not None and width != takes:
        raise ValueError(
            f"the text encoder is {width} wide, the transformer takes {takes}: choose another text_preset"
        )
    transformer.config.z_loss_weight = config.z_loss_weight
    if config.gradient_checkpointing:
        transformer.gradient_checkpointing_enable()
    return ARWorldModel(transformer, text_encoder)


def preset_config(preset: str, codebook_size: int | None = None) -> CosmosARConfig:
    """A preset, with the rows of another codebook where one is given."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there is {', '.join(PRESETS)}")
    settings = dict(PRESETS[preset])
    if codebook_size is not None:
        settings |= dict(vocab_size=codebook_size, embedding_size=codebook_size)
        if settings.get("bov_token_id") is not None:
            settings |= dict(bov_token_id=codebook_size, embedding_size=codebook_size + 64)
    return CosmosARConfig(**settings)


def extend_context(transformer: CosmosARForCausalLM, scale: float):
    """Frequencies for a longer grid; the grid so far is what they were trained for."""
    config = transformer.config
    if config.yarn_scale is not None:
        raise ValueError(f"the model is extended already (yarn_scale={config.yarn_scale})")
    config.yarn_scale, config.yarn_original_shape = float(scale), list(config.latent_shape)


@torch.no_grad()
def add_cross_attention(base: CosmosARForCausalLM, width: int) -> CosmosARForCausalLM:
    """The base with cross-attention whose output is zero, so that it computes what the base does; checked."""
    if base.config.cross_attention_dim is not None:
        raise ValueError("add_cross_attention: the model in init_from has cross-attention already")
    settings = deepcopy(base.config)
    settings.cross_attention_dim = width
    model = CosmosARForCausalLM(settings).to(base.dtype)
    missing, unknown = model.load_state_dict(base.state_dict(), strict=False)
    if unknown or any("cross_attn" not in name for name in missing):
        raise ValueError(f"the base does not fit: unknown {unknown}, missing {missing}")
    for layer in model.model.layers:
        if layer.cross_attn is not None:
            layer.cross_attn.o_proj.weight.zero_()
    check_equals_base(model, base)
    return model


@torch.no_grad()
def check_equals_base(model: CosmosARForCausalLM, base: CosmosARForCausalLM):
    """TrainingError unless a model with new cross-attention gives the logits of its base, to the bit."""
    if next(base.parameters()).is_meta:
        return
    config = base.config
    count = min(config.num_positions(), 64)
    tokens = (torch.arange(count)[None] * 7919 % config.codebook_size).to(base.device)
    text = (
        torch.linspace(-1, 1, 3 * model.config.cross_attention_dim, device=base.device).view(1, 3, -1).to(base.dtype)
    )
    a = model.eval()(tokens, encoder_hidden_states=text, use_cache=False).logits
    b = base.eval()(tokens, use_cache=False).logits
    if not torch.equal(a, b):
        raise TrainingError(f"step 0 of the text stage is not its base (off by {(a - b).abs().max():.3g})")


def freeze_base(transformer: CosmosARForCausalLM):
    """Train what the published text stage trains: cross-attention with its norm, embeddings, final norm and output."""
    transformer.requires_grad_(False)
    transformer.lm_head.requires_grad_(True)
    transformer.model.embed_tokens.requires_grad_(True)
    transformer.model.norm.requires_grad_(True)
    for name, parameter in transformer.named_parameters():
        if ".cross_attn" in name:
            parameter.requires_grad_(True)


# ---- data ---------------------------------------------------------------------------------------------------------


class TokenBatches:
    """Cached windows -> what `ARWorldModel` takes: tokens (`<bov>` in front where there is one), labels, text."""

    def __init__(self, config: AutoregressiveConfig, model_config: CosmosARConfig, texts: Texts | None):
        self.config, self.model_config, self.texts = config, model_config, texts

    def collate(self, samples: list[dict]) -> dict:
        codes = torch.stack([sample["indices"] for sample in samples])
        shape = tuple(codes.shape[1:])
        if self.config.condition_frames >= shape[0]:
            raise ValueError(
                f"condition_frames={self.config.condition_frames} leaves nothing to learn of {shape[0]} latent frames"
            )
        tokens = codes.flatten(1)
        if self.model_config.bov_token_id is not None:
            tokens = torch.cat([tokens.new_full((len(tokens), 1), self.model_config.bov_token_id), tokens], dim=1)
        labels = tokens.clone()
        given = ignored_tokens(
            self.model_config, shape, self.config.condition_frames, as_reference=not self.config.bov_hides_target
        )
        labels[:, :given] = IGNORED
        batch = {"tokens": tokens, "labels": labels, "latent_shape": shape}
        if self.texts is not None:
            batch["text"] = self.texts.encode([sample["caption"] for sample in samples])
        return batch


# ---- loss ---------------------------------------------------------------------------------------------------------


class AutoregressiveLoss:
    """`compute_loss` of `fit`: cross-entropy of the next code and the z loss."""

    def __init__(self, config: AutoregressiveConfig):
        self.config = config

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        text, keep, tokens = batch.get("text"), None, batch["tokens"]
        if text is not None and self.config.text_dropout:
            keep = (torch.rand(len(tokens), device=tokens.device) >= self.config.text_dropout).float()
        loss = model(tokens, batch["labels"], batch["latent_shape"], text, keep, batch.get("actions"))
        return loss.total, {"cross_entropy": loss.cross_entropy.detach(), "z_loss": loss.z_loss.detach()}


@torch.no_grad()
def validate(model: ARWorldModel, batches: TokenBatches, datasets: dict[str, LatentDataset], batch_size: int) -> dict:
    """Perplexity on every validation set; with text also how much worse it is with the captions of others."""
    device, figures = next(model.parameters()).device, {}
    for name, dataset in datasets.items():
        sums = {"": [0.0, 0], "_shuffled_text": [0.0, 0]}
        for batch in in_order(dataset, batch_size, batches.collate):
            batch = to_device(batch, device)
            texts = {"": batch.get("text")}
            if texts[""] is not None and len(batch["tokens"]) > 1:
                texts["_shuffled_text"] = _roll(texts[""])
            for kind, text in texts.items():
                inputs = (batch["tokens"], batch["labels"], batch["latent_shape"], text)
                loss = model(*inputs, actions=batch.get("actions"))
                sums[kind][0] += float(loss.cross_entropy) * int(loss.targets)
                sums[kind][1] += int(loss.targets)
        figures |= {
            f"{name}_perplexity{kind}": torch.tensor(total / count).exp().item()
            for kind, (total, count) in sums.items()
            if count
        }
    return figures


def _roll(text):
    """Every sample's text to its neighbour."""
    return tuple(t.roll(1, 0) for t in text) if isinstance(text, tuple) else text.roll(1, 0)


@torch.no_grad()
def check_reload(model: ARWorldModel, again: ARWorldModel, batch: dict):
    """Compare the losses of two models; TrainingError where they differ."""
    device, training = next(model.parameters()).device, model.training
    batch = to_device(batch, device)
    inputs = (batch["tokens"], batch["labels"], batch["latent_shape"], batch.get("text"))
    a, b = (m.to(device).eval()(*inputs, actions=batch.get("actions")).total.float() for m in (model, again))
    model.train(training)
    if not torch.allclose(a, b, atol=1e-4):
        raise TrainingError(f"the saved model's loss is {b:.6g}, the trained one's {a:.6g}")
