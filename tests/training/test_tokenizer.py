"""Training of the video tokenizer on six tiny clips."""

import json

import pytest
import torch

from cosmos_hf.data.clips import ClipDataset, collate_clips
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.training.config import TokenizerConfig
from cosmos_hf.training.loop import TrainingError, fit
from cosmos_hf.training.losses import ReconstructionLoss
from cosmos_hf.training.tokenizer import (
    build_dataset,
    build_model,
    compute_latent_stats,
    export,
    validate,
)


def settings(clips, folder, **more):
    base = dict(data=[str(clips)], output_dir=str(folder), preset="tiny", num_frames=5, batch_size=2, progress=False)
    return TokenizerConfig(**(base | dict(warmup_steps=2, learning_rate=5e-3, log_every=1) | more))


def run(config):
    torch.manual_seed(0)
    model, dataset = build_model(config), build_dataset(config)
    fit(model, ReconstructionLoss(config), dataset, config, collate_clips, export)
    return model


def test_loss_falls_on_one_batch(clips, tmp_path):
    config = settings(clips, tmp_path)
    batch = collate_clips([build_dataset(config)[i, 0] for i in range(2)])
    model, loss_of = build_model(config), ReconstructionLoss(config)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    history = []
    for _ in range(25):
        loss, logs = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]
    assert set(logs) >= {"l1", "psnr"}


def test_resume_is_exact(clips, tmp_path):
    straight = run(settings(clips, tmp_path / "straight", max_steps=4, crop_height=16, crop_width=16))
    run(settings(clips, tmp_path / "cut", max_steps=2, crop_height=16, crop_width=16))
    cut = run(settings(clips, tmp_path / "cut", max_steps=4, crop_height=16, crop_width=16))
    for a, b in zip(straight.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("straight", "cut")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]


def test_export_loads_and_init_from_continues(clips, tmp_path):
    config = settings(clips, tmp_path, max_steps=2, ema_width=0)
    model = run(config)
    again = build_model(settings(clips, tmp_path, init_from=str(tmp_path / "export")))
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    torch.testing.assert_close(model(video).sample, again(video).sample)


def test_export_that_does_not_reload_is_an_error(tmp_path, monkeypatch):
    model, other = (CosmosVideoTokenizer(temporal_compression=4, channels=8, num_res_blocks=1) for _ in range(2))
    monkeypatch.setattr(CosmosVideoTokenizer, "from_pretrained", lambda folder: other)
    with pytest.raises(TrainingError, match="does not compute what the trained one does"):
        export(model, tmp_path)


def test_statistics_of_latents(clips, tmp_path):
    model = build_model(settings(clips, tmp_path))
    dataset = ClipDataset(clips, num_frames=9, random=False)
    compute_latent_stats(model, dataset)
    latents = [model.encode(dataset[i]["video"][None] / 127.5 - 1).latents for i in range(len(dataset))]
    normal = model.normalize(torch.cat(latents))
    torch.testing.assert_close(normal.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3, 4), correction=0), torch.ones(16), atol=1e-3, rtol=0)
    model.save_pretrained(tmp_path / "model")
    assert CosmosVideoTokenizer.from_pretrained(tmp_path / "model").config.latents_std == model.config.latents_std
    compute_latent_stats(model, dataset, per_frame=True)
    normal = model.normalize(torch.cat(latents))
    torch.testing.assert_close(normal.mean((0, 3, 4)), torch.zeros(16, 3), atol=1e-4, rtol=0)


def test_validation_names_its_sets(clips, tmp_path):
    config = settings(clips, tmp_path, val_data=[str(clips)], val_clips=2)
    figures = validate(build_model(config), config)
    assert set(figures) == {f"{clips.name}_psnr", f"{clips.name}_ssim"}


@pytest.mark.parametrize(
    ("more", "message"),
    [(dict(crop_height=16), "crop_height and crop_width together"), (dict(preset="huge"), "unknown preset 'huge'")],
)
def test_mistakes_are_refused(clips, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        build_model(settings(clips, tmp_path, **more))
