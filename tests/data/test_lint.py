"""Every fault that lint knows, put into an otherwise clean data set; and a clean one, of which nothing is said."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cosmos_hf.__main__ import main
from cosmos_hf.conditioning.action import ActionSpec
from cosmos_hf.data.clips import open_clips
from cosmos_hf.data.lerobot_writer import LeRobotWriter
from cosmos_hf.data.lint import lint
from cosmos_hf.data.video import write_video

SPEC = ActionSpec(("x", "y"), ("m", "m"), "robot base", "delta", 5.0)
Y, X = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")


def pictures(camera, number, frames=9):
    """A still scene of its own for each camera, in which a bright square moves."""
    scene = torch.stack([2 * X + 60, 3 * Y + 40, X + Y] if camera == 0 else [200 - 3 * Y, 60 + X, 150 - X - Y])
    video = scene[:, None].repeat(1, frames, 1, 1).clamp(0, 255).to(torch.uint8)
    for t in range(frames):
        video[:, t, 8:16, (4 + 3 * t + number) % 36 :][..., :8] = 250
    return video


def actions(number, frames=9, width=2):
    return np.random.default_rng(number).normal(0, 0.1, (frames - 1, width))


def write_folder(root, faults=None):
    """Six clips; `faults`: number of a clip -> dict of what to change."""
    root.mkdir(exist_ok=True)
    for number in range(6):
        fault = (faults or {}).get(number, {})
        frames = fault.get("frames", 9)
        video = fault.get("video", pictures(0, number, frames))
        write_video(root / f"{number}.mp4", video, fault.get("fps", 5), crf=5)
        record = {
            "caption": fault.get("caption", f"clip {number}"),
            "actions": fault.get("actions", actions(number, frames)).tolist(),
        }
        (root / f"{number}.json").write_text(json.dumps(record))
    return root


def write_views(root, faults=None):
    with LeRobotWriter(root, 5, SPEC) as writer:
        for number in range(6):
            videos = {"top": pictures(0, number), "wrist": pictures(1, number)} | (faults or {}).get(number, {})
            writer.add(videos, actions(number), task=f"clip {number}")
    return root


def test_nothing_is_said_of_clean_data(tmp_path, capsys):
    assert lint(write_folder(tmp_path / "a"), num_frames=9, temporal_compression=4, spec=SPEC) == []
    assert lint(write_views(tmp_path / "b"), num_frames=9) == []
    assert main(["lint", str(tmp_path / "a"), "--num_frames", "9"]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings\n"


FAULTS = [
    ({"frames": 6, "actions": actions(0, 9)}, "cannot be read: actions has 8 entries for 6 frames, 5 are needed"),
    ({"frames": 5}, "shorter than 9 frames, down to 5"),
    ({"fps": 10}, "frame rates differ: 5, 10"),
    ({"caption": ""}, "captions are missing or empty"),
    ({"actions": actions(0, width=3)}, "actions have 3 numbers, in most clips 2"),
    ({"actions": 1000 * actions(0)}, "actions: number 0 is out of scale"),
    ({"actions": np.full((8, 2), np.nan)}, "cannot be read: actions holds NaN"),
    ({"video": torch.full((3, 9, 32, 48), 12, dtype=torch.uint8)}, "the camera is dead"),
    ({"video": pictures(0, 0)[:, :1].repeat(1, 9, 1, 1)}, "the camera is frozen"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[words[:24] for _, words in FAULTS])
def test_faults_of_a_clip(tmp_path, fault, words):
    findings = lint(write_folder(tmp_path / "set", {2: fault}), num_frames=9)
    told = [finding for finding in findings if words in str(finding)]
    assert told and told[0].level == "error", findings
    assert "rates" in words or told[0].clips == ("2",)


def test_faults_of_the_whole(tmp_path):
    same = {number: {"caption": "a robot", "actions": actions(number) * [1, 0]} for number in range(6)}
    said = " ".join(map(str, lint(write_folder(tmp_path / "a", same))))
    assert "all clips have one caption" in said and "number 1 is always 0" in said
    odd = {number: {"frames": 8} for number in range(6)}
    assert "not 1 + k * 4 (8)" in str(lint(write_folder(tmp_path / "b", odd), temporal_compression=4)[0])
    sizes = {3: {"video": pictures(0, 3)[..., :40]}}
    assert "differ in size (height x width): 32x40, 32x48" in str(lint(write_folder(tmp_path / "c", sizes))[0])
    file = tmp_path / "c" / "1.mp4"
    file.write_bytes(file.read_bytes()[:600])
    assert any(f.level == "error" and "cannot be read" in f.what and f.clips == ("1",) for f in lint(tmp_path / "c"))


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({3: {"top": pictures(1, 3), "wrist": pictures(0, 3)}}, "cameras 'top' and 'wrist' look swapped"),
        ({3: {"wrist": pictures(0, 3)}}, "cameras 'top' and 'wrist' show the same picture"),
        ({3: {"wrist": torch.zeros(3, 9, 32, 48, dtype=torch.uint8)}}, "camera 'wrist' is dead"),
        ({3: {"wrist": pictures(1, 3)[:, :1].repeat(1, 9, 1, 1)}}, "camera 'wrist' is frozen"),
    ],
)
def test_faults_of_cameras(tmp_path, faults, words):
    findings = lint(write_views(tmp_path / "set", faults))
    assert [(f.level, f.clips) for f in findings if words in f.what] == [("error", ("episode_000003",))], findings


def test_cameras_of_different_sizes_hide_nothing_else(tmp_path):
    """Training with a height and width reads them; the other checks go on."""
    faults = {n: {"wrist": pictures(1, n).repeat_interleave(2, -1).repeat_interleave(2, -2)} for n in range(6)}
    assert [str(finding) for finding in lint(write_views(tmp_path / "clean", faults))] == [
        "warning: cameras differ in size (height x width): top 32x48, wrist 64x96; to read them together set height and width, "
        "to read one set camera"
    ]
    faults[3]["top"] = torch.zeros(3, 9, 32, 48, dtype=torch.uint8)
    findings = lint(write_views(tmp_path / "set", faults), num_frames=17)
    assert [finding.level for finding in findings] == ["error", "error", "warning"]
    assert "shorter than 17 frames" in findings[0].what and "camera 'top' is dead" in findings[1].what
    assert findings[1].clips == ("episode_000003",)


def test_episodes_are_looked_at_frame_by_frame(tmp_path, monkeypatch):
    """None lies in memory whole, however long."""

    def read_video(*_):
        raise AssertionError("all frames at once")

    monkeypatch.setattr("cosmos_hf.data.samples.read_video", read_video)
    assert lint(write_views(tmp_path / "a")) == lint(write_folder(tmp_path / "b")) == []


def test_a_broken_stream_and_a_missing_file(tmp_path):
    root = write_views(tmp_path / "set")
    videos = sorted((root / "videos/observation.images.top").rglob("*.mp4"))
    videos[1].write_bytes(b"no video")
    videos[4].unlink()
    broken = [f for f in lint(root) if "cannot be read" in f.what]
    assert sorted(f.clips for f in broken) == [("episode_000001",), ("episode_000004",)]


def test_actions_against_the_spec_of_a_checkpoint(tmp_path, capsys):
    spec = SPEC.with_statistics([actions(number) for number in range(6)])
    spec.save(tmp_path / "model")
    root = write_folder(tmp_path / "set", {4: {"actions": 4 * actions(4)}})
    assert main(["lint", str(root), "--action_spec", str(tmp_path / "model")]) == 1
    said = capsys.readouterr().out
    assert "the action 'x' goes from" in said and "[4]" in said and "1 error, 0 warnings" in said
    ActionSpec(("x",), ("m",), "robot base", "delta", 5.0).save(tmp_path / "model")
    assert main(["lint", str(root), "--action_spec", str(tmp_path / "model")]) == 1
    assert "actions have 2 numbers, 1 are needed: x" in capsys.readouterr().out


def test_what_a_data_set_says_of_its_actions_is_looked_at(tmp_path):
    root = write_views(tmp_path / "set")
    assert lint(root, spec=SPEC) == []
    said = [str(finding) for finding in lint(root, spec=replace(SPEC, frame="joints"))]
    assert said == [
        "error: the actions do not mean what the model was trained on: frame 'robot base', needed 'joints'"
    ]
    replace(SPEC, low=(0, 0), high=(0.01, 0.01)).save(root / "meta")
    assert any("the action 'x' goes from" in str(finding) for finding in lint(root))


def test_wrong_arguments_are_a_message(tmp_path, capsys):
    for arguments, words in (
        (["lint", str(tmp_path / "none")], "no such file or folder"),
        (["lint", str(tmp_path)], "holds neither"),
        (["lint", str(tmp_path), "--action_spec", str(tmp_path)], "action_spec.json is missing"),
        (["lint", str(tmp_path), "--num_frames", "8", "--temporal_compression", "4"], "takes 1 + k * 4: 5 or 9"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_choice_of_clips_is_told(tmp_path):
    findings = lint(write_folder(tmp_path / "set"), max_clips=3)
    assert [str(finding) for finding in findings] == ["warning: only 3 of 6 clips were looked at (max_clips)"]
    assert len(open_clips(tmp_path / "set").keys) == 6
