"""Tiny models of every kind trained by `fit`; also run as a program, by two processes under DDP, FSDP2 or ZeRO.

torchrun --nproc_per_node 2 tests/scale_problem.py FOLDER DISTRIBUTED_TYPE
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import Dataset
from transformers import T5EncoderModel

from cosmos_hf.models.ar_cosmos import CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.models.transformer_cosmos import PRESETS as TRANSFORMERS
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from cosmos_hf.training import autoregressive
from cosmos_hf.training.adversarial import fit_adversarial
from cosmos_hf.training.conditioned_loss import ConditionedLoss
from cosmos_hf.training.config import TokenizerConfig
from cosmos_hf.training.diffusion import (
    DiffusionConfig,
    DiffusionLoss,
    WorldModel,
    build_model,
    build_scheduler,
    check_reload,
)
from cosmos_hf.training.loop import Run, fit
from cosmos_hf.training.losses import ReconstructionLoss
from cosmos_hf.training.posttrain import PosttrainConfig
from cosmos_hf.training.posttrain import build_model as build_posttrained
from cosmos_hf.training.tokenizer import build_model as build_tokenizer
from cosmos_hf.training.tokenizer import export

SETTINGS = dict(
    data=["memory"],
    l2_weight=1.0,
    learning_rate=2e-3,
    warmup_steps=1,
    weight_decay=0.01,
    log_every=1,
    checkpoint_every=2,
    progress=False,
)


class Videos(Dataset):
    """Moving gratings, a function of the index."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        number, _ = index
        t, y, x = torch.meshgrid(torch.arange(5), torch.arange(16), torch.arange(16), indexing="ij")
        wave = torch.sin((x * (1 + number % 3) + y + t * number) / 4)
        return {"video": ((wave + 1) * 100).to(torch.uint8).expand(3, -1, -1, -1)}


def collate(samples):
    return {"video": torch.stack([sample["video"] for sample in samples])}


def mean_brightness(model):
    """A validation figure: through `forward`, as sharded weights need it."""
    with torch.no_grad():
        return {"brightness": float(model(torch.zeros(1, 3, 5, 16, 16)).sample.mean())}


def run(folder, **settings):
    """Train; returns the losses and norms of each step, as logged."""
    torch.manual_seed(0)
    model = CosmosVideoTokenizer(**PRESETS["tiny"])
    config = TokenizerConfig(output_dir=str(folder), **(SETTINGS | settings))
    fit(model, ReconstructionLoss(config), Videos(), config, collate, export, mean_brightness)
    return read_log(folder)


class Latents(Dataset):
    """Random latents and words, a function of the index."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index[0])
        latents = torch.randn(16, 2, 4, 4, generator=generator)
        return {"latents": latents, "words": torch.randint(1, 300, (6,), generator=generator)}


def collate_latents(samples):
    words = torch.stack([sample["words"] for sample in samples])
    latents = torch.stack([sample["latents"] for sample in samples])
    return {"latents": latents, "text": (words, torch.ones_like(words)), "fps": torch.full((len(samples),), 5.0)}


def export_world(model, folder):
    """Every part, as `training/pretrain.py` saves it, read again and compared."""
    model.transformer.save_pretrained(folder / "transformer")
    model.text_encoder.save_pretrained(folder / "text_encoder")
    again = WorldModel(
        CosmosWorldTransformer3D.from_pretrained(folder / "transformer"),
        T5EncoderModel.from_pretrained(folder / "text_encoder"),
    )
    check_reload(model, again, collate_latents([Latents()[0, 0]])["text"])


def run_world(folder, **settings):
    """Train a tiny world model with its text encoder."""
    torch.manual_seed(0)
    base = dict(
        SETTINGS | settings, preset="tiny-video2world", train_text_encoder=True, text_preset="tiny", vocab_size=300
    )
    del base["l2_weight"]
    config = DiffusionConfig(output_dir=str(folder), max_condition_frames=1, **base)
    loss = DiffusionLoss(config, build_scheduler(config), takes_condition_mask=True)
    fit(build_model(config), loss, Latents(), config, collate_latents, export_world)


class Told(Latents):
    """With embedded texts: what is told of a clip, and what could have been."""

    def __getitem__(self, index):
        draw = partial(torch.randn, 6, 32, generator=torch.Generator().manual_seed(100 + index[0]))
        return super().__getitem__(index) | {"text": draw(), "other_text": draw()}


def collate_told(samples):
    texts = {name: torch.stack([sample[name] for sample in samples]) for name in ("text", "other_text")}
    return collate_latents(samples) | texts


def run_told(folder, equal: bool):
    """Post-train instructions with `contrast`, which evaluates the network twice before one backward pass."""
    torch.manual_seed(0)
    base = folder / f"base-{PartialState().process_index}"
    CosmosWorldTransformer3D(**TRANSFORMERS["tiny-video2world"]).save_pretrained(base / "transformer")
    settings = {name: value for name, value in SETTINGS.items() if name != "l2_weight"}
    config = PosttrainConfig(
        conditions=["instruction"],
        init_from=str(base),
        output_dir=str(folder),
        contrast=1.0,
        motion_weight=4.0,
        text_refiner_layers=1,
        max_steps=3,
        **settings,
    )
    model = build_posttrained(config, None)
    loss = ConditionedLoss(config, CosmosEDMScheduler(), takes_condition_mask=True)
    fit(model, loss, Told(), config, collate_told, lambda model, folder: model.transformer.save_pretrained(folder))
    if equal:
        check_equal_weights(model)


class Codes(Dataset):
    """Random codes that repeat from frame to frame, a function of the index."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        frame = torch.randint(0, 1000, (1, 4, 4), generator=torch.Generator().manual_seed(index[0]))
        return {"indices": frame.expand(3, -1, -1)}


def run_language(folder, **settings):
    """Train a tiny autoregressive world model, save it as `training/pretrain.py` does, read it again and compare."""
    torch.manual_seed(0)
    base = {name: value for name, value in (SETTINGS | settings).items() if name != "l2_weight"}
    config = autoregressive.AutoregressiveConfig(output_dir=str(folder), preset="tiny", **base)
    model = autoregressive.build_model(config, 1000, (3, 4, 4))
    batches = autoregressive.TokenBatches(config, model.transformer.config, None)

    def save(model, folder):
        model.transformer.save_pretrained(folder)
        again = autoregressive.ARWorldModel(CosmosARForCausalLM.from_pretrained(folder))
        autoregressive.check_reload(model, again, batches.collate([Codes()[0, 0]]))

    fit(model, autoregressive.AutoregressiveLoss(config), Codes(), config, batches.collate, save)


def read_log(folder) -> list[tuple]:
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def run_adversarial(folder, base):
    """Three steps, two of them with both networks; every process must end with the same weights."""
    settings = dict(init_from=str(base), adversarial_weight=0.5, discriminator_channels=8, discriminator_warmup=1)
    config = TokenizerConfig(output_dir=str(folder), max_steps=3, **settings, **SETTINGS)
    model = build_tokenizer(config)
    fit_adversarial(model, ReconstructionLoss(config), Videos(), config, collate, export)
    check_equal_weights(model)


def check_equal_weights(model):
    parts = [torch.zeros(()) for _ in range(2)]
    torch.distributed.all_gather(parts, sum(p.detach().double().sum() for p in model.parameters()).float())
    assert parts[0] == parts[1]


def note_memory():
    """Have every run leave the bytes of each process's parts of the state in `memory-<rank>.json`."""
    finish = Run.finish

    def finish_and_note(self):
        moments = [t for state in self.accelerator._optimizers[0].state.values() for t in state.values() if t.ndim]
        parts = dict(weights=self.bare.parameters(), optimizer=moments, average=self.ema.average.values())
        held = {name: sum(getattr(t, "_local_tensor", t).nbytes for t in tensors) for name, tensors in parts.items()}
        (self.folder / f"memory-{self.accelerator.process_index}.json").write_text(json.dumps(held))
        return finish(self)

    Run.finish = finish_and_note


def pretend_gpus():
    """accelerate does not take processors for FSDP: it would run DDP unsaid. The collectives themselves are gloo's."""
    AcceleratorState._reset_state()  # whose plugin keeps precision and blocks of the first model
    from accelerate.utils import DistributedType

    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    root, kind = Path(sys.argv[1]), sys.argv[2]
    if kind == "FSDP":
        pretend_gpus()
        note_memory()
    train = partial(run, batch_size=1, gradient_accumulation=2)
    train(root / "straight", max_steps=4)
    train(root / "cut", max_steps=2)
    train(root / "cut", max_steps=4)
    if kind == "MULTI_CPU":
        run_adversarial(root / "adversarial", root / "straight" / "export")
    AcceleratorState._reset_state()
    if kind == "FSDP":
        pretend_gpus()
    train(root / "bf16", max_steps=2, mixed_precision="bf16")
    if kind == "FSDP":
        pretend_gpus()
        run_world(root / "world", max_steps=4)
        run_world(root / "world_cut", max_steps=2)
        run_world(root / "world_cut", max_steps=4)
    AcceleratorState._reset_state()
    if kind == "FSDP":
        pretend_gpus()
    run_language(root / "language", max_steps=3, batch_size=1, gradient_accumulation=2)
    AcceleratorState._reset_state()
    if kind == "FSDP":
        pretend_gpus()
    run_told(root / "told", equal=kind == "MULTI_CPU")

    assert AcceleratorState().distributed_type.value == kind, AcceleratorState().distributed_type
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
