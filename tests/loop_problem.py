"""A regression with random draws, small enough to run `fit` often; also run as a program, by two processes."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from cosmos_hf.training.config import RunConfig
from cosmos_hf.training.loop import fit

SETTINGS = dict(
    data=["memory"],
    learning_rate=0.05,
    warmup_steps=2,
    batch_size=2,
    gradient_accumulation=2,
    log_every=1,
    checkpoint_every=100,
    progress=False,
)


class Numbers(Dataset):
    """x -> 2 x - 1, with `draw` as another input that the answer does not depend on."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        number, draw = index
        return {"x": torch.tensor([float(number), draw % 1000 / 1000]), "y": torch.tensor([2.0 * number - 1])}


def collate(samples):
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def noisy_loss(model, batch):
    error = model(batch["x"] + 0.1 * torch.randn_like(batch["x"])) - batch["y"]
    return error.square().mean(), {"mean_error": error.detach().mean()}


def plain_loss(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean(), {}


def export(model, folder):
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "model.pt")


def run(folder, loss=noisy_loss, **settings):
    torch.manual_seed(1)
    model = nn.Linear(2, 1)
    config = RunConfig(output_dir=str(folder), **(SETTINGS | settings))
    fit(model, loss, Numbers(), config, collate, export)
    return model


def losses(folder):
    """Loss of each step, in the order in which they were logged."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    run(root / "straight", max_steps=6)
    run(root / "cut", max_steps=3)
    run(root / "cut", max_steps=6)
    run(root / "plain", loss=plain_loss, max_steps=3)
