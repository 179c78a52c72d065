"""Headless renderers: MuJoCo's Filament (soft shadows, physically based) where Vulkan runs, the classic OpenGL one elsewhere.

Without a Vulkan driver Filament aborts the process, so `choose_renderer` tries it in a child process first.
"""

import functools
import logging
import os
import subprocess
import sys

# Both must be set before MuJoCo is imported. One thread per process: episodes are rendered in parallel processes.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")

try:
    import collections.abc

    import typing_extensions

    if not hasattr(collections.abc, "Buffer"):  # MuJoCo's Filament module expects Python 3.12
        collections.abc.Buffer = typing_extensions.Buffer
    import mujoco
except (ImportError, AttributeError, OSError) as error:  # PyOpenGL without libEGL raises AttributeError
    raise ImportError(
        "Simulated worlds need MuJoCo: pip install 'cosmos-hf[worlds]', and for rendering without a screen the Debian "
        "packages libegl1 libgl1-mesa-dri (needed) and libvulkan1 mesa-vulkan-drivers (for the better renderer, "
        f"Filament). The reason: {error}"
    ) from error

import numpy as np

logger = logging.getLogger(__name__)


@functools.cache
def choose_renderer() -> str:
    """ "filament" or "classic": the better one that runs on this machine, with a warning where that is the classic one, whose
    pictures look different. Raises RuntimeError where neither does."""
    reasons = {}
    for name in ("filament", "classic"):
        code = f"from cosmos_hf.worlds.render import probe; probe({name!r})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        reasons[name] = result.stderr.strip()[-300:]
        if result.returncode == 0:
            break
    else:
        raise RuntimeError(
            "no renderer runs here: apt-get install libegl1 libgl1-mesa-dri (classic) or libvulkan1 mesa-vulkan-drivers "
            f"(Filament). The last attempt said: {reasons['classic']}"
        )
    if name == "classic":
        logger.warning(
            "Filament does not run here, worlds are rendered by the classic renderer. The bundled models never saw such pictures: "
            "their tokenizer loses 2.7 dB on them. For Filament: apt-get install libvulkan1 mesa-vulkan-drivers. It said: %s",
            reasons["filament"],
        )
    return name


def probe(name: str):
    """Render one small picture and fail if it is empty."""
    xml = (
        "<mujoco><worldbody><light pos='0 0 3'/><geom size='.2' rgba='1 0 0 1'/><camera name='main' pos='0 0 1'/>"
        "</worldbody></mujoco>"
    )
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    picture = make_renderer(name, model, 32, 32).render(data, "main")
    if np.ptp(picture) < 10:
        raise RuntimeError(f"{name} rendered an empty picture")


SKY = (0.62, 0.80, 0.98)


def make_renderer(name: str, model, height: int, width: int, num_views: int = 1, sky: tuple = SKY):
    """An object whose `render(data, camera)` gives uint8 [height, width, 3], and whose `render_views(data, cameras)` gives
    [num_views, height, width, 3]. `sky` is Filament's background; the classic renderer shows the model's skybox."""
    if name == "filament":
        return FilamentRenderer(model, height, width, num_views, sky)
    return {"classic": ClassicRenderer}[name](model, height, width)


class ClassicRenderer:
    """OpenGL, with shadows; twice supersampled."""

    def __init__(self, model, height: int, width: int):
        self._renderer = mujoco.Renderer(model, 2 * height, 2 * width)

    def render_views(self, data, cameras: tuple[str, ...]) -> np.ndarray:
        return np.stack([self.render(data, camera) for camera in cameras])

    def render(self, data, camera: str) -> np.ndarray:
        self._renderer.update_scene(data, camera)
        picture = self._renderer.render()
        height, width = picture.shape[0] // 2, picture.shape[1] // 2
        return picture.reshape(height, 2, width, 2, 3).mean((1, 3)).round().astype(np.uint8)


class SegmentationRenderer:
    """Geom id of every pixel (int32 [height, width], -1 for none), by the classic renderer."""

    def __init__(self, model, height: int, width: int):
        self._renderer = mujoco.Renderer(model, height, width)
        self._renderer.enable_segmentation_rendering()

    def render(self, data, camera: str) -> np.ndarray:
        self._renderer.update_scene(data, camera)
        ids, kinds = np.moveaxis(self._renderer.render(), -1, 0)
        return np.where(kinds == mujoco.mjtObj.mjOBJ_GEOM, ids, -1)


class DepthRenderer:
    """Distance along the camera's axis, float32 [height, width] in metres, by the classic renderer."""

    def __init__(self, model, height: int, width: int):
        self._renderer = mujoco.Renderer(model, height, width)
        self._renderer.enable_depth_rendering()

    def render(self, data, camera: str) -> np.ndarray:
        self._renderer.update_scene(data, camera)
        return self._renderer.render().copy()


def aim_camera(model, camera: str, extrinsics: np.ndarray):
    """Put a fixed camera of the world body where extrinsics [4, 4] say (world to camera, x right, y down, z forward)."""
    rotation = extrinsics[:3, :3].T
    index = model.camera(camera).id
    model.cam_pos[index] = -rotation @ extrinsics[:3, 3]
    mujoco.mju_mat2Quat(model.cam_quat[index], (rotation * [1, -1, -1]).flatten())  # MuJoCo: y up, looks along -z


@functools.cache
def _filament_context():
    import mujoco.studio.window  # noqa: F401  registers where Filament's materials lie; must come first
    from mujoco import mjrf

    return mjrf.Context(mjrf.ContextConfig())


def restart_filament():
    """Let the next pictures start from a new context.

    Filament's dithering goes by the number of frames that its context has rendered, so equal episodes have equal pixels
    only when their context is equally old.
    """
    _filament_context.cache_clear()


class FilamentRenderer:
    """Physically based, with soft shadows, anti-aliasing and tone mapping. Its post-processing dithers by about one level."""

    def __init__(self, model, height: int, width: int, num_views: int = 1, sky: tuple = SKY):
        from mujoco.rendering.filament import model_scene, renderer

        context = _filament_context()
        self._model, self._view, self._num_views = model, renderer.View, num_views
        self._renderer = renderer.Renderer(context)
        context.set_clear_color(list(sky))  # after the renderer, which resets it to black
        self._scene = model_scene.ModelScene(context, model, self._renderer.scene("scene"))
        # A renderer reads one picture per call, so all views lie side by side in one.
        self._buffer = np.zeros((height, width * num_views, 3), np.uint8)
        self._renderer.target("picture", self._buffer)
        self._abstract, self._options = mujoco.MjvScene(model, 2000), mujoco.MjvOption()

    def render(self, data, camera: str) -> np.ndarray:
        return self.render_views(data, (camera,))[0]

    def render_views(self, data, cameras: tuple[str, ...]) -> np.ndarray:
        self._scene.update(data)
        views = [self._view_of(data, camera, i / self._num_views) for i, camera in enumerate(cameras)]
        self._renderer.render(views)
        return np.stack(np.split(self._buffer, self._num_views, axis=1)[: len(cameras)])

    def _view_of(self, data, camera: str, left: float):
        chosen = mujoco.MjvCamera()
        chosen.type, chosen.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._model.camera(camera).id
        mujoco.mjv_updateCamera(self._model, data, chosen, self._abstract)
        # scene.camera[0] alone is the left eye
        middle = mujoco.mjv_averageCamera(self._abstract.camera[0], self._abstract.camera[1])
        return self._view(
            "scene",
            "picture",
            viewport=(left, 0, 1 / self._num_views, 1),
            camera=_filament_camera(middle),
            shadows=True,
            post_processing=True,
        )


def _filament_camera(camera):
    from mujoco import mjrf

    result = mjrf.Camera()
    for key in ("pos", "forward", "up"):
        setattr(result, key, getattr(camera, key).copy())
    for side in ("center", "width", "bottom", "top", "near", "far"):
        if hasattr(result, f"frustum_{side}"):
            setattr(result, f"frustum_{side}", getattr(camera, f"frustum_{side}"))
    return result
