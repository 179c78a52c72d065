"""Following of instructions, judged on simulated clips: true renderings, still pictures, and other motions in their place."""

import json
import runpy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_hf.evaluation.instructions import (
    DIRECTIONS,
    Instruction,
    Table,
    evaluate_instructions,
    follow_objects,
    is_fulfilled,
    object_names,
    score_instruction,
    swap_instruction,
)
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from tiny_pipelines import SETTINGS, autoregressive, components

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)
from cosmos_hf.worlds import tabletop_objects
from cosmos_hf.worlds.captions import direction_in_view
from cosmos_hf.worlds.shards import sample_of
from cosmos_hf.worlds.tabletop import simulate

FRAMES, CLIPS = (
    17,
    (13, 6, 5),
)  # of val_combo: a push to the camera, a pick, a push to the left beside two other objects


@pytest.fixture(scope="module")
def episodes(renderer):
    return [simulate("val_combo", index, renderer=renderer, masks=True) for index in CLIPS]


@pytest.fixture(scope="module")
def samples(episodes):
    return samples_of(episodes)


def samples_of(episodes):
    found = []
    for clip in episodes:
        numbers = {name: torch.from_numpy(value) for name, value in clip.arrays().items()}
        camera = {"intrinsics": numbers["intrinsics"], "extrinsics": numbers["extrinsics"][:FRAMES]}
        video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[:, :FRAMES]
        cut = {name: numbers[name][:FRAMES] for name in ("masks", "object_positions")}
        record = {"scene": asdict(clip.scene)}
        found.append({"video": video, "caption": clip.caption, "record": record, "camera": camera, **cut})
    return found


def as_float(sample):
    return sample["video"].float() / 127.5 - 1


def test_objects_are_found_where_the_simulator_has_them(samples):
    for sample in samples:
        video = as_float(sample)
        paths = follow_objects(video, video[:, 0], sample["masks"][0])
        assert paths.shape == (len(object_names(sample)), FRAMES, 2)
        for i, path in enumerate(paths):
            y, x = torch.nonzero(sample["masks"][-1] == 2 + i, as_tuple=True)
            if not len(x):  # hidden in the end
                continue
            place = torch.stack([x.float().mean(), y.float().mean()]) + 0.5
            assert (path[-1] - place).norm() < 3, (sample["caption"], i)


def test_the_geometry_is_that_of_the_captions(samples):
    table = Table(samples[0]["camera"]["intrinsics"], samples[0]["camera"]["extrinsics"][0])
    start, rng = torch.tensor([0.1, 0.05, 0.03]), np.random.default_rng(0)
    for _ in range(8):
        move = torch.tensor([*rng.normal(0, 0.1, 2), 0.0]).float()
        seen = table.move(table.project(start), table.project(start + move), 0.03)
        torch.testing.assert_close(seen.float(), move, atol=1e-4, rtol=1e-3)
        words = max(DIRECTIONS, key=lambda words: table.share(seen, words))
        assert words == direction_in_view(move.numpy(), samples[0]["camera"]["extrinsics"][0, :3, :3].numpy())
    up = start + torch.tensor([0, 0, 0.05])
    assert table.rise(table.project(start), table.project(up), start) == pytest.approx(0.05, rel=0.1)


def test_truth_follows_and_a_still_picture_does_not(samples):
    figures = evaluate_instructions(lambda sample, caption, seed: as_float(sample), samples)
    assert figures["truth"]["followed"]["mean"] == figures["model"]["followed"]["mean"] == 1
    assert figures["truth"]["followed"]["count"] == len(CLIPS)
    assert all(figures["copy_last_frame"][key]["mean"] == 0 for key in ("object", "direction", "followed"))
    swapped = figures["swapped"]  # the same video for another instruction: a model that does not listen
    assert swapped["followed"]["mean"] == 0 and swapped["still_the_first"]["mean"] == 1
    assert swapped["changed"]["mean"] == 0


def test_things_that_move_by_themselves_are_judged_alike(renderer):
    clips = [tabletop_objects.simulate("val_iid", index, renderer=renderer, masks=True) for index in range(4)]
    assert {clip.caption.split()[0] for clip in clips} == {"Pick", "Push"}
    figures = evaluate_instructions(lambda sample, caption, seed: as_float(sample), samples_of(clips))
    assert figures["truth"]["followed"]["mean"] == 1 and figures["truth"]["followed"]["count"] == len(clips)
    assert figures["copy_last_frame"]["object"]["mean"] == figures["swapped"]["followed"]["mean"] == 0


def test_an_object_is_not_taken_for_one_of_a_near_colour():
    """An orange square passes a yellow one that rests, and hides it for a while."""
    frames, mask = torch.full((3, 12, 96, 128), 0.2), torch.zeros(96, 128, dtype=torch.long)
    for t in range(12):
        frames[:, t, 40:48, 50:58] = torch.tensor([0.9, 0.75, 0.1]).view(3, 1, 1)
        frames[:, t, 42:50, 30 + 5 * t : 38 + 5 * t] = torch.tensor([0.95, 0.55, 0.1]).view(3, 1, 1)
    mask[40:48, 50:58], mask[42:50, 30:38] = 2, 3
    rests, passes = follow_objects(frames * 2 - 1, frames[:, 0] * 2 - 1, mask)
    assert (rests - rests[0]).abs().max() < 4 and passes[-1, 0] - passes[0, 0] == pytest.approx(55, abs=1)


def test_noise_and_darkness_do_not_matter(samples):
    for sample in samples:
        video = as_float(sample)
        noisy = video + 0.06 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
        dark = (video + 1) * 0.8 - 1
        told = Instruction.of(sample["caption"])
        for shown in (noisy.clamp(-1, 1), dark):
            assert score_instruction(shown, sample, told, 1)["followed"] == 1, sample["caption"]


def test_the_wrong_object_or_way_is_seen(samples):
    """A push to the left, told to be another one's, or another way's."""
    sample = samples[CLIPS.index(5)]
    assert Instruction.of(sample["caption"]) == Instruction("orange cylinder", "to the left")
    video = as_float(sample)
    wrong = score_instruction(video, sample, Instruction("red cube", "to the left"), 1)
    assert wrong == {"object": 0.0, "direction": 0.0, "followed": 0.0}
    for way in set(DIRECTIONS) - {"to the left"}:
        score = score_instruction(video, sample, Instruction("orange cylinder", way), 1)
        assert score == {"object": 1.0, "direction": 0.0, "followed": 0.0}, way
    assert is_fulfilled(sample, Instruction("orange cylinder", "to the left"), 1)
    assert not is_fulfilled(sample, Instruction("orange cylinder", "to the right"), 1)
    assert not is_fulfilled(sample, Instruction("red cube", None), 1)


@pytest.mark.parametrize(
    ("caption", "names", "swapped"),
    [
        (
            "A robot arm picks up the red cube and puts it back, next to an orange ball.",
            ["red cube", "orange ball"],
            "A robot arm picks up the orange ball and puts it back, next to a red cube.",
        ),
        (
            "The robot arm pushes the pink ball off the table to the left.",
            ["pink ball"],
            "The robot arm pushes the pink ball off the table to the right.",
        ),
        ("A robot arm picks up the red cube and lifts it into the air.", ["red cube"], None),
    ],
)
def test_another_instruction_for_the_same_frame(caption, names, swapped):
    assert swap_instruction(caption, names) == swapped


def test_what_cannot_be_measured_is_left_out(samples):
    assert Instruction.of("A robot arm reaches for the red cube.") is None
    with pytest.raises(ValueError, match="asks for nothing that could be measured"):
        swap_instruction("A robot arm moves freely above the table.", ["red cube"])
    idle = samples[0] | {"caption": "A robot arm moves freely above the table."}
    with pytest.raises(ValueError, match="none of the 1 samples has an instruction that is fulfilled"):
        evaluate_instructions(lambda *_: None, [idle])
    for name in ("masks", "camera"):
        without = {key: value for key, value in samples[0].items() if key != name}
        with pytest.raises(ValueError, match=f"has no {name}: take a validation split of the table-top world"):
            evaluate_instructions(lambda *_: None, [without])


ROOT = Path(__file__).parents[2]


@pytest.fixture
def clips(episodes, tmp_path):
    (tmp_path / "clips").mkdir()
    for name, content in sample_of(episodes[0], "tabletop", "val_combo", CLIPS[0], 0, "classic").items():
        if name != "__key__":
            (tmp_path / "clips" / f"a.{name}").write_bytes(content)
    return tmp_path / "clips"


def evaluate(model, clips, *more):
    output = clips.parent / "out.json"
    runpy.run_path(str(ROOT / "pipelines" / "evaluate_model.py"))["main"](
        f"--model {model} --data {clips} --output {output} --num_clips 1 --conditioning_frames 1 --instructions "
        "--no_perceptual --device cpu".split()
        + [str(value) for value in more]
    )
    return json.loads(output.read_text())["clips"]


def train(base, clips, *more):
    """Two steps of an instruction adapter for clips of 64x96."""
    folder = clips.parent / "run"
    runpy.run_path(str(ROOT / "training" / "posttrain.py"))["main"](
        f"--init_from {base} --data {clips} --output_dir {folder} --cache_dir {clips.parent / 'cache'} --conditions instruction "
        f"--num_frames {FRAMES} --height 64 --width 96 --lora_rank 2 --batch_size 1 --max_steps 2 --log_every 1 "
        "--progress false".split()
        + [str(value) for value in more]
    )
    return folder / "export"


def test_the_script_puts_the_figures_into_its_file(clips, tmp_path):
    """A tiny model with random weights, which moves nothing as it is told."""
    settings = SETTINGS | dict(height=96, width=128, num_frames=FRAMES, num_inference_steps=1, max_sequence_length=48)
    CosmosVideo2WorldPipeline(**components("tiny-video2world"), **settings).save_pretrained(tmp_path / "model")
    figures = evaluate(tmp_path / "model", clips)["instructions"]
    assert figures["truth"]["followed"]["mean"] == 1 and figures["copy_last_frame"]["followed"]["mean"] == 0
    assert figures["model"]["followed"]["count"] == figures["swapped"]["followed"]["count"] == 1
    assert figures["swapped"]["changed"]["mean"] > 0


def test_an_instruction_adapter_from_clips_to_figures(clips, tmp_path):
    settings = SETTINGS | dict(num_inference_steps=1, max_sequence_length=48)
    CosmosVideo2WorldPipeline(**components("tiny-video2world"), **settings).save_pretrained(tmp_path / "model")
    figures = evaluate(
        tmp_path / "model", clips, "--adapter", train(tmp_path / "model", clips, "--max_condition_frames", 1)
    )
    assert figures["clips"] == dict(count=1, height=64, width=96, num_frames=FRAMES, fps=5)
    figures = figures["instructions"]
    assert figures["truth"]["followed"]["mean"] == 1 and figures["copy_last_frame"]["followed"]["mean"] == 0
    assert figures["model"]["followed"]["count"] == 1 and figures["swapped"]["changed"]["mean"] > 0


def test_an_autoregressive_base_that_knew_no_text(clips, tmp_path, capsys):
    """Its adapter reads the text with the encoder that it was trained with; without it nothing is measured."""
    model, encoder = tmp_path / "model", tmp_path / "text"
    autoregressive().save_pretrained(model)
    autoregressive(text=True).save_pretrained(encoder)
    with pytest.raises(SystemExit):
        evaluate(model, clips)
    assert "--instructions: this model reads no text" in capsys.readouterr().err
    adapter = train(model, clips, "--family", "autoregressive", "--text_encoder", encoder, "--max_sequence_length", 48)
    with pytest.raises(SystemExit):
        evaluate(model, clips, "--adapter", adapter)
    assert "has no text_encoder: give --text_encoder" in capsys.readouterr().err
    figures = evaluate(model, clips, "--adapter", adapter, "--text_encoder", encoder)["instructions"]
    assert figures["truth"]["followed"]["mean"] == 1 and figures["model"]["followed"]["count"] == 1
    assert "changed" in figures["swapped"]
