"""`pipelines/evaluate_model.py` on adapters: clips as they were trained on, plans, poses and Frechet distances."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.action import ActionSpec
from cosmos_hf.conditioning.camera_paths import joystick_path
from cosmos_hf.data.video import write_video
from cosmos_hf.evaluation import geometry
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.training.action_specs import find_action_spec
from cosmos_hf.training.diffusion import Texts, build_datasets
from cosmos_hf.training.posttrain import ConditionBatches, PosttrainConfig, build_model, export_adapter
from feature_files import write_feature_files

SCRIPT = Path(__file__).parents[1] / "pipelines" / "evaluate_model.py"
FPS = 10


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two starts with two plans each: 13 frames of 64x96 at 10 Hz of a bar that moves to one side or the other."""
    folder = tmp_path_factory.mktemp("val_counterfactual")
    for i in range(4):
        way = 1 if i % 2 else -1
        frames = torch.full((3, 13, 64, 96), 60, dtype=torch.uint8)
        for t in range(13):
            frames[0, t, 16:48, 40 + 3 * way * t : 56 + 3 * way * t] = 220
        write_video(folder / f"{i}.mp4", frames, FPS, crf=10)
        told = dict(caption="a robot arm", plan=["left", "right"][i % 2], scene={"number": i // 2})
        (folder / f"{i}.json").write_text(json.dumps(told))
        poses = joystick_path(np.tile([0.1 * way, 0.0, 0, 0, 0, 0], (12, 1))).numpy()
        intrinsics = np.array([[80.0, 0, 48], [0, 80, 32], [0, 0, 1]])
        actions = np.full((12, 2), 0.1 * way)
        np.savez(folder / f"{i}.npz", intrinsics=intrinsics, extrinsics=poses, actions=actions)
    return folder


@pytest.fixture
def adapter(base, clips, tmp_path):
    """Adapters for clips of 32x48; those in use have random weights in place of the zeros that they start with."""

    def export(*conditions, used=False, **more):
        ActionSpec(
            names=("x", "y"), units=("m", "m"), frame="robot base", kind="delta", rate=FPS, embodiment="arm"
        ).save(tmp_path)
        known = dict(
            data=[str(clips)], init_from=str(base), output_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")
        )
        known |= dict(conditions=list(conditions), lora_rank=2, height=32, width=48, progress=False)
        known |= dict(action_spec=str(tmp_path), trajectory_points=4)
        config = PosttrainConfig(**known | more)
        vae = CosmosVideoTokenizer.from_pretrained(config.vae)
        data, _ = build_datasets(config, vae, False, config.arrays, config.cameras)
        batches = ConditionBatches(config, Texts(config, data.texts, []), vae, find_action_spec(config, data))
        model = build_model(config, batches.action_dim)
        for parameter in model.parameters() if used else ():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        export_adapter(model, tmp_path / "adapter", config, batches, data[0])
        return tmp_path / "adapter"

    return export


@pytest.fixture
def evaluate(base, clips, tmp_path):
    def run(adapter, *more, data=clips):
        known = ("--model", base, "--adapter", adapter, "--data", data, "--output", tmp_path / "out.json")
        known += ("--num_inference_steps", 2, "--guidance_scale", 0, "--device", "cpu", "--no_perceptual")
        known += ("--conditioning_frames", 1)
        runpy.run_path(str(SCRIPT))["main"]([str(value) for value in (*known, *more)])
        return json.loads((tmp_path / "out.json").read_text())[data.name]

    return run


def test_clips_are_read_as_an_adapter_was_trained(adapter, evaluate, clips, tmp_path, capsys):
    """Size and length are the adapter's, not the base's nor the clips'; points of a trajectory come from the poses."""
    figures = evaluate(adapter("trajectory", used=True))
    assert figures["clips"] == dict(count=4, height=32, width=48, num_frames=9, fps=FPS)
    assert figures["plans"]["generated"]["mean"] > 0.01 and "exchanged" in figures["from_1_frames"]
    assert "poses" not in figures["from_1_frames"] and "was trained at" not in capsys.readouterr().out
    figures = evaluate(adapter("action", num_frames=5))
    assert figures["clips"]["num_frames"] == 5
    slow = tmp_path / "slow"
    slow.mkdir()
    write_video(slow / "a.mp4", torch.full((3, 9, 64, 96), 60, dtype=torch.uint8), 5)
    np.savez(slow / "a.npz", states=np.zeros((9, 2)))
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "adapter", data=slow)
    assert "the model takes actions, which the clip 'a' does not have" in capsys.readouterr().err


def test_plans_that_are_ignored_and_plans_that_are_not(adapter, evaluate):
    """Two starts of two plans each. An adapter as it starts does the same whatever the plan."""
    ignored = evaluate(adapter("action"), "--plans", 4)["plans"]
    assert ignored["starts"] == ignored["plans"] == 2 and ignored["true"]["mean"] > 0.05
    assert ignored["generated"]["mean"] == ignored["ratio"]["mean"] == 0 and ignored["own_future"]["mean"] == 0.5
    used = evaluate(adapter("action", used=True), "--plans", 4)["plans"]
    assert used["ratio"]["mean"] == pytest.approx(used["generated"]["mean"] / used["true"]["mean"], rel=0.05)
    assert used["ratio"]["mean"] > 0.05
    assert "plans" not in evaluate(adapter("action"), "--plans", 0)
    assert "plans" not in evaluate(adapter("instruction"))  # nothing but text differs


def test_poses_are_recovered_or_it_is_said_why_not(adapter, evaluate, monkeypatch, capsys):
    folder = adapter("camera", used=True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pycolmap", None)
        poses = evaluate(folder)["from_1_frames"]["poses"]
    assert poses == {
        "skipped": "finding points and poses in pictures needs pycolmap: pip install 'cosmos-hf[geometry]'"
    }
    assert "val_counterfactual" in (told := capsys.readouterr().out) and "pip install 'cosmos-hf[geometry]'" in told
    pytest.importorskip("pycolmap", reason="needs the extra cosmos-hf[geometry]")
    monkeypatch.setattr(geometry, "ENLARGED_HEIGHT", 64)  # nothing can be recovered from bars
    poses = evaluate(folder, "--plans", 0)["from_1_frames"]["poses"]
    failed = dict(success_rate=0, count=4, rotation=None, translation=None, distance=None)
    assert poses == {"model": failed, "truth": failed}
    assert "poses" not in evaluate(folder, "--plans", 0, "--no_poses")["from_1_frames"]


def test_frechet_distances_of_the_frames_that_were_predicted(adapter, evaluate, tmp_path):
    _, i3d = write_feature_files(tmp_path)
    folder = adapter("action", used=True)
    figures = evaluate(folder, "--i3d", i3d, "--plans", 0)["from_1_frames"]["frechet"]
    assert figures == {"fvd": {"skipped": "needs 10 frames of each video, there are 8"}}
    longer = evaluate(adapter("action", used=True, num_frames=13), "--i3d", i3d, "--plans", 0)["from_1_frames"][
        "frechet"
    ]
    assert longer["fvd"]["count"] == 4 and longer["fvd"]["distance"] > 0
    with pytest.raises(SystemExit):
        evaluate(folder, "--inception", "no_such.pt")
