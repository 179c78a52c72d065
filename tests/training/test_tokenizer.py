"""Training of the video tokenizer on six tiny clips."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_hf.data.clips import ClipDataset, collate_clips
from cosmos_hf.data.video import to_float
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.models.autoencoder_cosmos_image import CosmosImageTokenizer
from cosmos_hf.models.tokenizer_kinds import load_tokenizer
from cosmos_hf.training.config import TokenizerConfig
from cosmos_hf.training.loop import TrainingError, fit
from cosmos_hf.training.losses import ReconstructionLoss
from cosmos_hf.training.tokenizer import (
    build_dataset,
    build_loss,
    build_model,
    compute_latent_stats,
    export,
    validate,
)

SCRIPT = Path(__file__).parents[2] / "training" / "train_tokenizer.py"


def settings(clips, folder, **more):
    base = dict(data=[str(clips)], output_dir=str(folder), preset="tiny", num_frames=5, batch_size=2, progress=False)
    return TokenizerConfig(**(base | dict(warmup_steps=2, learning_rate=5e-3, log_every=1) | more))


def run(config):
    torch.manual_seed(0)
    model, dataset = build_model(config), build_dataset(config)
    fit(model, build_loss(config, model), dataset, config, collate_clips, export)
    return model


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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


@pytest.fixture
def discrete(tmp_path):
    torch.manual_seed(0)
    tokenizer = CosmosVideoTokenizer(**PRESETS["tiny"], quantizer="fsq", latent_channels=4, fsq_levels=(8, 5, 5, 5))
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_frozen_encoder_keeps_weights_latents_and_statistics_to_the_bit(clips, tmp_path):
    """Through the script, which else computes new statistics."""
    base = CosmosVideoTokenizer(**PRESETS["tiny"], latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    base.save_pretrained(tmp_path / "base")
    flags = dict(data=clips, init_from=tmp_path / "base", output_dir=tmp_path / "run", num_frames=5, max_steps=3)
    flags |= dict(
        freeze_encoder=True, weight_decay=0.1, learning_rate=1e-2, warmup_steps=1, progress=False, log_every=1
    )
    main = runpy.run_path(str(SCRIPT))["main"]
    main([f"--{name}={value}" for name, value in flags.items()])
    again = CosmosVideoTokenizer.from_pretrained(tmp_path / "run" / "export")
    ours, theirs = again.state_dict(), base.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert torch.equal(again.encode(video).latents, base.eval().encode(video).latents)
    assert torch.equal(*(model.normalize(base.encode(video).latents) for model in (again, base)))


def test_noise_on_the_latents_reaches_the_decoder_only_in_training(clips, tmp_path, discrete):
    model = CosmosVideoTokenizer(**PRESETS["tiny"], latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    model.save_pretrained(tmp_path / "continuous")
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    decoded = []
    model.decode = lambda latents, decode=model.decode: decoded.append(latents) or decode(latents)
    torch.manual_seed(0)
    assert torch.equal(model(video).sample, model(video, latent_noise=0.0).sample)
    model(video, latent_noise=0.5)
    noise = (decoded[2] - decoded[0]).flatten(1).std(1) / 2
    assert (noise > 0.01).all() and (noise < 0.5 * 1.1).all() and abs(noise[0] - noise[1]) > 0.01
    config = settings(
        clips,
        tmp_path / "run",
        init_from=str(tmp_path / "continuous"),
        freeze_encoder=True,
        latent_noise=0.5,
        max_steps=3,
    )
    run(config)
    with pytest.raises(ValueError, match="latent_noise is for continuous tokenizers"):
        build_model(replace(config, init_from=str(discrete)))
    with pytest.raises(ValueError, match="belongs to freeze_encoder"):
        replace(config, freeze_encoder=False)


def test_discrete_run_tells_how_its_codes_are_used(clips, tmp_path, discrete):
    config = settings(
        clips, tmp_path / "run", init_from=str(discrete), max_steps=3, val_data=[str(clips)], val_clips=2
    )
    model = run(config)
    for number, line in enumerate(read_log(tmp_path / "run"), 1):
        assert line["code_usage"] + line["dead_codes"] == pytest.approx(1, abs=1e-5)
        assert 0 < line["code_usage"] <= number * 2 * 2 * 16 / 1000  # steps, clips, latent frames, positions
        assert 0 < line["level_entropy_3"] <= 1 and 0 < line["code_bits"] < 10
    figures = validate(model, config)
    indices = torch.cat([model.encode(video).indices for video in videos(clips)])
    assert figures[f"{clips.name}_code_usage"] == pytest.approx(len(indices.unique()) / 1000)


def videos(clips):
    dataset = ClipDataset(clips, num_frames=5, random=False)
    return [to_float(dataset[i]["video"])[None] for i in range(2)]


def test_image_tokenizer_on_frames_and_on_pictures(clips, tmp_path):
    """Frames of clips, then pictures, through the script; the result is an image tokenizer with statistics."""
    for i in range(3):
        Image.effect_noise((48, 40), 80).convert("RGB").save(tmp_path / f"{i}.png")
    main = runpy.run_path(str(SCRIPT))["main"]
    for name, data, more in (
        ("frames", clips, dict(num_frames=5, images_per_clip=2)),
        ("pictures", tmp_path, dict(num_frames=1, crop_height=32, crop_width=32)),
    ):
        flags = dict(data=data, output_dir=tmp_path / name, preset="tiny", kind="image", max_steps=2, progress=False)
        flags |= dict(batch_size=2, log_every=1) | more
        main([f"--{key}={value}" for key, value in flags.items()])
        tokenizer = load_tokenizer(tmp_path / name / "export")
        assert isinstance(tokenizer, CosmosImageTokenizer) and len(tokenizer.config.latents_std) == 16
        assert len(read_log(tmp_path / name)) == 2
    config = settings(
        clips, tmp_path, init_from=str(tmp_path / "frames" / "export"), val_data=[str(clips)], val_clips=1
    )
    assert validate(load_tokenizer(tmp_path / "frames" / "export"), config)[f"{clips.name}_psnr"] > 3
    with pytest.raises(ValueError, match="latents of an image tokenizer have no frames"):
        compute_latent_stats(load_tokenizer(tmp_path / "frames" / "export"), [], per_frame=True)


def test_joint_batches_of_clips_and_pictures(clips, tmp_path):
    for i in range(3):
        Image.effect_noise((48, 40), 80).convert("RGB").save(tmp_path / f"{i}.png")
    crop = dict(crop_height=16, crop_width=16)
    config = settings(clips, tmp_path / "run", image_data=[str(tmp_path)], image_share=0.5, images_per_clip=3, **crop)
    batch = collate_clips([build_dataset(config)[i, i] for i in range(2)])
    assert batch["pictures"].shape == (2, 3, 3, 16, 16)
    model, loss = build_model(config), ReconstructionLoss(config)
    assert {loss.draw(batch).shape for _ in range(20)} == {(2, 3, 5, 16, 16), (6, 3, 1, 16, 16)}
    assert torch.isfinite(loss(model, batch)[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(crop_height=16), "crop_height and crop_width together"),
        (dict(preset="huge"), "unknown preset 'huge'; video: cv4x8x8.* image: ci8x8"),
        (dict(preset="ci8x8", kind="video"), "unknown preset 'ci8x8' of kind video"),
    ],
)
def test_mistakes_are_refused(clips, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        build_model(settings(clips, tmp_path, **more))


# ---- a discrete tokenizer from a continuous one --------------------------------------------------------------------------


def test_discrete_start_keeps_what_the_codes_can_hold(clips, tmp_path):
    """16 latent channels of noise-like clips in 4 codes: far from exact, and better than the constant of equal size."""
    torch.manual_seed(0)
    base = run(settings(clips, tmp_path / "base", max_steps=12))
    export(base, tmp_path / "base" / "export")
    config = settings(clips, tmp_path / "run", init_from=str(tmp_path / "base" / "export"), fsq_levels=[5, 8, 5, 5])
    model, video = build_model(config), to_float(build_dataset(config)[0, 0]["video"])[None]
    assert model.config.quantizer == "fsq" and model.config.latent_channels == 4
    coded = model.encode(video)
    assert coded.indices.unique().numel() > 5 and model.encoder.conv_in[0].weight.equal(base.encoder.conv_in[0].weight)

    def error(sample):
        return (sample - video).square().mean()

    continuous, constant = base.decode(base.encode(video).latents), base.decode(0 * base.encode(video).latents)
    assert error(continuous.sample) < error(model.decode(coded.latents).sample) < error(constant.sample)
    model.save_pretrained(tmp_path / "discrete")
    with pytest.raises(ValueError, match="for a discrete one"):
        build_model(replace(config, init_from=str(tmp_path / "discrete")))
    with pytest.raises(ValueError, match="at most as many levels as latent channels"):
        build_model(replace(config, fsq_levels=[5] * 17))
    with pytest.raises(ValueError, match="fsq_levels needs init_from"):
        replace(config, init_from="")
