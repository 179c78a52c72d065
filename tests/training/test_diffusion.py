"""Training of a diffusion world model on six tiny clips: caches, loss, resumption, export."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import T5EncoderModel

from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.video import write_video
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.training.diffusion import (
    DiffusionConfig,
    DiffusionLoss,
    Texts,
    WorldModel,
    build_datasets,
    build_model,
    build_scheduler,
    check_reload,
    validate,
)
from cosmos_hf.training.loop import TrainingError, fit
from cosmos_hf.training.tokenizer import compute_latent_stats
from loop_problem import losses

PRETRAIN = Path(__file__).parents[2] / "training" / "pretrain.py"


@pytest.fixture(scope="module")
def vae(clips, tmp_path_factory):
    """A tokenizer with random weights and the statistics of the clips."""
    torch.manual_seed(0)
    model = CosmosVideoTokenizer(**PRESETS["tiny"]).eval()
    compute_latent_stats(model, ClipDataset(clips, num_frames=9, random=False))
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make(clips, vae, tmp_path):
    def settings(**more):
        base = dict(data=[str(clips)], output_dir=str(tmp_path / "run"), vae=str(vae), preset="tiny-video2world")
        base |= dict(num_frames=9, train_text_encoder=True, text_preset="tiny", vocab_size=300, max_condition_frames=1)
        base |= dict(max_sequence_length=48, batch_size=3, warmup_steps=2, learning_rate=2e-3, log_every=1)
        return DiffusionConfig(**(base | dict(progress=False, cache_dir=str(tmp_path / "cache")) | more))

    return settings


def assemble(config):
    torch.manual_seed(0)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    data, validation = build_datasets(config, vae)
    texts = Texts(config, data.captions, [])
    model = build_model(config)
    loss = DiffusionLoss(config, build_scheduler(config), model.transformer.takes_condition_mask)
    return model, loss, data, texts, validation


def train(config):
    model, loss, data, texts, _ = assemble(config)
    fit(model, loss, data, config, texts.collate, export=lambda model, folder: None)
    return model


def test_loss_falls_on_one_batch_and_every_part_learns(make):
    model, loss_of, data, texts, _ = assemble(make(text_dropout=0.0))
    batch = texts.collate([data[i, 0] for i in range(3)])
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
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle, f"no gradient reaches {idle}"


def test_compiled_blocks_train_alike(make, tmp_path):
    settings = dict(max_steps=3, ema_width=0)
    plain = train(make(**settings))
    model = train(make(**settings, compile_backend="aot_eager", output_dir=str(tmp_path / "compiled")))
    assert all(block._compiled_call_impl is not None for block in model.transformer.transformer_blocks)
    there, here = plain.state_dict(), model.state_dict()
    assert there.keys() == here.keys()
    for name, value in there.items():
        torch.testing.assert_close(here[name], value, atol=1e-5, rtol=1e-4)


def test_an_unknown_compiler_is_refused(make):
    with pytest.raises(ValueError, match="compile_backend must be one of .*inductor.*, got 'inducter'"):
        train(make(compile_backend="inducter"))


def test_clips_of_several_sizes_and_rates_train_together(make, clips, tmp_path):
    """Batches are of one size and rate; the figures of validation sets of one name keep apart."""
    other = tmp_path / "wide" / Path(clips).name
    other.mkdir(parents=True)
    for i in range(6):
        width, fps = (48, 5) if i < 3 else (32, 10)
        write_video(other / f"clip{i}.mp4", torch.full((3, 9, 32, width), 30 * i, dtype=torch.uint8), fps)
        (other / f"clip{i}.txt").write_text("A grey wall.")
    config = make(data=[str(clips), str(other)], val_data=[str(clips), str(other)], max_steps=6)
    model, loss, data, texts, validation = assemble(config)
    assert len(set(data.kinds)) == 3 and len(data.kinds) == len(data)
    seen = []

    def noting(model, batch):
        seen.append((*batch["latents"].shape[3:], *batch["fps"].tolist()))
        return loss(model, batch)

    fit(model, noting, data, config, texts.collate, export=lambda model, folder: None)
    assert len(set(seen)) == 3
    figures = validate(model, loss, texts, validation, 4)
    assert len(validation) == 2 and len(figures) == 4


def test_new_text_on_a_trained_base(make, clips, tmp_path):
    """The transformer is the base's, vocabulary and text encoder begin anew, in the run's own folder."""
    base = runpy.run_path(str(PRETRAIN))["main"]
    known = vars(make(max_steps=1, output_dir=str(tmp_path / "base")))
    flags = [
        f"--{name}={value}" for name, value in known.items() if isinstance(value, (int, float, str)) and value != ""
    ]
    base([*flags, f"--data={clips}"])
    export = tmp_path / "base" / "export"
    told = sorted(p.name for p in export.iterdir())
    for new in (False, True):
        config = make(init_from=str(export), new_text=new, output_dir=str(tmp_path / f"run{new}"))
        model, _, data, texts, _ = assemble(config)
        mine, its = (
            m.state_dict() for m in (model.text_encoder, T5EncoderModel.from_pretrained(export / "text_encoder"))
        )
        assert all(torch.equal(mine[name], its[name]) for name in its) != new
        assert torch.equal(model.transformer.proj_out.weight, load_transformer(export).proj_out.weight)
        assert (Path(config.output_dir) / "tokenizer").exists() == new
    assert sorted(p.name for p in export.iterdir()) == told
    with pytest.raises(ValueError, match="new_text replaces the trained text encoder of a base"):
        make(new_text=True)


def load_transformer(folder):
    return CosmosWorldTransformer3D.from_pretrained(folder / "transformer")


def test_resume_is_exact(make, tmp_path):
    straight = train(make(output_dir=str(tmp_path / "straight"), max_steps=4))
    train(make(output_dir=str(tmp_path / "cut"), max_steps=2))
    cut = train(make(output_dir=str(tmp_path / "cut"), max_steps=4))
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
    for a, b in zip(straight.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_untrained_error_is_one_and_given_frames_lower_it(make):
    """The network starts at zero output, so its estimate is c_skip * x: an error of 1 on average at every noise level."""
    model, loss_of, data, texts, _ = assemble(make())
    batch = texts.collate([data[i % 6] for i in range(48)])
    keep = torch.ones(48)
    with torch.no_grad():
        plain = {n: loss_of.losses(model, batch, torch.full((48,), n), keep)[0].mean() for n in (0, 1, 3)}
    assert plain[0] == pytest.approx(1, abs=0.15)
    assert plain[1] == pytest.approx(2 / 3 * plain[0].item(), abs=0.15)  # 1 of 3 latent frames has no error
    assert plain[3] == 0


def test_a_dropped_text_is_not_seen(make):
    model, loss_of, data, texts, _ = assemble(make())
    torch.nn.init.normal_(model.transformer.proj_out.weight)  # it starts at zero
    for block in model.transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm2.linear_2.weight)
    a, b = (texts.collate([data[i]]) for i in (0, 1))
    b["latents"] = a["latents"]

    def error(batch, keep):
        torch.manual_seed(0)
        return loss_of.losses(model, batch, torch.tensor([1]), torch.tensor([keep]))[0]

    assert torch.equal(error(a, 0.0), error(b, 0.0))
    assert not torch.equal(error(a, 1.0), error(b, 1.0))


def test_validation_repeats_and_leaves_the_generator_alone(make, clips):
    model, loss_of, _, texts, validation = assemble(make(val_data=[str(clips)], val_clips=4))
    state = torch.get_rng_state()
    first, second = (validate(model, loss_of, texts, validation, 2) for _ in range(2))
    assert first == second
    assert set(first) == {f"{clips.name}_denoising_given{n}" for n in (0, 1)}
    assert torch.equal(state, torch.get_rng_state())


def test_script_exports_a_pipeline_that_generates(make, clips, tmp_path):
    from cosmos_hf import CosmosText2WorldPipeline, CosmosVideo2WorldPipeline

    config = make(output_dir=str(tmp_path / "run"))
    names = [
        "output_dir",
        "vae",
        "preset",
        "num_frames",
        "text_preset",
        "vocab_size",
        "max_sequence_length",
        "batch_size",
    ]
    flags = [part for name in names for part in (f"--{name}", str(getattr(config, name)))]
    flags += ["--train_text_encoder", "true", "--progress", "false", "--max_condition_frames", "1", "--max_steps", "2"]
    runpy.run_path(str(PRETRAIN))["main"]([*flags, "--data", str(clips), "--guidance_scale", "1"])
    pipeline = CosmosVideo2WorldPipeline.from_pretrained(tmp_path / "run" / "export")
    pipeline.set_progress_bar_config(disable=True)
    sheet = dict(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0))
    result = pipeline(video=str(clips / "clip0.mp4"), prompt="A red square moves to the right.", **sheet).frames
    assert result.shape == (1, 9, 3, 32, 32)
    pipeline = CosmosText2WorldPipeline.from_pretrained(tmp_path / "run" / "export")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("A green square.", **sheet).frames.shape == (1, 9, 3, 32, 32)
    assert (tmp_path / "run" / "export" / "uncertainty" / "config.json").exists()
    # and a run can start from it
    again = build_model(make(init_from=str(tmp_path / "run" / "export")))
    torch.testing.assert_close(again.transformer.proj_out.weight, pipeline.transformer.proj_out.weight)


def test_reload_check_sees_a_difference(make):
    model, _, data, texts, _ = assemble(make())
    other = WorldModel(model.transformer, build_model(make()).text_encoder)
    text = texts.collate([data[0]])["text"]
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    for block in model.transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm2.linear_2.weight)
    check_reload(model, WorldModel(model.transformer, model.text_encoder), text)
    with pytest.raises(TrainingError, match="does not compute what the trained one does"):
        check_reload(model, other, text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(train_text_encoder=False), "either train_text_encoder: true or the folder"),
        (dict(text_encoder="t5"), "either train_text_encoder: true or the folder"),
        (dict(family="autoregressive"), "family must be diffusion"),
        (dict(height=32), "height and width together"),
        (dict(text_dropout=1.0), r"text_dropout must be in \[0, 1\)"),
        (dict(window_starts=[0, -4]), "window_starts must be frames >= 0"),
        (dict(preset="huge"), "unknown preset 'huge'"),
        (dict(text_preset="nano"), "the text encoder is 128 wide, the transformer takes 32"),
        (dict(num_frames=8), r"num_frames must be 1 \+ k \* 4, got 8"),
        (dict(max_sequence_length=4), "max_sequence_length is 4, .* tokens are needed for the caption"),
    ],
)
def test_mistakes_are_refused(make, more, message):
    with pytest.raises(ValueError, match=message):
        assemble(make(**more))


def test_a_tokenizer_without_statistics_is_refused(make, tmp_path):
    CosmosVideoTokenizer(**PRESETS["tiny"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no latents_mean and latents_std"):
        assemble(make(vae=str(tmp_path / "bare")))
