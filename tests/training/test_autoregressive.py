"""Training of an autoregressive world model on six tiny clips: codes, loss, stages, resumption, export; then Medusa heads."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cosmos_hf import CosmosAutoregressivePipeline
from cosmos_hf.models.ar_cosmos import PRESETS as SIZES
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.ar_loss import IGNORED, chunked_loss
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer
from cosmos_hf.models.medusa_cosmos import speculative_generate
from cosmos_hf.training import autoregressive, medusa
from cosmos_hf.training.autoregressive import AutoregressiveConfig, AutoregressiveLoss, TokenBatches, build_model
from cosmos_hf.training.cache import LatentDataset, save_window
from cosmos_hf.training.config import family_of
from cosmos_hf.training.diffusion import Texts, build_datasets
from cosmos_hf.training.loop import TrainingError, fit
from loop_problem import losses

SCRIPTS = Path(__file__).parents[2] / "training"
TEXT = dict(train_text_encoder=True, text_preset="tiny", vocab_size=300, max_sequence_length=48)


@pytest.fixture(scope="module")
def vae(clips, tmp_path_factory):
    """A discrete tokenizer with random weights, wide enough that clips have different codes."""
    torch.manual_seed(0)
    model = CosmosVideoTokenizer(**PRESETS["tiny-discrete"]).eval()
    model.quant_conv.weight.data.mul_(20)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(clips, vae, tmp_path):
    def make(**more):
        base = dict(data=[str(clips)], output_dir=str(tmp_path / "run"), vae=str(vae), preset="tiny", num_frames=9)
        base |= dict(batch_size=3, warmup_steps=2, learning_rate=5e-3, log_every=1, progress=False)
        return base | dict(cache_dir=str(tmp_path / "cache")) | more

    return make


def assemble(settings):
    torch.manual_seed(0)
    config = AutoregressiveConfig(**settings)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    data, validation = build_datasets(config, vae, need_caption=config.has_text)
    texts = Texts(config, data.captions, []) if config.has_text else None
    model = build_model(config, vae.fsq.codebook_size, data[0]["indices"].shape)
    return config, model, data, TokenBatches(config, model.transformer.config, texts), validation


def arguments(settings, **more):
    """Settings as flags."""
    flags = []
    for name, value in (settings | more).items():
        flags += [f"--{name}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
    return flags


def run(script, settings, **more):
    runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"](arguments(settings, **more))


# ---- codes and loss --------------------------------------------------------------------------------------------------


def test_codes_are_cached_as_the_tokenizer_gives_them(settings):
    config, _, data, _, _ = assemble(settings(window_starts=[0]))
    from cosmos_hf.data.clips import ClipDataset
    from cosmos_hf.data.video import to_float

    clip = ClipDataset(config.data, num_frames=None, random=False)[0]["video"][:, :9]
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    assert torch.equal(data[0]["indices"], vae.encode(to_float(clip)[None]).indices[0])
    assert len(data[0]["indices"].unique()) > 4 and "latents" not in data[0]


def test_conditioning_tokens_are_no_targets(settings):
    _, model, data, batches, _ = assemble(settings())
    batch = batches.collate([data[0], data[1]])
    assert batch["tokens"].shape == (2, 48) and batch["latent_shape"] == (3, 4, 4)
    assert (batch["labels"][:, :16] == IGNORED).all() and torch.equal(batch["labels"][:, 16:], batch["tokens"][:, 16:])
    batches.model_config.bov_token_id = 1000
    batch = batches.collate([data[0]])
    assert batch["tokens"].shape == (1, 49) and batch["tokens"][0, 0] == 1000
    assert (batch["labels"][:, :17] == IGNORED).all() and (batch["labels"][:, 17:] != IGNORED).all()
    batches.config.bov_hides_target = False
    assert (batches.collate([data[0]])["labels"][0] == IGNORED).sum() == 16
    batches.config.condition_frames = 3
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        batches.collate([data[0]])


@pytest.mark.parametrize("chunk", [5, 1000])
def test_chunks_do_not_change_loss_or_gradients(chunk):
    head, states = nn.Linear(8, 50, bias=False), torch.randn(2, 9, 8, requires_grad=True)
    labels = torch.randint(0, 50, (2, 9))
    labels[:, :3] = IGNORED
    loss = chunked_loss(head, states, labels, 0.1, chunk=chunk)
    loss.total.backward()
    gradients = [states.grad, head.weight.grad]
    states.grad = head.weight.grad = None
    logits = head(states[:, :-1])
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    z = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss.total, plain + 0.1 * z)
    assert loss.targets == 2 * 6
    (plain + 0.1 * z).backward()
    for a, b in zip(gradients, (states.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(a, b)


MEMORY = """
import re, torch
from cosmos_hf.models.ar_loss import chunked_loss
# Not getrusage: its ru_maxrss starts at the peak of the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**10
head, labels = torch.nn.Linear(16, 64000, bias=False), torch.randint(0, 64000, (1, 1025))
states = torch.randn(1, 1025, 16, requires_grad=True)
chunked_loss(head, states[:, :9], labels[:, :9], 1e-4).total.backward()  # libraries load now
before = peak()
chunked_loss(head, states, labels, 1e-4, chunk=32).total.backward()
print(peak() - before)
logits = head(states[0, :-1])
(torch.nn.functional.cross_entropy(logits, labels[0, 1:]) + 1e-4 * logits.logsumexp(-1).square().mean()).backward()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_logits_never_exist_whole():
    """1024 positions of 64 000 codes are 250 MiB; chunks of 32 take far less, one piece several times that."""
    # A fixed threshold: glibc's growing one keeps freed blocks in the heap, more or less of them from run to run.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, check=True, text=True, env=env).stdout
    chunked, whole = map(float, out.split())
    assert chunked < 100, chunked
    assert whole > 450, whole


def test_labels_are_checked():
    head, states = nn.Linear(8, 50, bias=False), torch.randn(1, 4, 8)
    for labels, message in (
        (torch.full((1, 4), IGNORED), "nothing to learn"),
        (torch.tensor([[1, 2, 3, 50]]), r"codes 0..49 or -100, got 2..50"),
        (torch.tensor([[1, 2, 3]]), r"labels must be \[1, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            chunked_loss(head, states, labels, 0.0)


# ---- a run -------------------------------------------------------------------------------------------------------------


def test_loss_falls_on_one_batch_and_every_part_learns(settings):
    config, model, data, batches, _ = assemble(settings())
    batch, loss_of = batches.collate([data[i, 0] for i in range(3)]), AutoregressiveLoss(config)
    optimizer, history = torch.optim.AdamW(model.parameters(), 5e-3), []
    for _ in range(30):
        loss, logs = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(logs["cross_entropy"].item())
    assert history[0] == pytest.approx(math.log(1000), abs=0.7) and history[-1] < 0.4 * history[0]
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle, f"no gradient reaches {idle}"


def test_resume_is_exact(settings, tmp_path):
    def train(folder, steps):
        config, model, data, batches, _ = assemble(settings(output_dir=str(tmp_path / folder), max_steps=steps))
        fit(model, AutoregressiveLoss(config), data, config, batches.collate, export=lambda model, folder: None)
        return model

    straight = train("straight", 4)
    train("cut", 2)
    cut = train("cut", 4)
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
    for a, b in zip(straight.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stages_and_medusa_end_to_end(settings, clips, tmp_path, monkeypatch):
    """Codes, then text that starts from the base, then heads: each stage's export is the next one's start."""
    base = tmp_path / "base"
    run(
        "pretrain",
        settings(),
        family="autoregressive",
        output_dir=base,
        max_steps=3,
        val_data=[str(clips)],
        val_clips=3,
    )
    log = [json.loads(line) for line in (base / "log.jsonl").read_text().splitlines()]
    assert log[-1][f"val_{Path(clips).name}_perplexity"] > 1
    pipe = CosmosAutoregressivePipeline.from_pretrained(base / "export")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.num_frames == 9 and pipe.text_encoder is None
    assert pipe(video=next(Path(clips).glob("*.mp4")), output_type="latent").frames.shape == (1, 3, 4, 4)

    stage = tmp_path / "text"
    more = dict(init_from=base / "export", add_cross_attention=True, freeze_base=True, text_dropout=0.3, **TEXT)
    run("pretrain", settings(), family="autoregressive", output_dir=stage, max_steps=2, **more)
    pipe = CosmosAutoregressivePipeline.from_pretrained(stage / "export")
    assert pipe.transformer.config.cross_attention_dim == 32 and pipe.text_encoder is not None
    assert not (base / "export" / "tokenizer").exists()
    old = CosmosARForCausalLM.from_pretrained(base / "export" / "transformer").state_dict()
    new = pipe.transformer.state_dict()
    moved = {name for name, value in old.items() if not torch.equal(value, new[name])}
    assert moved == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert new["model.layers.0.cross_attn.o_proj.weight"].abs().max() > 0

    heads = tmp_path / "medusa"
    more = dict(init_from=stage / "export", text_encoder=stage / "export", max_sequence_length=48, medusa_num_heads=2)
    run("train_medusa", settings(), output_dir=heads, max_steps=2, train_last_layers=1, own_videos=3, **more)
    pipe = CosmosAutoregressivePipeline.from_pretrained(heads / "export")
    assert len(pipe.transformer.medusa_heads) == 2
    assert pipe.transformer.medusa_heads[1].weight.abs().max() > 0
    after = pipe.transformer.state_dict()
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(after["model.layers.1.mlp.up_proj.weight"], new["model.layers.1.mlp.up_proj.weight"])
    logs = [json.loads(line) for line in (heads / "log.jsonl").read_text().splitlines()]
    assert {"divergence", "head0_cross_entropy", "head1_cross_entropy"} <= logs[0].keys()

    figures = tmp_path / "speculation.json"
    flags = ["--model", str(heads / "export"), "--data", str(clips), "--num_clips", "2", "--copies", "4"]
    benchmarks = SCRIPTS.parent / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    runpy.run_path(str(benchmarks / "speculation.py"))["main"]([*flags, "--output", str(figures)])
    rows = json.loads(figures.read_text())[str(heads / "export")]
    copies = {f"{how}, 4 copies" for how in ("previous frame", "prompt lookup")}
    assert rows.keys() == {"0 heads", "2 heads", "2 heads, tree"} | copies
    assert {row["as_plain"] for row in rows.values()} == {1.0} and rows["0 heads"]["forward_passes"] == 32


# ---- stages ------------------------------------------------------------------------------------------------------------


def saved_base(folder):
    model = CosmosARForCausalLM(CosmosARConfig(**SIZES["tiny"]))
    model.save_pretrained(folder / "transformer")
    return model


def test_text_stage_starts_as_its_base(settings, tmp_path, monkeypatch):
    base = saved_base(tmp_path).eval()
    config = AutoregressiveConfig(**settings(init_from=str(tmp_path), add_cross_attention=True, **TEXT))
    model = build_model(config).transformer.eval()
    tokens, text = torch.randint(0, 1000, (2, 20)), torch.randn(2, 5, 32)
    assert torch.equal(model(tokens, encoder_hidden_states=text).logits, base(tokens).logits)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self)  # the new output layers keep their random weights
    with pytest.raises(TrainingError, match="step 0 of the text stage is not its base"):
        build_model(config)


def test_context_stage_keeps_the_weights_and_slows_the_frequencies(settings, tmp_path):
    base = saved_base(tmp_path)
    config = AutoregressiveConfig(**settings(init_from=str(tmp_path), yarn_scale=2.0))
    model = build_model(config, 1000, (5, 4, 4)).transformer
    assert model.config.latent_shape == [5, 4, 4] and model.config.yarn_original_shape == [3, 4, 4]
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.state_dict().items())
    tokens = torch.randint(0, 1000, (1, 80))
    assert torch.isfinite(model(tokens, labels=tokens).loss)
    model.save_pretrained(tmp_path / "longer" / "transformer")
    with pytest.raises(ValueError, match="extended already"):
        build_model(AutoregressiveConfig(**settings(init_from=str(tmp_path / "longer"), yarn_scale=2.0)))


def test_settings_that_contradict_are_refused(settings, tmp_path):
    saved_base(tmp_path)
    for changes, message in (
        (dict(family="diffusion"), "family must be autoregressive"),
        (dict(add_cross_attention=True), "give init_from"),
        (dict(add_cross_attention=True, init_from="x"), "give train_text_encoder: true or text_encoder"),
        (dict(yarn_scale=2.0), "give init_from"),
        (dict(init_from="x", freeze_base=True), "freeze_base belongs to the text stage"),
        (dict(train_text_encoder=True, text_encoder="x"), "give either"),
        (dict(text_dropout=1.0), "text_dropout must be in"),
        (dict(condition_frames=-1), "condition_frames must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoregressiveConfig(**settings(**changes))
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        build_model(AutoregressiveConfig(**settings(preset="huge")))
    with pytest.raises(ValueError, match="the transformer has no cross-attention"):
        build_model(AutoregressiveConfig(**settings(**TEXT)))
    with pytest.raises(ValueError, match="the transformer attends to text"):
        build_model(AutoregressiveConfig(**settings(preset="nano-video2world")))
    with pytest.raises(ValueError, match="the tokenizer has 500 codes"):
        build_model(AutoregressiveConfig(**settings(init_from=str(tmp_path))), 500)
    with pytest.raises(ValueError, match="family must be diffusion or autoregressive, got 'x'"):
        family_of(["--family", "x"], ("diffusion", "autoregressive"))


def test_a_changed_model_does_not_pass_as_reloaded(settings):
    _, model, data, batches, _ = assemble(settings())
    other = autoregressive.ARWorldModel(CosmosARForCausalLM(model.transformer.config))
    with pytest.raises(TrainingError, match="the saved model's loss"):
        autoregressive.check_reload(model, other, batches.collate([data[0]]))


# ---- Medusa ------------------------------------------------------------------------------------------------------------


def test_heads_learn_and_save_passes(settings, tmp_path):
    """Trained on codes with a simple rule, the heads are right most of the time, and the result is still the greedy one."""
    torch.manual_seed(0)
    base = CosmosARForCausalLM(CosmosARConfig(**SIZES["tiny"] | dict(vocab_size=50, embedding_size=50)))
    tokens = (torch.arange(48)[None] * 3 + torch.arange(0, 24, 3)[:, None]) % 50
    base.save_pretrained(tmp_path / "transformer")
    config = medusa.MedusaConfig(**settings(init_from=str(tmp_path), train_last_layers=2))
    model, loss_of = medusa.build_model(config), medusa.MedusaLoss(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    batch = {"tokens": tokens, "labels": tokens, "latent_shape": (3, 4, 4)}
    for _ in range(80):
        loss, logs = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logs["head2_cross_entropy"] < 0.5
    network = model.transformer.eval()
    prompt = tokens[:2, :8]
    greedy = network.generate(prompt)
    out = speculative_generate(network, prompt)
    assert torch.equal(out.sequences, greedy)
    assert out.forward_passes < 0.5 * greedy[:, 8:].numel()


def test_heads_learn_from_own_videos_and_the_network_stays(settings, tmp_path):
    torch.manual_seed(0)
    size = SIZES["tiny"] | dict(vocab_size=125, embedding_size=125, latent_shape=(3, 4, 4))
    base = CosmosARForCausalLM(CosmosARConfig(**size)).eval()
    base.save_pretrained(tmp_path / "transformer")
    known = settings(init_from=str(tmp_path), train_last_layers=1, own_videos=4, medusa_num_heads=2)
    config = medusa.MedusaConfig(**known)
    windows, indices = [], torch.randint(125, (6, 3, 4, 4), dtype=torch.int32)
    for i in range(6):
        save_window(tmp_path / f"{i}.safetensors", {"indices": indices[i]}, 5.0)
        windows.append({(tmp_path / f"{i}.safetensors",): slice(0, 9)})
    data = LatentDataset(windows, [""] * 6, [str(i) for i in range(6)])
    batches = medusa.MedusaBatches(config, base.config, None)
    pairs = medusa.own_videos(base, data, batches)
    own = pairs.own
    assert len(pairs) == 4 and own[3]["fps"] == 5.0
    prompt = indices[3:4, 0].flatten(1).long()
    assert torch.equal(own[3]["indices"].flatten(), base.generate(prompt)[0])
    model, loss_of = medusa.build_model(config), medusa.MedusaLoss(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    batch, log = batches.collate([pairs[i, i + 2] for i in range(4)]), []
    assert torch.equal(batch["tokens"][4:], indices[2:6].flatten(1).long())
    assert (batch["labels"][4:] == -100).all() and (batch["labels"][:4, 16:] >= 0).all()
    for _ in range(60):
        loss, logs = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(logs)
    assert log[0]["divergence"] < 1e-6 and log[-1]["divergence"] < 0.3
    assert log[-1]["head1_cross_entropy"] < 0.5 * log[0]["head1_cross_entropy"]
    assert not any("base" in name for name in model.state_dict())
    direct = nn.functional.kl_div(
        model.transformer(batch["tokens"]).logits.log_softmax(-1),
        base(batch["tokens"]).logits.log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    torch.testing.assert_close(loss_of(model, batch)[1]["divergence"], direct.mean().detach(), atol=1e-6, rtol=1e-4)


def test_medusa_settings_are_checked(settings, tmp_path):
    saved_base(tmp_path)
    for changes, message in (
        (dict(init_from=""), "give init_from"),
        (dict(medusa_num_heads=0), "medusa_num_heads must be at least 1"),
        (dict(train_text_encoder=True), "are stages of pretrain.py"),
        (dict(own_videos=2, condition_frames=0), "own_videos must be >= 0, and needs condition_frames"),
    ):
        with pytest.raises(ValueError, match=message):
            medusa.MedusaConfig(**settings(**{"init_from": str(tmp_path)} | changes))
    with pytest.raises(ValueError, match="the model has 2 layers"):
        medusa.build_model(medusa.MedusaConfig(**settings(init_from=str(tmp_path), train_last_layers=3)))
    with pytest.raises(ValueError, match="give text_encoder"):
        medusa.build_model(medusa.MedusaConfig(**settings(init_from=str(tmp_path), text_encoder="x")))
