"""Post-training of a tiny pipeline on clips with actions and cameras, and its adapters in the pipelines."""

import json
import logging
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from cosmos_hf.conditioning.action import BRIDGE, ActionSpec
from cosmos_hf.conditioning.camera import CameraPath
from cosmos_hf.data.annotated import read_actions
from cosmos_hf.data.video import read_video, write_video
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.condition_adapters import GrownLinear
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.pipelines.conditions import action_vectors
from cosmos_hf.pipelines.rollout import rollout
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from cosmos_hf.training.action_specs import find_action_spec
from cosmos_hf.training.conditioned_loss import ConditionedLoss, validate_conditions
from cosmos_hf.training.diffusion import Texts, build_datasets
from cosmos_hf.training.loop import TrainingError, build_optimizer, fit
from cosmos_hf.training.posttrain import (
    ConditionBatches,
    PosttrainConfig,
    build_model,
    build_scheduler,
    check_step_zero,
    export_adapter,
)

SCRIPT = Path(__file__).parents[2] / "training" / "posttrain.py"
PROMPT = "a robot arm picks up the red cube"
INTRINSICS = np.array([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six clips of 13 frames of 32x48 at 5 Hz, each with its own constant motion to the right and a camera that follows it."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(6):
        frames = torch.full((3, 13, 32, 48), 60, dtype=torch.uint8)
        for t in range(13):
            frames[0, t, 8:24, (i - 2) * t + 18 : (i - 2) * t + 28] = 220
        write_video(folder / f"{i}.mp4", frames, 5, crf=10)
        (folder / f"{i}.txt").write_text(["a robot arm", "the red cube"][i % 2])
        actions = np.zeros((12, 7))
        actions[:, 0], actions[:, 6] = (i - 2) / 4, rng.uniform(size=12)
        extrinsics = np.tile(np.eye(4), (13, 1, 1))
        extrinsics[:, 0, 3] = (i - 2) * np.arange(13) / 8
        np.savez(folder / f"{i}.npz", actions=actions, extrinsics=extrinsics, intrinsics=INTRINSICS)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(base, data, cache, tmp_path):
    def settings(*conditions, **more):
        known = dict(data=[str(data)], init_from=str(base), output_dir=str(tmp_path / "run"), cache_dir=cache)
        known |= dict(conditions=list(conditions), action_spec="bridge", lora_rank=4, window_starts=[0, 4])
        known |= dict(batch_size=3, max_steps=4, warmup_steps=1, learning_rate=5e-3, log_every=1, progress=False)
        return PosttrainConfig(**(known | dict(max_condition_frames=1) | more))

    return settings


def assemble(config):
    torch.manual_seed(0)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    dataset, validation = build_datasets(config, vae, "instruction" in config.conditions, config.arrays)
    captions = [caption for part in validation.values() for caption in part.texts]
    batches = ConditionBatches(config, Texts(config, dataset.texts, captions), vae, find_action_spec(config, dataset))
    model = build_model(config, batches.action_dim)
    loss = ConditionedLoss(config, build_scheduler(config), model.transformer.takes_condition_mask)
    return model, loss, dataset, batches, validation


def adapter_of(config, folder):
    """An adapter whose parts are all in use."""
    model, _, _, batches, _ = assemble(config)
    for parameter in model.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    export_adapter(model, folder, config, batches)
    return model.transformer.eval()


@pytest.fixture(scope="module")
def adapters(base, data, cache, tmp_path_factory):
    """A folder of one adapter for each condition."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("action", "camera", "instruction"):
        known = dict(data=[str(data)], init_from=str(base), output_dir=str(root / "run"), cache_dir=cache)
        config = PosttrainConfig(**known, conditions=[name], action_spec="bridge", lora_rank=4, progress=False)
        adapter_of(config, root / name)
    return root


@pytest.fixture
def pipe(base):
    pipe = CosmosVideo2WorldPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def path_of(speed, frames=9):
    extrinsics = np.tile(np.eye(4), (frames, 1, 1))
    extrinsics[:, 0, 3] = speed * np.arange(frames)
    return CameraPath(INTRINSICS, extrinsics, 32, 48)


def plan_of(speed, steps=8):
    actions = np.zeros((steps, 7), dtype=np.float32)
    actions[:, 0], actions[:, 6] = speed, 0.5
    return actions


def generate(pipe, **more):
    settings = dict(
        image=torch.zeros(3, 1, 32, 48, dtype=torch.uint8), prompt=PROMPT, output_type="latent", guidance_scale=0
    )
    return pipe(**settings | dict(generator=torch.Generator().manual_seed(0)) | more).frames


# ---- data ------------------------------------------------------------------------------------------------------------


def test_a_sample_has_its_window_of_actions_and_cameras(make, data):
    _, _, dataset, batches, _ = assemble(make("action", "camera"))
    stored, starts = np.load(data / "3.npz"), set()
    for draw in range(8):
        sample = dataset[3, draw]
        start = (
            int(np.argmax([np.allclose(stored["actions"][s : s + 8, 6], sample["actions"][:, 6]) for s in (0, 4)])) * 4
        )
        starts.add(start)
        np.testing.assert_allclose(sample["actions"], stored["actions"][start : start + 8], rtol=1e-6)
        np.testing.assert_allclose(sample["camera"]["extrinsics"], stored["extrinsics"][start : start + 9], rtol=1e-6)
    assert starts == {0, 4}
    batch = batches.collate([dataset[i, 0] for i in range(3)])
    assert batch["actions"].shape == (3, 3, 28) and batch["camera"].shape == (3, 6, 3, 4, 6)
    assert batch["actions"][:, 0].abs().max() == 0 and batch["actions"][:, 1:].abs().max() > 0.1
    assert batch["camera"][:, :3, 0].abs().max() == 0  # the first camera stands in the origin


def test_clips_without_the_arrays_are_refused(make, tmp_path):
    write_video(tmp_path / "bare" / "a.mp4", torch.zeros(3, 13, 32, 48, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match=r"the clip has no actions; its arrays .*: none"):
        assemble(make("action", data=[str(tmp_path / "bare")]))


def test_captions_are_needed_for_instructions_only(make, data, tmp_path):
    for name in ("0.mp4", "0.npz", "1.mp4", "1.npz"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    _, loss, dataset, batches, _ = assemble(make("camera", data=[str(tmp_path)]))
    assert batches.collate([dataset[0]])["text"].abs().max() == 0
    with pytest.raises(ValueError, match="no caption: 0.txt"):
        assemble(make("instruction", data=[str(tmp_path)]))


def test_held_out_actions_may_go_further_than_the_training_data(make, data):
    """They are told of before the first step (`find_action_spec`) and do not end a validation."""
    _, _, dataset, batches, _ = assemble(make("action", "camera"))
    sample = dataset[0, 0]
    far = sample | {"actions": sample["actions"] + torch.tensor([9.0] + [0.0] * 6)}
    assert batches.spec.out_of_range(far["actions"])
    assert batches.collate([far])["actions"].isfinite().all()


# ---- model -----------------------------------------------------------------------------------------------------------


def test_step_zero_is_the_base_and_coverage_is_told(make, base, caplog):
    with caplog.at_level(logging.INFO):
        model = build_model(make("action", "camera"), 28)
    assert "LoRA of rank 4 in 2/2 blocks" in caplog.text and "step 0 is the base" in caplog.text
    trained = {name.split(".lora_")[0] for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert {"patch_embed.proj.added", "action_embed.offsets.linear_2.weight"} <= trained
    assert all(name.startswith(("transformer_blocks.", "action_embed.", "patch_embed.proj.added")) for name in trained)


def test_new_parts_may_learn_faster(make):
    config = make("action", "camera", condition_lr_scale=5.0)
    model = build_model(config, 28)
    optimizer = build_optimizer([p for p in model.parameters() if p.requires_grad], config, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    told = {name: rates[id(p)] for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert len(told) == len({id(p) for p in model.transformer.parameters() if p.requires_grad})
    assert {rate for name, rate in told.items() if "lora_" in name} == {0.1}
    assert {rate for name, rate in told.items() if "lora_" not in name} == {0.5}


def test_a_start_that_is_not_the_base_stops_the_run(base):
    transformer = CosmosWorldTransformer3D.from_pretrained(base / "transformer")
    with pytest.raises(TrainingError, match="step 0 must be the base, but the output is off by"), torch.no_grad():
        check_step_zero(transformer, lambda: transformer.proj_out.weight.data.mul_(1.01))


def test_training_leaves_the_base_as_it_is_to_the_bit(make, base, tmp_path):
    """Also under weight decay, of which the first layer's old columns are the delicate case."""
    config = make("action", "camera", weight_decay=0.5)
    model, loss, dataset, batches, _ = assemble(config)
    fit(model, loss, dataset, config, batches.collate, lambda model, folder: None)
    before = CosmosWorldTransformer3D.from_pretrained(base / "transformer").state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in model.transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.transformer.patch_embed.proj.added.abs().max() > 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"sensitivity_action", "sensitivity_camera"} <= log[-1].keys()
    assert log[0]["sensitivity_action"] < 1e-5 < log[-1]["sensitivity_action"]


def test_a_grown_layer_is_a_plain_one_in_two_parts():
    linear = torch.nn.Linear(10, 4, bias=False)
    grown = GrownLinear(linear, [slice(2, 5), slice(7, 8)])
    x = torch.randn(3, 10)
    torch.testing.assert_close(grown(x), linear(x))
    assert torch.equal(grown.added, linear.weight[:, [2, 3, 4, 7]])


def test_actions_are_learned_and_the_figures_show_it(make, data):
    """The clips differ by their motion, which only the actions tell: with the wrong ones the error is larger."""
    config = make("action", condition_dropout=0.0, lora_rank=8, learned_uncertainty=False, val_data=[str(data)])
    model, loss_of, dataset, batches, validation = assemble(config)
    batch = batches.collate([dataset[i, 0] for i in range(6)])
    batch["text"] = torch.zeros_like(batch["text"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    before = loss_of.sensitivity(model, batch)
    for step in range(60):
        torch.manual_seed(step % 4)
        loss, _ = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = torch.get_rng_state()
    after = loss_of.sensitivity(model, batch)
    assert torch.equal(state, torch.get_rng_state())
    assert before["sensitivity_action"] < 1e-5 and before["error_ratio_action"] == pytest.approx(1, abs=1e-5)
    assert after["sensitivity_action"] > 0.1 and after["error_ratio_action"] > 1.01
    figures = validate_conditions(model.eval(), loss_of, batches, validation, 2)
    assert figures[f"{data.name}_sensitivity_action"] > 0.1
    assert {f"{data.name}_denoising_given0", f"{data.name}_error_ratio_action"} <= figures.keys()


def test_dropped_conditions_are_not_seen(make):
    config = make("action", "camera", condition_dropout=0.999999, learned_uncertainty=False)
    model, loss_of, dataset, batches, _ = assemble(config)
    for parameter in model.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batches.collate([dataset[i, 0] for i in range(3)])
    losses = []
    for factor in (1, 2):
        torch.manual_seed(0)
        losses.append(loss_of(model, batch | {name: factor * batch[name] for name in ("actions", "camera")})[0])
    assert torch.equal(*losses)


def test_what_moves_may_count_more(make):
    _, plain, dataset, batches, _ = assemble(make("camera", learned_uncertainty=False))
    _, moved, *_ = assemble(make("camera", motion_weight=4.0, learned_uncertainty=False))
    latents = batches.collate([dataset[4]])["latents"]
    latents[..., :3] = latents[:, :, :1, :, :3]  # the left half stands still
    weights = moved.weights(latents, 1)
    assert plain.weights(latents, 1) is None and weights.mean() == pytest.approx(1)
    still, moving = weights[..., :3], weights[:, :, 1:, :, 3:]
    assert still.max() == weights[:, :, 0].max() == weights.min() and moving.max() / weights.min() > 2

    two = moved.weights(torch.cat([latents, 2 * latents], dim=2), 2)  # each view has its own first frame
    first = two[:, :, [0, latents.shape[2]]]
    assert first.max() == first.min() == two.min() < two.max()

    sigma, wrong = torch.ones(1), latents.clone()
    wrong[..., 3:] += 1  # where things move
    losses = [moved.scheduler.loss(wrong, latents, sigma, weights=w) for w in (weights, None)]
    assert losses[0] > 1.2 * losses[1]
    batch = batches.collate([dataset[4]])
    errors = []
    for loss in (moved, plain):
        torch.manual_seed(0)
        network = lambda hidden_states, *_, **__: (torch.zeros_like(hidden_states), None)  # noqa: E731
        errors.append(loss.losses(network, batch, None, torch.ones(1))[0])
    assert not torch.allclose(*errors)


def told(data, folder, alternatives):
    """The clips with what else their captions could have said."""
    for path in data.glob("*.mp4"):
        (folder / path.name).write_bytes(path.read_bytes())
        record = {"caption": path.with_suffix(".txt").read_text(), "alternatives": alternatives}
        path = folder / path.with_suffix(".json").name
        path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    return [str(folder)]


def test_another_text_is_made_to_matter(make, data, tmp_path):
    """Both errors are of the same noise; nothing is asked of dropped texts, nor beyond the margin."""
    config = make("instruction", data=told(data, tmp_path, ["the blue ball"]), contrast=2.0, learned_uncertainty=False)
    model, loss, dataset, batches, _ = assemble(config)
    assert dataset[0]["alternatives"] == ["the blue ball"] and "the blue ball" in dataset.texts
    batch, keep = batches.collate([dataset[i] for i in range(3)]), torch.ones(3)
    assert not torch.equal(batch["text"], batch["other_text"])
    counts = loss.equal_counts(batch, 1)
    errors = []
    for text in (batch["text"], batch["other_text"]):
        torch.manual_seed(0)
        errors.append(loss.losses(model, batch | {"text": text}, counts, keep)[0])
    torch.manual_seed(0)
    total, logs = loss.objective(model, batch, counts, keep)
    own, other = errors
    expected = own + 2 * (1.1 * own - other).clamp(min=0)
    torch.testing.assert_close(total, expected.mean())
    assert logs["contrast_ratio"] == pytest.approx(float(other.sum() / own.sum()), rel=1e-5)
    torch.manual_seed(0)
    untold = loss.objective(model, batch, counts, 0 * keep)[0]  # of dropped texts nothing is asked
    torch.manual_seed(0)
    torch.testing.assert_close(untold, loss.losses(model, batch, counts, 0 * keep)[0].mean())
    far = batch | {"other_text": 100 * batch["other_text"]}
    for parameter in model.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(0)
    assert loss.objective(model, far, counts, keep)[1]["contrast_ratio"] != pytest.approx(1, abs=1e-4)
    known = iter([torch.tensor([1.05, 2.0]), torch.ones(2)])  # with the other text, with the own one
    loss.losses = lambda *_: (next(known), None, torch.ones(2))
    total, _ = loss.objective(model, batch, counts, torch.ones(2))
    assert float(total) == pytest.approx(1 + 2 * 0.05 / 2)  # the second is beyond the margin


def test_held_out_clips_tell_whether_another_text_matters(make, data, tmp_path):
    clips = told(data, tmp_path, ["the blue ball", "a green cube"])
    model, loss, _, batches, validation = assemble(make("instruction", data=clips, val_data=clips, contrast=2.0))
    name = f"{tmp_path.name}_contrast_ratio"

    def measure():
        return validate_conditions(model.eval(), loss, batches, validation, 3)

    for layer in model.transformer.modules():
        if hasattr(layer, "lora_B"):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    first = measure()
    torch.rand(7)
    assert first == measure() and first[name] != 1
    loss._evaluate = lambda model, batch, counts: (batch["text"].abs().mean(), torch.ones(1))
    batch = batches.collate([validation[tmp_path.name][i] for i in range(3)])
    figures = loss.sensitivity(model, batch | {"other_text": 2 * batch["text"]})
    assert figures["contrast_ratio"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("alternatives", "message"),
    [
        (None, "has no alternatives;.* a list of texts in its json"),
        ("red", "'alternatives' in 0.json must be a list of texts, got 'red'"),
    ],
)
def test_contrast_needs_alternatives(make, data, tmp_path, alternatives, message):
    with pytest.raises(ValueError, match=message):
        assemble(make("instruction", data=told(data, tmp_path, alternatives), contrast=1.0))


def test_a_run_may_have_noise_levels_and_given_frames_of_its_own(make, base):
    of_base = CosmosEDMScheduler.from_pretrained(base, subfolder="scheduler").config
    kept, own = build_scheduler(make("camera")).config, build_scheduler(make("camera", p_mean=2.5)).config
    assert (kept.p_mean, kept.p_std) == (of_base.p_mean, of_base.p_std)
    assert (own.p_mean, own.p_std) == (2.5, of_base.p_std) and own.sigma_data == of_base.sigma_data

    _, loss, dataset, batches, _ = assemble(
        make("camera", min_condition_frames=1, max_condition_frames=2, batch_size=64)
    )
    batch = batches.collate([dataset[0]] * 64)
    assert set(loss.draw_counts(batch).tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("conditions", "more", "message"),
    [
        (("action",), dict(init_from=""), "post-training starts from a pipeline"),
        (("depth",), {}, "conditions must be one or several of camera, action, trajectory, instruction, views"),
        ((), {}, "conditions must be one or several of"),
        (("camera",), dict(guidance_scale=1.0), "guidance_scale cannot be set in post-training: the base's are kept"),
        (
            ("camera",),
            dict(min_condition_frames=2),
            "min_condition_frames must be in 0..max_condition_frames, got 2 of 1",
        ),
        (("camera",), dict(lora_rank=-1), "lora_rank must be >= 0"),
        (
            ("camera",),
            dict(condition_lr_scale=2.0, lora_rank=0),
            "condition_lr_scale must be positive and belongs to LoRA",
        ),
        (("camera",), dict(condition_dropout=1.0), r"condition_dropout must be in \[0, 1\)"),
        (
            ("camera",),
            dict(lora_targets=["to_q", "query"]),
            "'query' ends the name of no layer; a block has .*attn1.to_q",
        ),
        (("action",), dict(action_spec=""), "say what the actions mean: action_spec must be bridge, driving"),
        (
            ("camera",),
            dict(action_hidden_dim=24),
            "action_hidden_dim is of the MLPs of conditions: action or trajectory",
        ),
        (("camera",), dict(contrast=1.0), "contrast must be 0 or more, and is of conditions: instruction"),
        (("camera",), dict(motion_weight=-1.0), "motion_weight must be 0"),
        (("camera",), dict(text_refiner_layers=1), "text_refiner_layers .* is of conditions: instruction"),
        (("action",), dict(action_form="written"), "action_form must be one of intended, as_written"),
        (("action",), dict(action_form="as_written", max_condition_frames=2), "needs max_condition_frames 0 or 1"),
        (("camera",), dict(action_form="as_written"), "as_written is for conditions: action"),
        (("action",), dict(action_spec="driving"), "actions have 7 numbers, 2 are needed for car"),
    ],
)
def test_mistakes_are_refused(make, conditions, more, message):
    with pytest.raises(ValueError, match=message):
        assemble(make(*conditions, **more))


# ---- adapters in a pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 24])
def test_an_adapter_computes_what_was_trained(make, base, pipe, tmp_path, hidden):
    trained = adapter_of(make("action", "camera", action_hidden_dim=hidden), tmp_path / "adapter")
    pipe.load_lora_weights(tmp_path / "adapter")
    assert pipe.transformer.action_embed.offsets.linear_1.out_features == (
        hidden or 4 * trained.patch_embed.proj.weight.shape[0]
    )
    assert pipe.transformer.conditions == ("condition_mask", "camera", "actions")
    x, given = torch.randn(1, 16, 3, 4, 6), dict(condition_mask=torch.zeros(1, 1, 3, 4, 6))
    given |= dict(actions=torch.randn(1, 3, 28), camera=torch.randn(1, 6, 3, 4, 6))
    inputs = (x, torch.zeros(1), torch.randn(1, 5, 32))
    with torch.no_grad():
        expected, result = trained(*inputs, **given).sample, pipe.transformer(*inputs, **given).sample
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditions", [("action", "camera"), ("instruction",), ("trajectory",)], ids="+".join)
def test_a_run_goes_on_from_an_adapter(make, tmp_path, conditions, caplog):
    more = dict(text_refiner_layers=1) if "instruction" in conditions else {}
    more |= {} if "action" in conditions else dict(action_spec="")
    trained = adapter_of(make(*conditions, **more), tmp_path / "adapter")
    more["action_spec"] = ""
    with caplog.at_level("INFO"):
        model, _, _, batches, _ = assemble(make(*conditions, **more, init_adapter=str(tmp_path / "adapter")))
    assert f"going on from the adapter in {tmp_path / 'adapter'}" in caplog.text
    there, here = trained.state_dict(), model.transformer.state_dict()
    assert there.keys() == here.keys() and all(torch.equal(value, there[name]) for name, value in here.items())
    assert any(p.requires_grad for p in model.transformer.parameters())
    if batches.spec is not None:
        assert batches.spec == ActionSpec.load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(lora_targets=["to_q"]), "has not the layers of this run's lora_targets: .* weights differ"),
        (dict(action_spec="bridge"), "says itself what its actions mean: leave out action_spec=bridge"),
        (dict(action_hidden_dim=24), "adds .* to its base, this run adds .*action_hidden_dim"),
    ],
    ids=str,
)
def test_an_adapter_of_another_shape_is_not_gone_on_from(make, adapters, more, message):
    with pytest.raises(ValueError, match=message):
        assemble(make("action", **(dict(action_spec="", init_adapter=str(adapters / "action")) | more)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(lora_rank=2), "has lora_rank 4, this run 2"),
        (dict(lora_alpha=8.0), "has lora_alpha 16.0, this run 8.0"),
        (dict(lora_rank=0, lora_targets=["to_q"]), "lora_rank=0 would train the base's weights"),
    ],
    ids=str,
)
def test_another_rank_is_said_before_clips_are_read(make, adapters, more, message):
    with pytest.raises(ValueError, match=message):
        make("action", **(dict(action_spec="", init_adapter=str(adapters / "action")) | more))


def test_a_folder_without_an_adapter_is_said_before_clips_are_read(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="conditions.json is missing: init_adapter must be a folder"):
        make("action", init_adapter=str(tmp_path))


def test_an_adapter_may_read_the_text_once_more(make, pipe, tmp_path):
    plain = generate(pipe)
    trained = adapter_of(make("instruction", text_refiner_layers=1), tmp_path / "adapter")
    inputs = torch.randn(1, 16, 3, 4, 6), torch.zeros(1), torch.randn(1, 5, 32)
    mask = dict(condition_mask=torch.zeros(1, 1, 3, 4, 6))
    pipe.load_lora_weights(tmp_path / "adapter", adapter_name="told")
    with torch.no_grad():
        expected, result = trained(*inputs, **mask).sample, pipe.transformer(*inputs, **mask).sample
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    adapted = generate(pipe)
    assert (adapted - plain).abs().max() > 1e-2
    pipe.fuse_lora()
    torch.testing.assert_close(generate(pipe), adapted, atol=1e-3, rtol=1e-3)
    pipe.unfuse_lora()
    pipe.set_adapters("told", 0.0)
    torch.testing.assert_close(generate(pipe), plain, atol=1e-4, rtol=1e-4)
    pipe.unload_lora_weights()
    assert pipe.transformer.text_refiner is None and pipe.transformer.config.text_refiner_layers == 0
    torch.testing.assert_close(generate(pipe), plain, atol=1e-4, rtol=1e-4)


def test_a_pipeline_adds_up_actions_as_the_training_did(make, pipe, data, tmp_path):
    config = make("action", accumulate_actions=True)
    model, _, dataset, batches, _ = assemble(config)
    export_adapter(model, tmp_path / "adapter", config, batches)
    pipe.load_lora_weights(tmp_path / "adapter")
    sample = dataset[3, 1]
    trained_on = batches.collate([sample])["actions"]
    assert trained_on.shape == (1, 3, 56) and pipe.transformer.config.action_dim == 56
    torch.testing.assert_close(action_vectors(pipe, sample["actions"], 9, 5.0), trained_on)
    led_to = trained_on[0].view(3, 4, 14)[1:, :, 7].flatten()
    assert led_to.min() > 0 and (led_to.diff() > 0).all()  # a constant motion goes ever farther
    assert generate(pipe, actions=plan_of(0.25)).shape[2] == 3


def test_the_papers_form_is_trained_on_the_next_action_alone(make, pipe, tmp_path):
    config = make("action", action_form="as_written")
    model, _, dataset, batches, _ = assemble(config)
    sample = dataset[3, 1]
    trained_on = batches.collate([sample])["actions"]
    assert trained_on.shape == (1, 1, 7) and model.transformer.config.action_form == "as_written"
    export_adapter(model, tmp_path / "adapter", config, batches, sample)
    pipe.load_lora_weights(tmp_path / "adapter")
    torch.testing.assert_close(action_vectors(pipe, sample["actions"][:1], 9, 5.0), trained_on)
    assert generate(pipe, actions=plan_of(0.25, 1)).shape[2] == 3


def test_several_adapters_at_once_alone_and_unloaded(pipe, adapters):
    """The inputs that the pipeline asks for are those of the active adapters, and without any it is the base, to the bit."""
    plain = generate(pipe)
    for name in ("action", "camera", "instruction"):
        pipe.load_lora_weights(adapters / name, adapter_name=name)
    given = dict(actions=plan_of(0.5), camera=path_of(0.2))
    both = generate(pipe, **given)
    assert (both - plain).abs().max() > 1e-3
    for name, other in (("actions", plan_of(-0.5)), ("camera", path_of(-0.3))):
        assert (generate(pipe, **given | {name: other}) - both).abs().max() > 1e-4, name
    with pytest.raises(ValueError, match="model needs camera=: a CameraPath"):
        generate(pipe, actions=plan_of(0.5))
    pipe.set_adapters(["action", "instruction"], [1.0, 0.5])
    with pytest.raises(ValueError, match="model takes no camera: load an adapter that was post-trained with it"):
        generate(pipe, **given)
    generate(pipe, actions=plan_of(0.5))
    pipe.set_adapters("action", 0.0)
    torch.testing.assert_close(generate(pipe, actions=plan_of(0.5)), plain, atol=1e-4, rtol=1e-4)
    pipe.disable_lora()
    assert torch.equal(generate(pipe), plain)
    pipe.enable_lora()
    pipe.delete_adapters("action")
    assert pipe.action_spec is None and set(pipe.get_list_adapters()["transformer"]) == {"camera", "instruction"}
    pipe.set_adapters(["camera", "instruction"])
    with pytest.raises(ValueError, match="adapters camera, instruction are loaded: call fuse_lora"):
        pipe.save_pretrained("nowhere")
    pipe.unload_lora_weights()
    assert pipe.transformer.conditions == ("condition_mask",)
    assert torch.equal(generate(pipe), plain)


def test_fused_adapters_stay_and_are_saved(pipe, adapters, tmp_path):
    for name in ("action", "camera"):
        pipe.load_lora_weights(adapters / name, adapter_name=name)
    given = dict(actions=plan_of(0.5), camera=path_of(0.2))
    expected = generate(pipe, **given)
    pipe.fuse_lora()
    torch.testing.assert_close(generate(pipe, **given), expected, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    again = CosmosVideo2WorldPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(again, **given), expected, atol=1e-4, rtol=1e-4)
    assert again.action_spec.names == BRIDGE.names
    again.load_lora_weights(adapters / "instruction")
    with pytest.raises(ValueError, match="brings action_dim, which this pipeline's transformer has already"):
        again.load_lora_weights(adapters / "action", adapter_name="second")


def test_unfused_adapters_act_as_before(pipe, adapters):
    for name in ("action", "camera"):
        pipe.load_lora_weights(adapters / name, adapter_name=name)
    pipe.set_adapters(["action", "camera"], [0.7, 1.0])
    given = dict(actions=plan_of(0.5), camera=path_of(0.2))
    expected = generate(pipe, **given)
    pipe.fuse_lora(lora_scale=0.5)
    assert (generate(pipe, **given) - expected).abs().max() > 1e-2
    pipe.unfuse_lora()
    torch.testing.assert_close(generate(pipe, **given), expected, atol=1e-4, rtol=1e-4)


def test_what_fused_weights_cannot_do_is_refused(pipe, adapters):
    pipe.load_lora_weights(adapters / "action", adapter_name="action")
    pipe.load_lora_weights(adapters / "instruction", adapter_name="instruction")
    with pytest.raises(ValueError, match="instruction would not act beside fused adapters: fuse them too"):
        pipe.fuse_lora(adapter_names=["action"])
    pipe.fuse_lora()
    for refused in (
        pipe.disable_lora,
        pipe.fuse_lora,
        lambda: pipe.set_adapters(["action"], [0.5]),
        lambda: pipe.delete_adapters("action"),
        lambda: pipe.load_lora_weights(adapters / "camera"),
    ):
        with pytest.raises(ValueError, match=r"adapters action, instruction are fused .*: call unfuse_lora\(\) first"):
            refused()
    pipe.unfuse_lora()
    pipe.delete_adapters("action")
    assert pipe.transformer.conditions == ("condition_mask",)


def told_settings(folder, target, **settings):
    """A copy of an adapter that says what it was trained at."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    record = json.loads((target / "conditions.json").read_text())
    (target / "conditions.json").write_text(json.dumps(record | {"settings": settings}))
    if (target / "action_spec.json").exists():
        replace(ActionSpec.load(target), rate=settings["fps"]).save(target)
    return target


def test_calls_take_what_an_adapter_was_trained_at(base, pipe, adapters, tmp_path, caplog):
    """Rate, size and length: of the adapter while it acts, of the pipeline when it was fused, and named where two disagree."""
    trained = dict(height=64, width=64, num_frames=5, fps=10.0)
    camera = told_settings(adapters / "camera", tmp_path / "camera", **trained)
    action = told_settings(adapters / "action", tmp_path / "action", **trained)
    slow = told_settings(adapters / "action", tmp_path / "slow", **trained | dict(fps=2.0))

    def call(pipe=pipe, **more):
        image = torch.zeros(3, 1, 64, 64, dtype=torch.uint8)
        return pipe(image=image, prompt=PROMPT, output_type="latent", guidance_scale=0, **more)

    pipe.load_lora_weights(action, adapter_name="action")
    result = call(actions=plan_of(0.5, 4))
    assert result.fps == 10 and result.frames.shape[2:] == (2, 8, 8)
    assert call(actions=plan_of(0.5), num_frames=9).frames.shape[2:] == (3, 8, 8)
    assert call(actions=plan_of(0.5, 4), resolution="16:9").frames.shape[-1] > 8
    world = rollout(
        pipe,
        tmp_path / "world.mp4",
        9,
        image=torch.zeros(3, 1, 64, 64, dtype=torch.uint8),
        actions=plan_of(0.5),
        overlap=1,
    )
    assert world.fps == 10 and read_video(world.path).frames.shape == (3, 9, 64, 64)
    pipe.disable_lora()
    assert call().fps == 5
    pipe.enable_lora()
    pipe.load_lora_weights(camera, adapter_name="camera")
    given = dict(actions=plan_of(0.5, 4), camera=path_of(0.1, 5))
    assert call(**given).fps == 10
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    again = CosmosVideo2WorldPipeline.from_pretrained(tmp_path / "fused")
    assert {name: again.config[name] for name in trained} == trained and call(again, **given).fps == 10

    pipe = CosmosVideo2WorldPipeline.from_pretrained(base)
    pipe.load_lora_weights(camera, adapter_name="camera")
    pipe.load_lora_weights(slow, adapter_name="slow")
    with pytest.raises(ValueError, match=r"trained at different fps \('camera' 10.0, 'slow' 2.0\): give fps="):
        call(pipe, **given)
    assert call(pipe, fps=2, **given).fps == 2
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (
        "fused adapters were trained at different fps ('camera' 10.0, 'slow' 2.0): the pipeline keeps" in caplog.text
    )
    assert pipe.config.fps == 5 and pipe.config.num_frames == 5


def test_a_bundled_adapter_has_an_example_of_what_steers_it(pipe, adapters, data, tmp_path):
    main = runpy.run_path(str(SCRIPT.with_name("bundle_model.py")))["main"]
    for name in ("action", "camera", "instruction"):
        main(["--export", str(adapters / name), "--clips", str(data), "--clip", "1", "--target", str(tmp_path / name)])
    assert not (tmp_path / "instruction" / "example.npz").exists()
    pipe.load_lora_weights(tmp_path / "action")
    first = read_video(tmp_path / "action" / "example.mp4", num_frames=1).frames
    actions = read_actions(tmp_path / "action" / "example.npz", 9)
    assert actions.shape == (8, 7) and generate(pipe, image=first, actions=actions).shape[2] == 3
    with np.load(tmp_path / "camera" / "example.npz") as archive:
        assert archive["extrinsics"].shape == (9, 4, 4) and "actions" not in archive.files
    stored = load_file(tmp_path / "camera" / "conditions.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_adapters_that_do_not_fit_are_refused(pipe, adapters, base, tmp_path):
    pipe.load_lora_weights(adapters / "camera", adapter_name="one")
    before = generate(pipe, camera=path_of(0.1))
    with pytest.raises(ValueError, match="adapters 'one' and 'two' both bring camera_channels"):
        pipe.load_lora_weights(adapters / "camera", adapter_name="two")
    with pytest.raises(ValueError, match="an adapter 'one' is loaded already"):
        pipe.load_lora_weights(adapters / "action", adapter_name="one")
    with pytest.raises(ValueError, match="no adapter three is loaded; there is one"):
        pipe.set_adapters(["three"])

    def copy(change, file="conditions.json"):
        for path in (adapters / "action").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        change(tmp_path / file)

    def other_base(path):
        record = json.loads(path.read_text())
        record["base"]["num_layers"] = 28
        path.write_text(json.dumps(record))

    def rename(path):
        save_file({k.replace("attn1", "attn9"): v for k, v in load_file(path).items()}, path)

    for message, change in (
        ("trained on another kind of base: num_layers 2, needed 28", (other_base,)),
        ("weights are for layers that this transformer does not have", (rename, "pytorch_lora_weights.safetensors")),
        ("the adapter lacks the weight action_embed", (lambda path: save_file({}, path), "conditions.safetensors")),
    ):
        copy(*change)
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tmp_path, adapter_name="action")
    copy(Path.unlink, "action_spec.json")
    with pytest.raises(FileNotFoundError, match="nobody knows what the model's actions mean"):
        pipe.load_lora_weights(tmp_path, adapter_name="action")
    assert torch.equal(generate(pipe, camera=path_of(0.1)), before)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "precision"), [(4, "float32"), (0, "float32"), (4, "bfloat16"), (4, "nf4")], ids=str)
def test_script(base, data, cache, tmp_path, rank, precision, pipe, request):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    AcceleratorState._reset_state()  # which keeps the first run's precision
    request.addfinalizer(AcceleratorState._reset_state)
    precise = f"--base_precision {precision} --mixed_precision {'bf16' if precision == 'bfloat16' else 'no'}"
    runpy.run_path(str(SCRIPT))["main"](
        f"--init_from {base} --data {data} --val_data {data} --output_dir {tmp_path / 'run'} --cache_dir {cache} "
        f"--conditions action camera --action_spec bridge --lora_rank {rank} --batch_size 3 --max_steps 2 --log_every 1 "
        f"--progress false --max_condition_frames 1 {precise}".split()
    )
    export = tmp_path / "run" / "export"
    if rank:
        pipe.load_lora_weights(export)
        assert ActionSpec.load(export).normalisation == "quantile"
    else:
        pipe = CosmosVideo2WorldPipeline.from_pretrained(export)
        pipe.set_progress_bar_config(disable=True)
    assert pipe.action_spec.rate == 5
    assert generate(pipe, actions=plan_of(0.5), camera=path_of(0.2)).shape == (1, 16, 3, 4, 6)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert f"val_{data.name}_sensitivity_camera" in log[-1]


def test_two_processes_are_one_run(base, data, cache, tmp_path, pipe):
    """They find each other before the latents are coded, log once and export one adapter."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1] / "src")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    flags = f"--init_from {base} --data {data} --output_dir {tmp_path} --cache_dir {cache} --conditions camera --lora_rank 4"
    flags += " --batch_size 2 --max_steps 2 --log_every 1 --progress false --max_condition_frames 1"
    subprocess.run([*launcher, *flags.split()], check=True, env=environment, timeout=120)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    pipe.load_lora_weights(tmp_path / "export")
    assert "camera" in pipe.transformer.conditions
