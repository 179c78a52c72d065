"""Training of a diffusion decoder on six tiny clips: pairs of codes and latents, loss, resumption, export."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from cosmos_hf import CosmosAutoregressivePipeline, CosmosDiffusionDecoderPipeline
from cosmos_hf.conditioning.codes import CodeGrid
from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.video import to_float
from cosmos_hf.models.ar_cosmos import PRESETS as AUTOREGRESSIVE
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.models.transformer_cosmos import PRESETS as SIZES
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.training.decoder import (
    DecoderConfig,
    DecoderLoss,
    PairBatches,
    PairedDataset,
    build_model,
    build_pairs,
    build_scheduler,
    load_tokenizers,
    validate_decoder,
)
from cosmos_hf.training.diffusion import WorldModel, check_reload
from cosmos_hf.training.loop import TrainingError, fit
from cosmos_hf.training.text import build_text_encoder, train_vocabulary
from cosmos_hf.training.tokenizer import compute_latent_stats
from loop_problem import losses

SCRIPT = Path(__file__).parents[2] / "training" / "train_decoder.py"


@pytest.fixture(scope="module")
def tokenizers(clips, tmp_path_factory):
    """Both with random weights; the discrete one wide enough that clips have different codes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizers")
    continuous = CosmosVideoTokenizer(**PRESETS["tiny"]).eval()
    compute_latent_stats(continuous, ClipDataset(clips, num_frames=9, random=False))
    continuous.save_pretrained(folder / "vae")
    discrete = CosmosVideoTokenizer(**PRESETS["tiny-discrete"]).eval()
    discrete.quant_conv.weight.data.mul_(20)
    discrete.save_pretrained(folder / "codes")
    return dict(vae=str(folder / "vae"), codes=str(folder / "codes"))


@pytest.fixture
def make(clips, tokenizers, tmp_path):
    def settings(**more):
        base = dict(data=[str(clips)], output_dir=str(tmp_path / "run"), preset="tiny-diffusion-decoder", num_frames=9)
        base |= dict(batch_size=3, warmup_steps=2, learning_rate=2e-3, log_every=1, progress=False, **tokenizers)
        return DecoderConfig(**(base | dict(cache_dir=str(tmp_path / "cache")) | more))

    return settings


def assemble(config):
    torch.manual_seed(0)
    vae, codes, grid = load_tokenizers(config)
    data, validation = build_pairs(config, vae, codes, grid)
    model = build_model(config, codes.fsq.codebook_size)
    batches = PairBatches(config, None, model.transformer.config.text_embed_dim)
    return model, DecoderLoss(config, build_scheduler(config), False), data, batches, validation


def train(config):
    model, loss, data, batches, _ = assemble(config)
    fit(model, loss, data, config, batches.collate, export=lambda model, folder: None)
    return model


# ---- pairs ---------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_same_window_by_both_tokenizers(make):
    config = make(window_starts=[0, 4])
    _, _, data, batches, _ = assemble(config)
    vae, codes, _ = load_tokenizers(config)
    clip = ClipDataset(config.data, num_frames=None, random=False)[2]["video"]
    seen = set()
    for draw in range(8):
        sample = data[2, draw]
        for start in (0, 4):
            video = to_float(clip[:, start : start + 9])[None]
            if torch.equal(sample["condition"][0], codes.encode(video).indices[0]):
                wanted = vae.normalize(vae.encode(video).latents)[0]
                torch.testing.assert_close(sample["latents"], wanted, atol=2e-3, rtol=2e-3)
                seen.add(start)
    assert seen == {0, 4}
    batch = batches.collate([data[0], data[1]])
    assert batch["latents"].shape == (2, 16, 3, 4, 4) and batch["condition"].shape == (2, 1, 3, 4, 4)
    assert batch["text"].shape == (2, 1, 32) and batch["text"].abs().max() == 0
    # both tokenizers have a folder of their own, and nothing is coded again
    folders = sorted(Path(config.cache_dir).iterdir())
    before = {path: path.stat().st_mtime_ns for path in Path(config.cache_dir).rglob("*.safetensors")}
    assert len(folders) == 2 and len(before) == 2 * 12
    assemble(config)
    assert {path: path.stat().st_mtime_ns for path in Path(config.cache_dir).rglob("*.safetensors")} == before


def test_a_sample_is_cut_anywhere_and_stays_aligned(make):
    _, _, whole, _, _ = assemble(make(num_frames=13))
    _, _, cut, _, validation = assemble(make(num_frames=13, window_latent_frames=2, val_data=make().data))
    starts = set()
    for draw in range(12):
        sample = cut[1, draw]
        for start in range(3):
            if torch.equal(sample["latents"], whole[1]["latents"][:, start : start + 2]):
                assert torch.equal(sample["condition"], whole[1]["condition"][:, start : start + 2])
                starts.add(start)
    assert starts == {0, 1, 2}
    (held_out,) = validation.values()
    assert torch.equal(held_out[1, 5]["latents"], whole[1]["latents"][:, :2])  # always the same in validation


def test_coarser_codes_are_spread_over_the_latents(make, clips, tmp_path):
    """Codes of 8x16x16 beside latents of 4x8x8."""
    torch.manual_seed(0)
    coarse = PRESETS["tiny-discrete"] | dict(spatial_compression=16, temporal_compression=8)
    CosmosVideoTokenizer(**coarse).save_pretrained(tmp_path / "coarse")
    _, _, data, batches, _ = assemble(make(codes=str(tmp_path / "coarse")))
    sample = data[0]
    assert sample["latents"].shape == (16, 3, 4, 4) and sample["condition"].shape == (1, 3, 2, 2)
    assert torch.equal(sample["condition"][0, 1], sample["condition"][0, 2])  # frames 1 to 8 are one code frame
    with pytest.raises(ValueError, match="they do not cover the same pixels"):
        PairedDataset(data.latents, data.codes, CodeGrid(2, 1))


def test_other_windows_are_no_pairs(make):
    a = assemble(make())[2]
    b = assemble(make(window_starts=[4]))[2]
    with pytest.raises(ValueError, match="did not code the same windows"):
        PairedDataset(a.latents, b.codes, a.grid)


# ---- a run ---------------------------------------------------------------------------------------------------------------


def test_loss_falls_on_one_batch_and_every_part_learns(make):
    model, loss_of, data, batches, _ = assemble(make(condition_dropout=0.0))
    batch = batches.collate([data[i, 0] for i in range(3)])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    history = []
    for _ in range(40):
        torch.manual_seed(1)  # the same noise
        loss, logs = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(logs["denoising"].item())
    assert history[-1] < 0.6 * history[0]
    # without a text its keys and values, and what follows from them, have nothing to learn
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert all(".attn2." in name or ".norm2." in name for name in idle), idle
    assert model.transformer.condition_embed.weight.grad.abs().max() > 0


def test_dropped_codes_are_not_seen(make, monkeypatch):
    config = make()
    model, loss_of, data, batches, _ = assemble(config)
    seen = []
    monkeypatch.setattr(model.transformer, "forward", lambda *args, condition, **more: seen.append(condition) or 1 / 0)
    batch = batches.collate([data[i % 6] for i in range(60)])
    with pytest.raises(ZeroDivisionError):
        loss_of(model, batch)
    dropped = [bool((seen[0][i] == 0).all()) for i in range(60)]
    assert 4 <= sum(dropped) <= 22  # a fifth of 60
    assert all(d or torch.equal(seen[0][i], batch["condition"][i]) for i, d in enumerate(dropped))


def test_resume_is_exact(make, tmp_path):
    straight = train(make(output_dir=str(tmp_path / "straight"), max_steps=4, window_latent_frames=2))
    train(make(output_dir=str(tmp_path / "cut"), max_steps=2, window_latent_frames=2))
    cut = train(make(output_dir=str(tmp_path / "cut"), max_steps=4, window_latent_frames=2))
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
    for a, b in zip(straight.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validation_tells_what_the_codes_are_worth(make, clips):
    """With a network that answers by its codes alone, other codes are worse."""
    model, loss_of, data, batches, validation = assemble(make(val_data=[str(clips)], val_clips=4))
    figures = validate_decoder(model, loss_of, batches, validation, 2)
    assert set(figures) == {f"{clips.name}_denoising", f"{clips.name}_denoising_wrong_codes"}
    assert (
        figures[f"{clips.name}_denoising"] == figures[f"{clips.name}_denoising_wrong_codes"]
    )  # it starts at zero output
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    batch = batches.collate([data[i, 0] for i in range(4)])
    for _ in range(60):
        loss = loss_of(model, batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    figures = validate_decoder(model, loss_of, batches, validation, 4)
    assert figures[f"{clips.name}_denoising_wrong_codes"] > 1.02 * figures[f"{clips.name}_denoising"]


def flags(config, *names):
    values = ((name, getattr(config, name)) for name in names)
    return [
        word for name, value in values for word in (f"--{name}", *(value if isinstance(value, list) else [str(value)]))
    ]


NAMES = (
    "data",
    "output_dir",
    "vae",
    "codes",
    "preset",
    "num_frames",
    "batch_size",
    "cache_dir",
    "progress",
    "log_every",
)


def test_the_script_exports_a_decoder_for_the_autoregressive_pipeline(make, clips, tmp_path):
    config = make(num_frames=13, output_dir=str(tmp_path / "run"))
    more = ["--max_steps", "2", "--window_latent_frames", "2", "--num_inference_steps", "2", "--val_clips", "2"]
    runpy.run_path(str(SCRIPT))["main"]([*flags(config, *NAMES), *more, "--val_data", str(clips)])
    folder = tmp_path / "run" / "export"
    decoder = CosmosDiffusionDecoderPipeline.from_pretrained(folder)
    assert decoder.config.window_latent_frames == 2 and not decoder.config.takes_text and decoder.config.fps == 5
    assert decoder.config.fsq_levels == [8, 5, 5, 5] and decoder.scheduler.config.sigma_min == 0.02
    assert (folder / "uncertainty" / "config.json").exists() and (folder / "preflight.json").exists()
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert f"val_{clips.name}_denoising_wrong_codes" in logged[-1]
    language = CosmosARForCausalLM(CosmosARConfig(**AUTOREGRESSIVE["tiny"])).eval()
    pipe = CosmosAutoregressivePipeline(
        vae=CosmosVideoTokenizer.from_pretrained(config.codes), transformer=language, diffusion_decoder=decoder,
        height=32, width=32, num_frames=13, fps=5,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    assert pipe(video=str(clips / "clip0.mp4"), output_type="pt").frames.shape == (1, 13, 3, 32, 32)
    # and a run can start from it
    again = build_model(make(init_from=str(folder)), 1000)
    torch.testing.assert_close(again.transformer.condition_embed.weight, decoder.transformer.condition_embed.weight)
    with pytest.raises(ValueError, match="the discrete tokenizer has 500 codes, .* knows 1000"):
        build_model(make(init_from=str(folder)), 500)


def test_with_text_and_from_a_text_to_world_model(make, tmp_path):
    """A frozen encoder's embeddings are cached; a base without codes is given them and computes what it did."""
    torch.manual_seed(0)
    vocabulary = train_vocabulary(["a red square moves to the right."], 300)
    build_text_encoder("tiny", len(vocabulary)).save_pretrained(tmp_path / "text" / "text_encoder")
    vocabulary.save_pretrained(tmp_path / "text" / "tokenizer")
    base = CosmosWorldTransformer3D(**SIZES["tiny"])
    torch.nn.init.normal_(base.proj_out.weight)
    base.save_pretrained(tmp_path / "base" / "transformer")
    config = make(text_encoder=str(tmp_path / "text"), init_from=str(tmp_path / "base"), max_sequence_length=48)
    more = ["--text_encoder", config.text_encoder, "--init_from", config.init_from, "--max_sequence_length", "48"]
    runpy.run_path(str(SCRIPT))["main"]([*flags(config, *NAMES), *more, "--max_steps", "1"])
    decoder = CosmosDiffusionDecoderPipeline.from_pretrained(Path(config.output_dir) / "export")
    assert decoder.config.takes_text and decoder.transformer.config.in_channels == 48
    model = build_model(config, 1000).transformer
    x, text, ids = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 32), torch.randint(0, 1000, (1, 1, 2, 4, 4))
    with torch.no_grad():
        given = model(x, torch.zeros(1), text, condition=ids).sample
        torch.testing.assert_close(given, base(x, torch.zeros(1), text).sample, atol=1e-5, rtol=1e-5)


def test_reload_check_sees_other_embeddings_of_codes(make):
    model, _, data, batches, _ = assemble(make())
    text = batches.collate([data[0]])["text"]
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    check_reload(model, WorldModel(model.transformer), text)
    other = build_model(make(), 1000).transformer
    state = model.transformer.state_dict()
    other.load_state_dict(state | {"condition_embed.weight": state["condition_embed.weight"] + 1})
    with pytest.raises(TrainingError, match="does not compute what the trained one does"):
        check_reload(model, WorldModel(other), text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(family="diffusion"), "family must be decoder, got 'diffusion'"),
        (dict(train_text_encoder=True), "trains no text encoder"),
        (dict(codes=""), "give both tokenizers"),
        (dict(condition_dropout=1.0), r"condition_dropout must be in \[0, 1\)"),
        (dict(num_frames=1), "num_frames must be more than one"),
        (dict(window_latent_frames=1), "window_latent_frames must be 0"),
        (dict(window_latent_frames=4), "window_latent_frames=4, but num_frames are 3 latent frames only"),
        (dict(preset="tiny"), "no preset of a diffusion decoder is called 'tiny'; there is 7b-diffusion-decoder"),
        (dict(num_frames=8), r"num_frames must be 1 \+ k \* 4, got 8"),
    ],
)
def test_mistakes_are_refused(make, more, message):
    with pytest.raises(ValueError, match=message):
        assemble(make(**more))


def test_tokenizers_that_are_no_pair_are_refused(make, tokenizers, tmp_path):
    with pytest.raises(
        ValueError, match="vae must be a continuous tokenizer and codes a discrete one; .* discrete, .* continuous"
    ):
        assemble(make(vae=tokenizers["codes"], codes=tokenizers["vae"]))
    coarse = PRESETS["tiny"] | dict(spatial_compression=16)
    CosmosVideoTokenizer(**coarse).save_pretrained(tmp_path / "coarse")
    with pytest.raises(ValueError, match="spatial compression of 8, the latents of 16"):
        assemble(make(vae=str(tmp_path / "coarse")))
    CosmosVideoTokenizer(**PRESETS["tiny"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no latents_mean and latents_std"):
        assemble(make(vae=str(tmp_path / "bare")))
    masked = CosmosWorldTransformer3D(**SIZES["tiny-video2world"])
    masked.save_pretrained(tmp_path / "masked" / "transformer")
    with pytest.raises(ValueError, match="takes condition_mask, condition: a diffusion decoder takes codes only"):
        build_model(make(init_from=str(tmp_path / "masked")), 1000)
