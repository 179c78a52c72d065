"""Recovered poses beside those that were asked for."""

import sys

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.camera_paths import joystick_path
from cosmos_hf.evaluation import camera_following
from cosmos_hf.evaluation.camera_following import recover_paths, score_paths, why_not_measurable
from cosmos_hf.evaluation.geometry import RecoveredPath
from textured_box import K


def camera(*moves):
    return {"intrinsics": torch.from_numpy(K), "extrinsics": joystick_path(np.array(moves))}


WAY = camera(*[[0.12, 0.02, 0.06, 1.5, 0.5, 0]] * 6)
OTHER = camera(*[[0.12, 0.02, 0.06, 1.5, 0.5, 0]] * 3, *[[0.12, 0.02, 0.06, -6, 0.5, 0]] * 3)


def found(poses):
    return RecoveredPath(list(range(len(poses))), poses)


def test_figures_are_of_the_frames_after_the_given_ones():
    """The same way in another scale is no error; where the ways part after frame 3, the given frames do not hide it."""
    scaled = WAY["extrinsics"].clone()
    scaled[:, :3, 3] *= 3
    same = score_paths([found(scaled), None], [WAY, WAY])
    assert same["success_rate"] == 0.5 and same["count"] == 2
    assert max(same[name] for name in ("rotation", "translation", "ate", "rpe_translation", "rpe_rotation")) < 1e-5
    assert "following" not in same
    late, whole = (score_paths([found(OTHER["extrinsics"])], [WAY], given)["rotation"] for given in (4, 1))
    assert late == pytest.approx(15, abs=0.1) and 0 < whole < late
    assert score_paths([None], [WAY])["rotation"] is None


def test_what_stands_in_the_way_is_said(monkeypatch):
    pytest.importorskip("pycolmap", reason="needs the extra cosmos-hf[geometry]")
    every = WAY | {"intrinsics": WAY["intrinsics"].expand(7, 3, 3)}
    assert why_not_measurable([WAY, every]) is None
    zoom = every | {"intrinsics": every["intrinsics"] * torch.linspace(1, 2, 7)[:, None, None]}
    assert "for a fixed lens" in why_not_measurable([WAY, zoom])
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    assert "cosmos-hf[geometry]" in why_not_measurable([WAY])


def test_frames_and_lens_as_the_recovery_takes_them(monkeypatch):
    taken = []
    monkeypatch.setattr(camera_following, "recover_poses", lambda *given: taken.append(given))
    video = torch.zeros(3, 7, 24, 32, dtype=torch.uint8)
    every = WAY | {"intrinsics": WAY["intrinsics"].expand(7, 3, 3)}
    assert recover_paths([video, video], [WAY, every]) == [None, None]
    for frames, intrinsics in taken:
        assert frames.shape == (7, 24, 32, 3) and torch.equal(intrinsics, torch.from_numpy(K))
