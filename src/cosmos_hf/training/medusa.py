"""Training of Medusa heads (arXiv 2501.03575, section 5.2.4): heads, the last layers and the output layer; the rest rests."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..models.ar_cosmos import CosmosARForCausalLM
from ..models.ar_loss import chunked_loss
from .autoregressive import ARWorldModel, AutoregressiveConfig


@dataclass
class MedusaConfig(AutoregressiveConfig):
    family: str = field(default="medusa", metadata={"help": "heads of an autoregressive model"})
    medusa_num_heads: int = field(default=3, metadata={"help": "heads; the paper tries 0, 3, 6 and 9"})
    train_last_layers: int = field(default=2, metadata={"help": "layers trained along; the paper's best recipe: 2"})
    train_output: bool = field(default=True, metadata={"help": "train the final norm and the output layer along"})
    head_weight: float = field(default=1.0, metadata={"help": "weight of the heads' losses against the next code's"})
    head_decay: float = field(default=0.8, metadata={"help": "each further head counts so much less"})

    def __post_init__(self):
        super().__post_init__()
        if self.train_text_encoder or self.add_cross_attention or self.yarn_scale:
            raise ValueError("train_text_encoder, add_cross_attention and yarn_scale are stages of pretrain.py")
        if not self.init_from:
            raise ValueError("Medusa heads belong to a trained model: give init_from, the folder of its pipeline")
        if self.medusa_num_heads < 1 or self.train_last_layers < 0:
            raise ValueError("medusa_num_heads must be at least 1, train_last_layers must be >= 0")


class MedusaWorldModel(ARWorldModel):
    """Losses of the next code and of every head's guess, through one `forward` for accelerate's wrappers."""

    def forward(self, tokens, labels, latent_shape, text=None, keep=None):
        """-> list of `ARLoss`: of the next code, then of each head."""
        states, network = self.states(tokens, latent_shape, text, keep), self.transformer
        weight = network.config.z_loss_weight
        losses = [chunked_loss(network.lm_head, states, labels, weight)]
        for i, head in enumerate(network.medusa_heads):
            losses.append(chunked_loss(network.lm_head, head(states), labels, 0.0, shift=i + 2))
        return losses


def build_model(config: MedusaConfig) -> MedusaWorldModel:
    """The pipeline's transformer with new heads; everything but heads, last layers and output is frozen."""
    base = CosmosARForCausalLM.from_pretrained(Path(config.init_from) / "transformer")
    if (base.config.cross_attention_dim is not None) != bool(config.text_encoder):
        raise ValueError(
            "give text_encoder, the pipeline's own folder, if and only if the transformer attends to text"
        )
    if config.train_last_layers > len(base.model.layers):
        raise ValueError(
            f"train_last_layers={config.train_last_layers}, the model has {len(base.model.layers)} layers"
        )
    model = add_heads(base, config.medusa_num_heads)
    model.requires_grad_(False)
    last = list(model.model.layers)[len(model.model.layers) - config.train_last_layers :]
    ends = [model.lm_head, model.model.norm] if config.train_output else []
    for part in (*model.medusa_heads, *last, *ends):
        part.requires_grad_(True)
    return MedusaWorldModel(model)


def add_heads(base: CosmosARForCausalLM, count: int) -> CosmosARForCausalLM:
    """The same model with `count` new heads, those it has are replaced."""
    settings = type(base.config)(**base.config.to_dict() | {"medusa_num_heads": count})
    model = CosmosARForCausalLM(settings).to(base.dtype)
    state = {key: value for key, value in base.state_dict().items() if not key.startswith("medusa_heads.")}
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or any(not name.startswith("medusa_heads.") for name in missing):
        raise ValueError(f"the base does not fit: unknown {unknown}, missing {missing}")
    return model


class MedusaLoss:
    """`compute_loss` of `fit`."""

    def __init__(self, config: MedusaConfig):
        self.config = config

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        losses = model(batch["tokens"], batch["labels"], batch["latent_shape"], batch.get("text"))
        total, logs = losses[0].total, {"cross_entropy": losses[0].cross_entropy.detach()}
        for i, loss in enumerate(losses[1:]):
            total = total + self.config.head_weight * self.config.head_decay**i * loss.cross_entropy
            logs[f"head{i}_cross_entropy"] = loss.cross_entropy.detach()
        return total, logs
