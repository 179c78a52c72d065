"""Choosing a renderer, and what a machine without the simulator is told."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("cosmos_hf.worlds.render", reason="needs the extra cosmos-hf[worlds]", exc_type=ImportError)

from cosmos_hf.worlds import render
from cosmos_hf.worlds.tabletop import Robot
from cosmos_hf.worlds.tabletop_scene import build_model, sample_scene


def run(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_without_mujoco_the_error_names_the_packages():
    result = run("import sys; sys.modules['mujoco'] = None; import cosmos_hf.worlds.tabletop")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    for words in ("pip install 'cosmos-hf[worlds]'", "mesa-vulkan-drivers", "libvulkan1", "libegl1"):
        assert words in last


def test_the_package_itself_needs_no_simulator():
    assert run("import sys; sys.modules['mujoco'] = None; import cosmos_hf, cosmos_hf.worlds").returncode == 0


def test_a_vulkan_that_aborts_does_not_take_the_process_along():
    """Filament aborts where no Vulkan driver is found; the probe survives it and takes the classic renderer."""
    code = "from cosmos_hf.worlds.render import choose_renderer; print('chose', choose_renderer())"
    result = run(code, VK_ICD_FILENAMES="/nonexistent.json", VK_DRIVER_FILES="/nonexistent.json")
    if "no renderer runs here" in result.stderr:
        pytest.skip("no OpenGL renderer runs on this machine")
    assert result.returncode == 0 and "chose classic" in result.stdout
    assert "worlds are rendered by the classic renderer. The bundled models never saw such pictures" in result.stderr


def test_the_choice_is_made_once(renderer):
    assert render.choose_renderer() == renderer
    assert render.choose_renderer.cache_info().misses == 1


def test_pictures_show_the_scene_and_repeat_after_a_restart(renderer):
    scene = sample_scene(np.random.default_rng(3), "train")
    model = build_model(scene)
    robot = Robot(model)
    pictures = []
    for _ in range(2):
        render.restart_filament()
        camera = render.make_renderer(renderer, model, 96, 128)
        pictures.append([camera.render(robot.data, "main") for _ in range(2)])
        del camera
    np.testing.assert_array_equal(pictures[0], pictures[1])
    picture = pictures[0][0]
    assert picture.shape == (96, 128, 3) and picture.dtype == np.uint8 and picture.std() > 15
