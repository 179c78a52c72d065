"""Post-training of a tiny autoregressive pipeline with actions and instructions, and its adapters in the pipeline."""

import json
import logging
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from cosmos_hf.conditioning.action import ActionSpec
from cosmos_hf.data.video import write_video
from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.ar_loss import IGNORED
from cosmos_hf.models.autoencoder_cosmos import PRESETS as TOKENIZERS
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.pipelines.autoregressive import CosmosAutoregressivePipeline
from cosmos_hf.training import posttrain_autoregressive as ar
from cosmos_hf.training.action_specs import find_action_spec
from cosmos_hf.training.diffusion import Texts, build_datasets
from cosmos_hf.training.loop import TrainingError, fit
from cosmos_hf.training.text import build_text_encoder, train_vocabulary

SCRIPT = Path(__file__).parents[2] / "training" / "posttrain.py"
TEXT = dict(cross_attention_dim=32, absolute_positions="every_layer", bov_token_id=1000, embedding_size=1064)


def save_base(folder, text: bool):
    torch.manual_seed(0)
    parts = {}
    if text:
        vocabulary = train_vocabulary(["a robot arm picks up the red cube"], 300)
        parts = dict(tokenizer=vocabulary, text_encoder=build_text_encoder("tiny", len(vocabulary)).eval())
    transformer = CosmosARForCausalLM(CosmosARConfig(**PRESETS["tiny"] | (TEXT if text else {})))
    vae = CosmosVideoTokenizer(**TOKENIZERS["tiny-discrete"]).eval()
    vae.quant_conv.weight.data.mul_(20)  # clips have different codes
    size = dict(height=32, width=32, num_frames=9, fps=5, max_sequence_length=16)
    CosmosAutoregressivePipeline(vae=vae, transformer=transformer, **parts, **size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(root / name, name == "text") for name in ("plain", "text")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six clips of 13 frames of 32x32 at 5 Hz that start alike and move to different sides, as their actions say."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        frames = torch.full((3, 13, 32, 32), 60, dtype=torch.uint8)
        for t in range(13):
            left = 12 + (i - 2) * t // 2
            frames[i % 3, t, 8:24, max(0, left) : left + 10] = 220
        write_video(folder / f"{i}.mp4", frames, 5, crf=10)
        (folder / f"{i}.txt").write_text(["a robot arm", "the red cube"][i % 2])
        actions = np.zeros((12, 7))
        actions[:, 0], actions[:, 6] = (i - 2) / 4, 0.5 + (i - 2) / 10
        np.savez(folder / f"{i}.npz", actions=actions)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(bases, data, cache, tmp_path):
    def settings(*conditions, base="text", **more):
        known = dict(data=[str(data)], init_from=str(bases[base]), output_dir=str(tmp_path / "run"), cache_dir=cache)
        known |= dict(conditions=list(conditions), action_spec="bridge", lora_rank=4, batch_size=3, max_steps=4)
        known |= dict(warmup_steps=1, learning_rate=5e-3, log_every=1, progress=False)
        return ar.ARPosttrainConfig(**(known | more))

    return settings


def assemble(config):
    torch.manual_seed(0)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    dataset, validation = build_datasets(
        config, vae, "instruction" in config.conditions, config.arrays, config.cameras
    )
    texts = Texts(config, dataset.captions, []) if config.has_text else None
    spec = find_action_spec(config, dataset)
    model, changes = ar.build_model(config, spec, vae.config.temporal_compression)
    batches = ar.ConditionTokens(config, model.transformer.config, texts, spec, vae)
    return model, changes, ar.ARConditionedLoss(config), dataset, batches, validation


def adapter_of(config, folder):
    """An adapter whose parts are all in use, and the transformer that it is of."""
    model, changes, _, dataset, batches, _ = assemble(config)
    for parameter in model.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    ar.export_adapter(model, folder, config, changes, batches, dataset[0])
    return model.transformer.eval()


def load(folder, **more):
    pipe = CosmosAutoregressivePipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_of(speed, steps=8):
    actions = np.zeros((steps, 7), dtype=np.float32)
    actions[:, 0], actions[:, 6] = speed, 0.5
    return actions


def generate(pipe, **more):
    settings = dict(image=torch.full((3, 1, 32, 32), 90, dtype=torch.uint8), output_type="latent", temperature=0)
    return pipe(**settings | more).frames


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["plain", "text"])
def test_step_zero_is_the_base_and_only_the_adapter_learns(make, bases, base, caplog):
    config = make("action", base=base)
    with caplog.at_level(logging.INFO):
        model, changes, loss, dataset, batches, _ = assemble(config)
    assert "LoRA of rank 4 in 2/2 blocks" in caplog.text and "step 0 is the base" in caplog.text
    assert changes == dict(action_dim=28, actions_per_frame=4)
    trained = {name.split(".lora_")[0] for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert {"model.action_embed.place.weight", "model.layers.1.action_attn.o_proj.weight"} <= trained
    assert "model.layers.0.self_attn.q_proj" in trained and "lm_head.weight" not in trained
    assert ("model.layers.0.cross_attn.q_proj" in trained) == (base == "text")
    fit(model, loss, dataset, config, batches.collate, lambda model, folder: None)
    before = CosmosARForCausalLM.from_pretrained(bases[base] / "transformer").state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in model.transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    log = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert log[0]["sensitivity_action"] < 1e-5 < log[-1]["sensitivity_action"]


def test_actions_are_learned_and_the_figures_show_it(make, data):
    """Six videos that begin alike, and whose two other frames are of one code each, which the actions alone tell."""
    config = make("action", base="plain", condition_dropout=0.0, lora_rank=8, val_data=[str(data)])
    model, _, loss_of, dataset, batches, validation = assemble(config)
    batch = batches.collate([dataset[i, 0] for i in range(6)])
    codes = torch.arange(6)[:, None] * 150 + torch.arange(1, 3) * 40
    batch["tokens"] = torch.cat([batch["tokens"][:1, :16].expand(6, -1), codes.repeat_interleave(16, 1)], dim=1)
    batch["labels"] = torch.where(batch["labels"] == IGNORED, IGNORED, batch["tokens"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    before = loss_of.sensitivity(model, batch)
    for _ in range(60):
        loss, _ = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = loss_of.sensitivity(model, batch)
    assert before["sensitivity_action"] < 1e-5 and before["error_ratio_action"] == pytest.approx(1, abs=1e-5)
    assert after["sensitivity_action"] > 0.1 and after["error_ratio_action"] > 1.2, after
    figures = ar.validate_conditions(model.eval(), loss_of, batches, validation, 3)
    assert figures[f"{data.name}_sensitivity_action"] > 0.1
    assert {f"{data.name}_perplexity", f"{data.name}_error_ratio_action"} <= figures.keys()


def test_actions_that_do_not_fit_name_their_clip(make):
    _, _, _, dataset, batches, _ = assemble(make("action"))
    with pytest.raises(ValueError, match="clip '1': actions have 6 numbers, 7 are needed"):
        batches.collate([dataset[0], dataset[1] | {"actions": torch.zeros(8, 6)}])


def test_dropped_actions_are_not_seen(make):
    model, _, loss_of, dataset, batches, _ = assemble(make("action", condition_dropout=0.999999))
    for parameter in model.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batches.collate([dataset[i, 0] for i in range(3)])
    twice = batch | {"actions": 2 * batch["actions"]}
    assert torch.equal(loss_of(model, batch)[0], loss_of(model, twice)[0])


def test_a_start_that_is_not_the_base_stops_the_run(bases):
    transformer = CosmosARForCausalLM.from_pretrained(bases["plain"] / "transformer")
    with pytest.raises(TrainingError, match="step 0 must be the base, but the output is off by"):
        ar.check_step_zero(transformer, lambda: transformer.lm_head.weight.data.mul_(1.01))


@pytest.mark.parametrize(
    ("conditions", "more", "message"),
    [
        (("action",), dict(init_from=""), "post-training starts from a pipeline"),
        (("camera",), {}, "conditions of an autoregressive base must be one or several of action, instruction, views"),
        (("action",), dict(top_p=0.5), "top_p cannot be set in post-training: the base's are kept"),
        (("action",), dict(lora_targets=["to_q"]), "'to_q' ends the name of no layer; a block has self_attn.q_proj"),
        (("action",), dict(action_spec="driving"), "actions have 7 numbers, 2 are needed for car"),
        (("instruction",), dict(base="plain"), "the base has no text_encoder: give text_encoder"),
        (("action",), dict(base="plain", text_encoder="x"), "text_encoder would be ignored"),
        (("action",), dict(base_precision="int3"), "base_precision must be one of float32, bfloat16, nf4"),
        (("action",), dict(base_precision="bfloat16"), "base_precision=bfloat16 needs mixed_precision: bf16"),
        (("action",), dict(base_precision="nf4", lora_rank=0), "is for a frozen base: lora_rank=0 trains all"),
    ],
)
def test_mistakes_are_refused(make, conditions, more, message):
    with pytest.raises(ValueError, match=message):
        assemble(make(*conditions, **more))


# ---- adapters in the pipeline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["plain", "text"])
def test_an_adapter_computes_what_was_trained(make, bases, base, tmp_path):
    trained = adapter_of(make("action", base=base), tmp_path / "adapter")
    pipe = load(bases[base])
    text = base == "text"
    pipe.load_lora_weights(tmp_path / "adapter")
    assert pipe.transformer.conditions == ("actions",) and pipe.action_spec.width == 7
    given = dict(actions=torch.randn(1, 3, 28), **({"encoder_hidden_states": torch.randn(1, 4, 32)} if text else {}))
    with torch.no_grad():
        expected, result = (m(torch.arange(40)[None], **given).logits for m in (trained, pipe.transformer))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_from_an_adapter(make, bases, tmp_path):
    folder, more = tmp_path / "adapter", dict(base="plain", text_encoder=str(bases["text"]), max_sequence_length=24)
    trained = adapter_of(make("action", "instruction", **more), folder)
    model, *_ = assemble(make("action", "instruction", **more, action_spec="", init_adapter=str(folder)))
    there, here = trained.state_dict(), model.transformer.state_dict()
    assert there.keys() == here.keys() and all(torch.equal(value, there[name]) for name, value in here.items())


def test_adapters_together_alone_and_unloaded(make, bases, tmp_path):
    """An instruction adapter for a base that knew no text, beside one for actions."""
    for name in ("action", "instruction"):
        more = dict(text_encoder=str(bases["text"]), max_sequence_length=24) if name == "instruction" else {}
        adapter_of(make(name, base="plain", **more), tmp_path / name)
    parts = load(bases["text"])
    pipe = load(bases["plain"], tokenizer=parts.tokenizer, text_encoder=parts.text_encoder)
    plain = generate(pipe)
    with pytest.raises(ValueError, match="this pipeline's model takes no actions: load an adapter"):
        generate(pipe, actions=plan_of(0.5))
    pipe.load_lora_weights(tmp_path / "action", adapter_name="action")
    with pytest.raises(ValueError, match="this pipeline's model needs actions=: the actions that lead from frame"):
        generate(pipe)
    with pytest.raises(ValueError, match=r"actions must be \[8, 7\] for 9 frames.*got \(7, 7\)"):
        generate(pipe, actions=plan_of(0.5, 7))
    with pytest.raises(ValueError, match="the action 'x' goes from"):
        generate(pipe, actions=plan_of(40.0))
    right, left = (generate(pipe, actions=plan_of(speed)) for speed in (0.5, -0.5))
    assert not torch.equal(right, left)
    both = generate(pipe, actions=[plan_of(0.5), plan_of(-0.5)])
    assert torch.equal(both, torch.cat([right, left]))
    pipe.load_lora_weights(tmp_path / "instruction", adapter_name="instruction")
    assert pipe.config.max_sequence_length == 24

    def tell(pipe, text):
        drawn = dict(temperature=1.0, top_p=1.0, generator=torch.Generator().manual_seed(0))
        return generate(pipe, actions=plan_of(0.5), prompt=text, **drawn)

    told = [tell(pipe, text) for text in ("a robot arm", "the red cube")]
    assert not torch.equal(*told)
    with pytest.raises(ValueError, match="adapters action, instruction are loaded: call fuse_lora"):
        pipe.save_pretrained("nowhere")
    pipe.set_adapters("action", 0.0)
    assert torch.equal(generate(pipe, actions=plan_of(0.5)), plain)
    pipe.disable_lora()
    assert torch.equal(generate(pipe), plain)
    pipe.enable_lora()
    pipe.set_adapters(["action", "instruction"])
    assert torch.equal(tell(pipe, "the red cube"), told[1])
    pipe.fuse_lora()
    assert torch.equal(tell(pipe, "the red cube"), told[1])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    again = load(tmp_path / "fused")
    assert torch.equal(tell(again, "the red cube"), told[1])
    with pytest.raises(ValueError, match="brings action_dim, which this pipeline's transformer has already"):
        again.load_lora_weights(tmp_path / "action")


def test_unloading_gives_back_the_base(make, bases, tmp_path):
    adapter_of(make("action", base="plain"), tmp_path / "adapter")
    pipe = load(bases["plain"])
    plain = generate(pipe)
    pipe.load_lora_weights(tmp_path / "adapter")
    assert not torch.equal(generate(pipe, actions=plan_of(0.5)), plain)
    pipe.unload_lora_weights()
    assert pipe.transformer.conditions == () and torch.equal(generate(pipe), plain)
    pipe.save_pretrained(tmp_path / "again")


def test_a_call_takes_the_rate_and_the_length_of_the_adapter(make, bases, tmp_path):
    adapter_of(make("action", base="plain"), tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "conditions.json").read_text())
    record["settings"] |= dict(num_frames=5, fps=10.0)
    (tmp_path / "adapter" / "conditions.json").write_text(json.dumps(record))
    replace(ActionSpec.load(tmp_path / "adapter"), rate=10).save(tmp_path / "adapter")
    pipe = load(bases["plain"])
    pipe.load_lora_weights(tmp_path / "adapter")
    result = pipe(image=torch.zeros(3, 1, 32, 32, dtype=torch.uint8), actions=plan_of(0.5, 4), output_type="latent")
    assert result.fps == 10 and result.frames.shape[1] == 2


def test_long_worlds_are_driven_window_by_window(make, bases, tmp_path):
    """29 frames are 8 latent ones in windows of 3: an action changes nothing before its latent frame, whatever the window."""
    adapter_of(make("action", base="plain"), tmp_path / "adapter")
    pipe = load(bases["plain"])
    pipe.load_lora_weights(tmp_path / "adapter")
    actions = plan_of(0.2, 28)
    before = generate(pipe, num_frames=29, actions=actions)
    assert before.shape == (1, 8, 4, 4)
    for step in (4, 15, 26):
        other = actions.copy()
        other[step:, 0] = -0.5
        after, frame = generate(pipe, num_frames=29, actions=other), 1 + step // 4
        assert torch.equal(after[:, :frame], before[:, :frame])
        assert not torch.equal(after[:, frame], before[:, frame]), step
    drafted = generate(pipe, num_frames=29, actions=actions, draft="previous_frame")
    assert torch.equal(drafted, before)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "base", "precision"),
    [(4, "text", "float32"), (0, "plain", "float32"), (4, "plain", "bfloat16"), (4, "plain", "nf4")],
)
def test_script(bases, data, cache, tmp_path, rank, base, precision, request):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    AcceleratorState._reset_state()  # which keeps the first run's precision
    request.addfinalizer(AcceleratorState._reset_state)
    precise = f"--base_precision {precision} --mixed_precision {'bf16' if precision == 'bfloat16' else 'no'}"
    runpy.run_path(str(SCRIPT))["main"](
        f"--family autoregressive --init_from {bases[base]} --data {data} --val_data {data} --output_dir {tmp_path / 'run'} "
        f"--cache_dir {cache} --conditions action {'instruction' if base == 'text' else ''} --action_spec bridge "
        f"--lora_rank {rank} --batch_size 3 --max_steps 2 --log_every 1 --progress false {precise}".split()
    )
    export = tmp_path / "run" / "export"
    if rank:
        pipe = load(bases[base])
        pipe.load_lora_weights(export)
        assert ActionSpec.load(export).normalisation == "quantile"
    else:
        pipe = load(export)
    assert pipe.action_spec.rate == 5
    assert generate(pipe, actions=plan_of(0.25)).shape == (1, 3, 4, 4)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert f"val_{data.name}_sensitivity_action" in log[-1]
