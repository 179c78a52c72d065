"""Actions and cameras as a call takes them, with a model that needs both."""

import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.action import BRIDGE
from cosmos_hf.conditioning.camera import CameraPath
from cosmos_hf.data.video import read_video
from cosmos_hf.models.dit_conditions import extend_conditions
from cosmos_hf.pipelines.conditions import window_of_actions, window_of_camera
from cosmos_hf.pipelines.rollout import rollout
from tiny_pipelines import SETTINGS

PROMPT = "a robot arm picks up the red cube"


@pytest.fixture(scope="module")
def pipe(video2world):
    pipe = type(video2world)(**copy.deepcopy(video2world.components), **{
        name: video2world.config[name]
        for name in ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "max_sequence_length")
    }, action_spec=BRIDGE)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    extend_conditions(pipe.transformer, camera_channels=6, action_dim=28)
    torch.manual_seed(0)
    torch.nn.init.normal_(pipe.transformer.patch_embed.proj.weight, std=0.1)
    for parameter in pipe.transformer.action_embed.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return pipe


def seen_in(height, width):
    """The camera of pictures of this size, as a dict that does not say so."""
    intrinsics = [[float(width), 0, width / 2], [0, float(width), height / 2], [0, 0, 1]]
    return {"intrinsics": intrinsics, "extrinsics": np.tile(np.eye(4), (9, 1, 1))}


def plan(speed=0.5, steps=8):
    actions = np.zeros((steps, 7), dtype=np.float32)
    actions[:, 0], actions[:, 6] = speed, 1
    return actions


def path(speed=0.2, frames=9, height=32, width=48):
    extrinsics = np.tile(np.eye(4), (frames, 1, 1))
    extrinsics[:, 0, 3] = speed * np.arange(frames)
    focal = 40 * height / 32
    return CameraPath([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], extrinsics, height, width)


def run(pipe, **more):
    settings = dict(image=torch.zeros(3, 1, 32, 48, dtype=torch.uint8), prompt=PROMPT, output_type="latent")
    settings |= dict(generator=torch.Generator().manual_seed(0), actions=plan(), camera=path())
    return pipe(**settings | more).frames


def test_several_plans_for_one_picture(pipe):
    """Every plan gives what it gives alone, with one noise for all."""
    noise = torch.randn(1, 16, 3, 4, 6)
    plans = [plan(0.5), plan(-0.5), plan(0)]
    together = run(pipe, actions=plans, latents=noise.expand(3, -1, -1, -1, -1))
    for one, result in zip(plans, together, strict=True):
        torch.testing.assert_close(run(pipe, actions=one, latents=noise)[0], result, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_camera_of_larger_pictures_or_a_dict_is_the_same(pipe):
    small, large = path(), path(height=64, width=96)
    expected = run(pipe)
    torch.testing.assert_close(run(pipe, camera=large), expected)
    given = dict(intrinsics=small.intrinsics, extrinsics=small.extrinsics)
    assert torch.equal(run(pipe, camera=given), expected)
    assert (run(pipe, camera=path(-0.2)) - expected).abs().max() > 1e-3


def test_action_guidance_strengthens_what_actions_do(pipe):
    """Its unconditional branch sees no actions; with scale 0.5 the output moves away from it, batched or not."""
    settings = dict(guidance_scale=0.5, prompt=None)
    guided = run(pipe, **settings, sampling=dict(drop_conditions=("actions",)))
    batched = run(pipe, **settings, sampling=dict(drop_conditions=("actions",), batch_guidance=True))
    torch.testing.assert_close(guided, batched, atol=1e-4, rtol=1e-4)
    assert (guided - run(pipe, prompt=None)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="drop_conditions names view; this call's conditions: actions, camera"):
        run(pipe, sampling=dict(drop_conditions=("view",)))
    with pytest.raises(ValueError, match="drop_conditions acts through guidance"):
        run(pipe, guidance_scale=0, sampling=dict(drop_conditions=("actions",)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(actions=None),
            r"model needs actions=: the actions that lead from frame to frame of the video's 9 frames",
        ),
        (dict(camera=None), "model needs camera="),
        (dict(actions=plan(steps=9)), r"actions must be \[8, 7\] for 9 frames, .*got \(9, 7\)"),
        (dict(actions=np.zeros((8, 6))), "actions have 6 numbers, 7 are needed"),
        (dict(fps=30), "actions are given at 30 per second, the model was trained at 5"),
        (dict(actions=[plan(), plan()], prompt=[PROMPT] * 3), "actions of 2 videos for 3"),
        (dict(camera=path(frames=5)), "camera has 5 poses for 9 frames"),
        (dict(camera={"extrinsics": 1}), "camera must be a CameraPath or a dict with intrinsics and extrinsics"),
        (dict(camera={"intrinsics": 1, "extrinsics": 1, "fov": 1}), "unknown entries fov"),
        (
            dict(camera=seen_in(480, 640)),
            r"principal point \(x 320, y 240\) lies outside its pictures of 32x48 .*Scale them, or say height and width",
        ),
        (dict(fit="pad"), "fit='pad' moves the picture within the frame, which a camera cannot follow"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **given)


def test_a_camera_of_larger_pictures_says_their_size(pipe):
    torch.testing.assert_close(
        run(pipe, camera=seen_in(320, 480) | dict(height=320, width=480)), run(pipe, camera=seen_in(32, 48))
    )


def test_conditions_that_a_model_has_no_use_for_are_refused(video2world, text2world):
    with pytest.raises(ValueError, match="model takes no actions: load an adapter"):
        run(video2world, camera=None)
    with pytest.raises(ValueError, match="model takes no camera"):
        text2world(PROMPT, camera=path())


def test_actions_that_nobody_explained_are_refused(pipe):
    spec = pipe.config.action_spec
    pipe.register_to_config(action_spec=None)
    with pytest.raises(ValueError, match="nobody has said what this model's actions mean"):
        run(pipe)
    pipe.register_to_config(action_spec=spec | {"names": spec["names"][:6]})
    with pytest.raises(ValueError, match="units has 7 entries for 6 numbers"):
        run(pipe)
    pipe.register_to_config(action_spec=asdict(BRIDGE))


def test_the_published_form_takes_the_next_action_alone(video2world, tmp_path):
    one = type(video2world)(**copy.deepcopy(video2world.components), **SETTINGS, action_spec=BRIDGE)
    one.set_progress_bar_config(disable=True)
    extend_conditions(one.transformer, action_dim=7, action_form="as_written")
    for parameter in one.transformer.action_embed.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = dict(camera=None, num_videos_per_prompt=1)
    right, left = (run(one, **given, actions=plan(speed, 1)) for speed in (0.5, -0.5))
    assert (right - left).abs().max() > 1e-3
    assert run(one, **given, actions=[plan(0.5, 1), plan(-0.5, 1)]).shape[0] == 2
    with pytest.raises(ValueError, match=r"predicts what follows from one action .* must be \[1, 7\], .*got \(8, 7\)"):
        run(one, **given, actions=plan())
    with pytest.raises(ValueError, match="takes one action for a call"):
        rollout(one, tmp_path / "world.mp4", 9, image=torch.zeros(3, 1, 32, 48, dtype=torch.uint8), actions=plan())
    one.register_to_config(
        action_spec=asdict(replace(BRIDGE, names=BRIDGE.names[:6], units=BRIDGE.units[:6], gripper=None))
    )
    with pytest.raises(ValueError, match="transformer takes 7 numbers .*, one action has 6"):
        run(one, **given, actions=np.zeros((1, 6)))


def test_a_rollout_is_driven_to_any_length(pipe, tmp_path):
    """Chunk after chunk with its own window; a change of the plan's end leaves the beginning as it is."""
    settings = dict(image=torch.zeros(3, 1, 32, 48, dtype=torch.uint8), num_inference_steps=1, overlap=1)
    results = []
    for end in (0.5, -0.5):
        actions = np.concatenate([plan(0.5, 8), plan(end, 11)])
        rollout(pipe, tmp_path / "world.mp4", 20, actions=actions, camera=path(frames=20), **settings)
        results.append(read_video(tmp_path / "world.mp4").frames)
    assert results[0].shape == (3, 20, 32, 48)
    assert torch.equal(results[0][:, :9], results[1][:, :9]) and not torch.equal(results[0][:, 9:], results[1][:, 9:])
    with pytest.raises(ValueError, match=r"actions must be \[19, 7\] for 20 frames"):
        rollout(pipe, tmp_path / "world.mp4", 20, actions=plan(), camera=path(frames=20), **settings)
    with pytest.raises(ValueError, match="guidance needs a prompt"):
        rollout(
            pipe, tmp_path / "world.mp4", 20, actions=actions, camera=path(frames=20), guidance_scale=2, **settings
        )
    guided = dict(guidance_scale=2.0, sampling=dict(drop_conditions=("actions",)))
    rollout(pipe, tmp_path / "world.mp4", 20, actions=actions, camera=path(frames=20), **settings | guided)
    assert not torch.equal(read_video(tmp_path / "world.mp4").frames, results[1])
    with pytest.raises(ValueError, match="model needs actions="):
        rollout(pipe, tmp_path / "world.mp4", 20, camera=path(frames=20), **settings)


def test_past_the_end_nothing_moves():
    actions = window_of_actions(BRIDGE, plan(0.5, 3), 1, 4)
    assert actions[:, 0].tolist() == [0.5, 0.5, 0, 0] and actions[:, 6].tolist() == [1, 1, 1, 1]
    camera = window_of_camera(path(frames=3), 1, 4)
    torch.testing.assert_close(camera.extrinsics[:, 0, 3], torch.tensor([0.2, 0.4, 0.4, 0.4], dtype=torch.float64))
