"""Training of Medusa heads (arXiv 2501.03575, section 5.2.4): heads, the last layers and the output layer; the rest rests."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..models.ar_cosmos import CosmosARForCausalLM
from ..models.ar_loss import IGNORED, chunked_divergence, chunked_loss, ignored_tokens
from ..models.medusa_cosmos import speculative_generate
from .autoregressive import ARWorldModel, AutoregressiveConfig, TokenBatches
from .cache import LatentDataset, model_hash, save_window


@dataclass
class MedusaConfig(AutoregressiveConfig):
    family: str = field(default="medusa", metadata={"help": "heads of an autoregressive model"})
    medusa_num_heads: int = field(default=3, metadata={"help": "heads; the paper tries 0, 3, 6 and 9"})
    train_last_layers: int = field(default=2, metadata={"help": "layers trained along; the paper's best recipe: 2"})
    train_output: bool = field(default=True, metadata={"help": "train the final norm and the output layer along"})
    head_weight: float = field(default=1.0, metadata={"help": "weight of the heads' losses against the next code's"})
    head_decay: float = field(default=0.8, metadata={"help": "each further head counts so much less"})
    own_videos: int = field(
        default=0,
        metadata={
            "help": "learn from so many videos that the network itself continues greedily from the clips' first frames, and stay "
            "near its distribution on them and on as many clips (self-distillation); 0: learn from the clips"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.train_text_encoder or self.add_cross_attention or self.yarn_scale:
            raise ValueError("train_text_encoder, add_cross_attention and yarn_scale are stages of pretrain.py")
        if not self.init_from:
            raise ValueError("Medusa heads belong to a trained model: give init_from, the folder of its pipeline")
        if self.medusa_num_heads < 1 or self.train_last_layers < 0:
            raise ValueError("medusa_num_heads must be at least 1, train_last_layers must be >= 0")
        if self.own_videos < 0 or (self.own_videos and not self.condition_frames):
            raise ValueError("own_videos must be >= 0, and needs condition_frames, from which they are continued")


class MedusaWorldModel(ARWorldModel):
    """Losses of the next code and of every head's guess, through one `forward` for accelerate's wrappers.

    base: the network as it was, where what is trained shall keep its distribution. It is no part of what is saved. Rows of which
    no label is a target are no concern of the heads.
    """

    def __init__(self, transformer: CosmosARForCausalLM, base: CosmosARForCausalLM | None = None):
        super().__init__(transformer)
        self._base = None if base is None else [ARWorldModel(base.requires_grad_(False))]  # in a list: not a submodule

    def forward(self, tokens, labels, latent_shape, text=None, keep=None):
        """-> (of the next code the loss, and its cross-entropy or its divergence from the base in nats; `ARLoss` of every head)."""
        states, network = self.states(tokens, latent_shape, text, keep), self.transformer
        if self._base is None:
            loss = chunked_loss(network.lm_head, states, labels, network.config.z_loss_weight)
            next_code, figure = loss.total, loss.cross_entropy
        else:
            base = self._base[0].to(states.device)
            with torch.no_grad():
                base_states = base.states(tokens, latent_shape, text, keep)
            next_code = figure = chunked_divergence(network.lm_head, states, base.transformer.lm_head, base_states)
        own = (labels != IGNORED).any(1)
        states, labels = states[own], labels[own]
        heads = [
            chunked_loss(network.lm_head, head(states), labels, 0.0, shift=i + 2)
            for i, head in enumerate(network.medusa_heads)
        ]
        return next_code, figure.detach(), heads


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
    return MedusaWorldModel(model, base if config.own_videos else None)


def add_heads(base: CosmosARForCausalLM, count: int) -> CosmosARForCausalLM:
    """The same model with `count` new heads, those it has are replaced."""
    settings = type(base.config)(**base.config.to_dict() | {"medusa_num_heads": count})
    model = CosmosARForCausalLM(settings).to(base.dtype)
    state = {key: value for key, value in base.state_dict().items() if not key.startswith("medusa_heads.")}
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or any(not name.startswith("medusa_heads.") for name in missing):
        raise ValueError(f"the base does not fit: unknown {unknown}, missing {missing}")
    return model


class OwnVideos(Dataset):
    """Pairs of a video that the network itself made and, drawn anew each time, a clip. Heads learn to guess on the one; on both the
    network stays what it was, or else it would forget what it does not make itself."""

    def __init__(self, own: LatentDataset, clips: LatentDataset):
        self.own, self.clips, self.kinds = own, clips, own.kinds

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[dict, dict]:
        index, draw = index if isinstance(index, tuple) else (index, 0)
        return self.own[index], self.clips[draw % len(self.clips), draw]


class MedusaBatches(TokenBatches):
    def collate(self, samples: list[dict] | list[tuple[dict, dict]]) -> dict:
        """Windows, or pairs of `OwnVideos`: then own videos first, and behind them the clips, of which nothing is a target."""
        if isinstance(samples[0], dict):
            return super().collate(samples)
        own, clips = zip(*samples, strict=True)
        batch = super().collate([*own, *clips])
        batch["labels"][len(own) :] = IGNORED
        return batch


@torch.no_grad()
def own_videos(
    network: CosmosARForCausalLM, data: LatentDataset, batches: TokenBatches, rank: int = 0, world_size: int = 1
) -> OwnVideos:
    """What the network makes, code by most probable code, of the first latent frames of the first `own_videos` clips, beside clips.

    Kept under `cache_dir` by the content of network and clip, what is given of it, and the text where one is read. Process `rank`
    of `world_size` generates its share, and the caller lets all finish before training.
    """
    config, clips = batches.config, data
    data = data.first(config.own_videos)
    folder = Path(config.cache_dir) / f"own-{model_hash(network)}"
    folder.mkdir(parents=True, exist_ok=True)
    windows = []
    for i in tqdm(range(len(data)), desc="own videos", unit="clip", disable=not config.progress or rank > 0):
        source, window = next(iter(data.windows[i].items()))
        told = f"{source[0].stem} {config.condition_frames} {data.captions[i] if batches.texts else ''}"
        path = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"
        windows.append({(path,): window})
        if path.exists() or i % world_size != rank:
            continue
        sample = data[i]
        batch = batches.collate([sample])
        tokens, shape = batch["tokens"].to(network.device), batch["latent_shape"]
        given = ignored_tokens(network.config, shape, config.condition_frames)
        text = {"encoder_hidden_states": batch["text"].to(network.device)} if "text" in batch else {}
        made = speculative_generate(network, tokens[:, :given], draft="previous_frame", latent_shape=shape, **text)
        codes = made.sequences[0, -shape[0] * shape[1] * shape[2] :]
        save_window(path, {"indices": codes.view(shape).int().cpu().contiguous()}, sample["fps"])
    return OwnVideos(LatentDataset(windows, data.captions, data.keys), clips)


class MedusaLoss:
    """`compute_loss` of `fit`."""

    def __init__(self, config: MedusaConfig):
        self.config = config

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        total, figure, heads = model(batch["tokens"], batch["labels"], batch["latent_shape"], batch.get("text"))
        logs = {"divergence" if self.config.own_videos else "cross_entropy": figure}
        for i, loss in enumerate(heads):
            total = total + self.config.head_weight * self.config.head_decay**i * loss.cross_entropy
            logs[f"head{i}_cross_entropy"] = loss.cross_entropy.detach()
        return total, logs
