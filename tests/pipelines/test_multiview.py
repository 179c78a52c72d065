"""Several views in one call: each with its own text, any of them given, outputs by name; and what does not fit is refused."""

import copy
import shutil

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.camera import CameraPath
from cosmos_hf.conditioning.trajectory import trajectory_spec
from cosmos_hf.conditioning.views import PUBLISHED_VIEWS
from cosmos_hf.data.video import to_float
from cosmos_hf.models.dit_conditions import extend_conditions
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from cosmos_hf.pipelines.multiview import CosmosMultiViewPipeline
from cosmos_hf.pipelines.preflight import preflight
from cosmos_hf.pipelines.published_layout import complete_pipeline
from cosmos_hf.pipelines.rollout import rollout
from tiny_pipelines import SETTINGS, components

VIEWS = ("front", "left", "right")
PROMPT = "a robot arm picks up the red cube"


def made(video2world, **added):
    """The tiny video-to-world pipeline with three views that start without effect."""
    parts = copy.deepcopy(video2world.components)
    extend_conditions(parts["transformer"], num_views=3, view_embed_dim=4, **added)
    pipe = CosmosMultiViewPipeline(**parts, **SETTINGS, views=list(VIEWS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_use(pipe):
    """All parts have an effect."""
    torch.manual_seed(0)
    torch.nn.init.normal_(pipe.transformer.patch_embed.proj.weight, std=0.1)
    if pipe.transformer.action_embed is not None:
        for parameter in pipe.transformer.action_embed.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return pipe


@pytest.fixture(scope="module")
def pipe(video2world):
    return in_use(made(video2world))


def clip(frames, value=0, height=32, width=48):
    ramp = torch.arange(frames * height * width).view(1, frames, height, width) % (97 + value) + value
    return ramp.expand(3, -1, -1, -1).to(torch.uint8).contiguous()


def run(pipe, **more):
    settings = dict(prompt=PROMPT, output_type="latent", generator=torch.Generator().manual_seed(0))
    return pipe(**settings | more).frames


def test_at_one_view_it_is_the_base_to_the_bit(video2world):
    fresh, image = made(video2world), clip(1)
    settings = dict(prompt=PROMPT, output_type="latent")
    base = video2world(image=image, generator=torch.Generator().manual_seed(0), **settings).frames
    for view in ("front", "right"):
        assert torch.equal(run(fresh, views=[view], image={view: image})[view], base)


def test_outputs_by_view(pipe):
    result = pipe(prompt=PROMPT, output_type="pt", num_videos_per_prompt=2)
    assert list(result.frames) == list(VIEWS) and result.fps == 5
    assert all(frames.shape == (2, 9, 3, 32, 48) for frames in result.frames.values())
    some = run(pipe, views=["right", "front"])
    assert list(some) == ["right", "front"] and some["right"].shape == (1, 16, 3, 4, 6)
    noise = torch.randn(1, 16, 6, 4, 6)
    ways = [run(pipe, views=views, latents=noise) for views in (["right", "front"], ["left", "front"])]
    assert (ways[0]["right"] - ways[1]["left"]).abs().max() > 1e-3  # a place on the time axis is not a view


def test_a_subset_is_given_and_kept(pipe):
    """A whole view, a first frame, and one view from nothing: what is given stays, and what is not depends on it."""
    whole, first = clip(9), clip(1, 40)
    result = run(pipe, video={"left": whole}, image={"front": first})

    def coded(frames):
        with torch.no_grad():
            return pipe.vae.normalize(pipe.vae.encode(to_float(frames)[None]).latents) * 0.5

    torch.testing.assert_close(result["left"], coded(whole), atol=1e-5, rtol=0)
    torch.testing.assert_close(result["front"][:, :, :1], coded(first), atol=1e-5, rtol=0)
    assert (result["front"][:, :, 1:] - coded(whole)[:, :, 1:]).abs().max() > 0.1
    other = run(pipe, video={"left": clip(9, 90)}, image={"front": first})
    assert (other["right"] - result["right"]).abs().max() > 1e-3
    # Five frames are the first five, by a number for all or by view
    five = run(pipe, video={"left": whole, "right": whole}, num_conditioning_frames=5)
    torch.testing.assert_close(five["right"][:, :, :2], coded(whole[:, :5]), atol=1e-5, rtol=0)
    mixed = run(pipe, video={"left": whole, "right": whole}, num_conditioning_frames={"right": 5})
    torch.testing.assert_close(mixed["left"], coded(whole), atol=1e-5, rtol=0)
    assert (mixed["right"][:, :, 2:] - coded(whole)[:, :, 2:]).abs().max() > 0.1
    # Without text the frames are enough, and guidance is off
    assert torch.isfinite(run(pipe, prompt=None, image={"front": first})["left"]).all()


def test_every_view_has_its_own_text(pipe):
    same = run(pipe, prompt=dict.fromkeys(VIEWS, PROMPT))
    for view, frames in run(pipe).items():
        assert torch.equal(frames, same[view])
    other = run(pipe, prompt=dict.fromkeys(VIEWS, PROMPT) | {"left": "a cube"})
    assert (other["left"] - same["left"]).abs().max() > 1e-3
    with torch.no_grad():
        from cosmos_hf.pipelines.encode import encode_text

        embeds = encode_text(pipe.tokenizer, pipe.text_encoder, [PROMPT, "a cube", PROMPT], 16, "cpu")
    again = run(pipe, prompt=None, prompt_embeds=embeds.flatten(0, 1)[None])
    torch.testing.assert_close(again["left"], other["left"])
    negative = run(pipe, negative_prompt={"front": "", "left": "the red cube", "right": ""})
    assert (negative["left"] - same["left"]).abs().max() > 1e-3


def test_several_videos_are_what_each_is_alone(pipe):
    noise = torch.randn(2, 16, 9, 4, 6)
    prompts = [PROMPT, dict.fromkeys(VIEWS, "a cube")]
    images = [clip(1), clip(1, 60)]
    together = run(pipe, prompt=prompts, image={"front": images}, latents=noise)
    for i in range(2):
        alone = run(pipe, prompt=prompts[i], image={"front": images[i]}, latents=noise[i : i + 1])
        for view in VIEWS:
            torch.testing.assert_close(together[view][i], alone[view][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(views=["front", "roof"]), "views names roof: the views are front, left, right"),
        (dict(views="front"), "views must be a list of names"),
        (dict(image={"roof": clip(1)}), "image names roof: the views are front, left, right"),
        (dict(image={"left": clip(1)}, views=["front", "right"]), "image names left: the views are front, right"),
        (dict(image=clip(1)), "image must be a dict by the views' names"),
        (dict(image={"left": clip(1)}, video={"left": clip(9)}), "image and video are both given for left"),
        (dict(video=dict.fromkeys(VIEWS, clip(9))), "all 9 frames of all views are given: nothing is left"),
        (dict(video={"left": clip(9)}, num_conditioning_frames=4), "must be 1 . k . 4, got 4"),
        (dict(video={"left": clip(13)}, num_conditioning_frames=13), "at most num_frames=9, got 13 for left"),
        (dict(video={"left": clip(9)}, num_conditioning_frames={"front": 5}), "num_conditioning_frames names front"),
        (dict(prompt={"front": "a", "left": "b"}), "prompt has no text for right"),
        (dict(prompt={**dict.fromkeys(VIEWS, "a"), "roof": "b"}), "prompt names roof"),
        (dict(prompt=3), "prompt must be a string, a dict of one for each view, or a list"),
        (dict(prompt=[PROMPT] * 2, image={"front": [clip(1)] * 3}), "prompt of 2 videos for 3"),
        (dict(prompt=None), "give prompt or prompt_embeds, or frames of some views"),
        (dict(prompt=None, prompt_embeds=torch.zeros(1, 16, 32)), "3 views . tokens, width"),
        (dict(prompt=None, image={"front": clip(1)}, guidance_scale=2.0), "guidance needs a prompt"),
        (dict(latents=torch.zeros(1, 16, 3, 4, 6)), r"shape \(1, 16, 9, 4, 6\)"),
        (dict(frame_repeat={"left": 10}), "takes no frame_repeat"),
        (dict(camera={}), "model takes no camera"),
        (dict(actions=np.zeros((8, 3))), "model takes no actions"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **given)


def test_models_and_pipelines_of_the_wrong_number_of_views(pipe, video2world, text2world):
    single = CosmosMultiViewPipeline(**video2world.components, **SETTINGS)
    with pytest.raises(ValueError, match="model has one view: load an adapter that was post-trained with views"):
        single(PROMPT, views=["front"])
    several = type(video2world)(**pipe.components, **SETTINGS)
    with pytest.raises(ValueError, match="model has 3 views: call it through CosmosMultiViewPipeline"):
        several(image=clip(1), prompt=PROMPT)
    with pytest.raises(ValueError, match="nobody has named this model's 3 views"):
        CosmosMultiViewPipeline(**pipe.components, **SETTINGS)(PROMPT)
    with pytest.raises(ValueError, match="2 names .front, left. for a model of 3 views"):
        CosmosMultiViewPipeline(**pipe.components, **SETTINGS, views=["front", "left"])
    parts = copy.deepcopy(text2world.components)
    extend_conditions(parts["transformer"], num_views=2)
    plain = CosmosMultiViewPipeline(**parts, **SETTINGS, views=["a", "b"])
    plain.set_progress_bar_config(disable=True)
    assert run(plain)["b"].shape == (1, 16, 3, 4, 6)
    with pytest.raises(ValueError, match="text-to-world and cannot be given frames"):
        run(plain, image={"a": clip(1)})


def test_cameras_and_a_trajectory(video2world):
    pipe = in_use(made(video2world, camera_channels=6, action_dim=12))
    pipe.register_to_config(action_spec=vars(trajectory_spec(rate=2.5)))
    points = np.linspace(0, 1, 12).reshape(4, 3)
    poses = np.tile(np.eye(4), (9, 1, 1))
    poses[:, 2, 3] = -0.1 * np.arange(9)

    def path(aside, frames=9):
        moved = poses[:frames].copy()
        moved[:, 0, 3] = aside
        return CameraPath([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]], moved, 32, 48)

    rig = {"front": path(0), "left": path(0.5), "right": path(-0.5)}
    result = run(pipe, actions=points, camera=rig)
    # Relative to one world: where the left camera stands beside the front one matters, a shift of all does not.
    moved = run(pipe, actions=points, camera=rig | {"left": path(1.5)})
    assert (moved["left"] - result["left"]).abs().max() > 1e-3
    shifted = {view: path(aside + 2) for view, aside in (("front", 0), ("left", 0.5), ("right", -0.5))}
    torch.testing.assert_close(run(pipe, actions=points, camera=shifted)["left"], result["left"], atol=1e-4, rtol=1e-4)
    assert (run(pipe, actions=-points, camera=rig)["left"] - result["left"]).abs().max() > 1e-3
    for given, message in (
        (dict(actions=points), "needs camera="),
        (
            dict(actions=points, camera={"front": path(0)}),
            "a camera for each of the views front, left, right, got front",
        ),
        (dict(actions=points, camera=rig | {"left": path(0, 5)}), "camera has {'left': 5} poses for 9 frames"),
        (dict(actions=points[:3], camera=rig), r"a trajectory is 4 points \[4, 3\]"),
        (
            dict(actions=points, camera=rig, fps=2),
            "the video lasts 4 s, the 4 points of the model's trajectories 1.6 s",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipe, **given)


def test_a_rollout_is_of_one_view_and_of_actions(pipe, video2world, tmp_path):
    with pytest.raises(ValueError, match="rollout continues one view"):
        rollout(pipe, tmp_path / "world.mp4", 20, prompt=PROMPT)
    parts = copy.deepcopy(video2world.components)
    extend_conditions(parts["transformer"], action_dim=12)
    single = type(video2world)(**parts, **SETTINGS, action_spec=trajectory_spec(rate=2.5))
    with pytest.raises(ValueError, match="trajectories are told for one clip"):
        rollout(single, tmp_path / "world.mp4", 20, prompt=PROMPT, actions=np.zeros((4, 3)))


def test_the_published_layout_of_six_views(tmp_path):
    """A converted network beside the parts of a single-view folder: names, size and frame repetition as published."""
    layout = dict(num_views=6, view_embed_dim=6, frame_repeat_embed=True, extra_pos_embed_type="sincos")
    base = CosmosMultiViewPipeline(**components("tiny-video2world"), **SETTINGS)
    base.save_pretrained(tmp_path / "base")
    network = CosmosWorldTransformer3D(**PRESETS["tiny-video2world"] | dict(max_size=(16, 64, 112), **layout))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(tmp_path / "six" / "transformer")
    complete_pipeline(tmp_path / "base", tmp_path / "six")
    report = preflight(tmp_path / "six")
    assert "CosmosMultiViewPipeline, 57 frames of 480x848 at 24 fps" in str(report)
    pipe = CosmosMultiViewPipeline.from_pretrained(tmp_path / "six")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.views == PUBLISHED_VIEWS
    size = dict(height=32, width=48, num_frames=9)
    result = run(pipe, **size)
    told = run(pipe, **size, frame_repeat={"back_left": 10, "back_right": 10})
    assert all(torch.equal(result[view], told[view]) for view in PUBLISHED_VIEWS)
    assert (run(pipe, **size, frame_repeat={})["back_left"] - result["back_left"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="frame_repeat names roof"):
        run(pipe, **size, frame_repeat={"roof": 1})
    shutil.rmtree(tmp_path / "six")
