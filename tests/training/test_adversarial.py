"""The adversarial stage: the discriminator learns, warms up alone, and the run resumes exactly."""

import json

import pytest
import torch

from cosmos_hf.data.clips import collate_clips
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.training.adversarial import PatchDiscriminator, adaptive_weight, fit_adversarial, hinge_loss
from cosmos_hf.training.config import TokenizerConfig
from cosmos_hf.training.losses import ReconstructionLoss
from cosmos_hf.training.tokenizer import build_dataset, build_model, export


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    CosmosVideoTokenizer(**PRESETS["tiny"]).save_pretrained(folder)
    return folder


def run(clips, base, folder, **more):
    settings = dict(data=[str(clips)], output_dir=str(folder), init_from=str(base), num_frames=5, batch_size=2)
    settings |= dict(adversarial_weight=0.5, discriminator_channels=8, discriminator_warmup=2, warmup_steps=1)
    settings |= dict(crop_height=16, crop_width=16, log_every=1, progress=False, learning_rate=1e-3, image_share=0.3)
    config = TokenizerConfig(**(settings | more))
    torch.manual_seed(0)
    model = build_model(config)
    fit_adversarial(model, ReconstructionLoss(config), build_dataset(config), config, collate_clips, export)
    return model, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_resume_is_exact_and_the_warm_start_leaves_the_tokenizer_alone(clips, base, tmp_path):
    straight, log = run(clips, base, tmp_path / "straight", max_steps=4)
    warm, first = run(clips, base, tmp_path / "cut", max_steps=2)
    assert same(warm, CosmosVideoTokenizer.from_pretrained(base))
    assert "loss" not in first[-1] and "discriminator" in first[-1]
    resumed, _ = run(clips, base, tmp_path / "cut", max_steps=4)
    assert same(straight, resumed) and not same(straight, warm)
    again = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["discriminator"] for line in log] == [line["discriminator"] for line in again]


def test_frozen_encoder_keeps_its_latents(clips, base, tmp_path):
    model, _ = run(clips, base, tmp_path, max_steps=4, freeze_encoder=True)
    before = CosmosVideoTokenizer.from_pretrained(base)
    assert same(model.encoder, before.encoder) and same(model.quant_conv, before.quant_conv)
    assert not same(model.decoder, before.decoder)


def test_discriminator_learns_to_tell_noise_from_a_picture():
    torch.manual_seed(0)
    judge = PatchDiscriminator(8)
    assert judge(torch.rand(2, 3, 1, 32, 48)).shape == (2, 1, 1, 4, 6)  # an image
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    ramp = torch.linspace(-1, 1, 32).expand(4, 3, 3, 32, 32)
    for _ in range(30):
        loss = hinge_loss(judge(ramp + 0.02 * torch.randn_like(ramp)), judge(torch.rand_like(ramp) * 2 - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # 1 when it knows nothing


def test_adaptive_weight_is_the_ratio_of_gradients():
    layer = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    assert adaptive_weight(6 * layer.sum(), 2 * layer.sum(), layer).item() == pytest.approx(3, rel=1e-3)
    assert adaptive_weight(6 * layer.sum(), 0 * layer.sum(), layer).item() == 1e4
