"""Post-training a single-view base on clips of several cameras: shards in, an adapter for the multi-view pipeline out."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_hf.conditioning.camera_paths import named_trajectory
from cosmos_hf.conditioning.views import pick_views
from cosmos_hf.data.clips import open_clips
from cosmos_hf.data.samples import SampleReader
from cosmos_hf.evaluation import geometry
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.dit_conditions import extend_conditions
from cosmos_hf.models.transformer_cosmos import CosmosWorldTransformer3D
from cosmos_hf.pipelines.multiview import CosmosMultiViewPipeline
from cosmos_hf.pipelines.video2world import CosmosVideo2WorldPipeline
from cosmos_hf.pipelines.view_inputs import read_view_conditions
from cosmos_hf.schedulers.scheduling_edm_cosmos import CosmosEDMScheduler
from cosmos_hf.training.action_specs import find_action_spec
from cosmos_hf.training.autoregressive import AutoregressiveConfig
from cosmos_hf.training.conditioned_loss import ConditionedLoss, validate_conditions
from cosmos_hf.training.config import TokenizerConfig
from cosmos_hf.training.diffusion import DiffusionConfig, Texts, build_datasets
from cosmos_hf.training.posttrain import ConditionBatches, PosttrainConfig, build_model
from cosmos_hf.training.tokenizer import build_dataset, build_whole

SCRIPT = Path(__file__).parents[2] / "training" / "posttrain.py"
VIEWS = ["front", "left", "right"]
PROMPT = "a robot arm picks up the red cube"


@pytest.fixture(scope="module")
def data(clips_of_three_cameras):
    return clips_of_three_cameras


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(base, data, cache, tmp_path):
    def settings(*conditions, **more):
        known = dict(data=[str(data)], init_from=str(base), output_dir=str(tmp_path / "run"), cache_dir=cache)
        known |= dict(
            conditions=list(conditions), views=VIEWS, action_spec="driving", lora_rank=4, trajectory_points=4
        )
        known |= dict(batch_size=4, max_steps=2, warmup_steps=1, log_every=1, progress=False, max_condition_frames=1)
        return PosttrainConfig(**known | dict(window_starts=[0, 4]) | more)

    return settings


def assemble(config):
    torch.manual_seed(0)
    vae = CosmosVideoTokenizer.from_pretrained(config.vae)
    dataset, validation = build_datasets(config, vae, False, config.arrays, config.cameras)
    batches = ConditionBatches(config, Texts(config, dataset.texts, []), vae, find_action_spec(config, dataset))
    model = build_model(config, batches.action_dim)
    scheduler = CosmosEDMScheduler.from_pretrained(config.init_from, subfolder="scheduler")
    return model, ConditionedLoss(config, scheduler, True), dataset, batches, validation


def test_samples_and_batches_of_several_views(make, cache):
    _, _, dataset, batches, _ = assemble(make("views", "trajectory", "camera"))
    sample = dataset[1, 0]
    assert sample["latents"].shape == (16, 9, 4, 6) and sample["views"] == VIEWS
    assert sample["view_captions"] == ["the red cube", "a robot arm", "a robot arm"]
    assert sample["camera"]["extrinsics"].shape == (3, 9, 4, 4)
    batch = batches.collate([dataset[i, 0] for i in range(4)])
    assert batch["text"].shape == (4, 3 * 16, 32) and batch["actions"].shape == (4, 1, 12)
    assert batch["camera"].shape == (4, 6, 9, 4, 6)
    assert torch.equal(batch["text"][:, 16:32], batch["text"][:, 32:]) and not torch.equal(
        batch["text"][:, :16], batch["text"][:, 32:]
    )
    assert batch["actions"].abs().max() <= 1.2 and batch["actions"].std() > 0.1
    # Every view has its file: another choice of views codes nothing again.
    before = set(Path(cache).rglob("latents-*/*"))
    _, _, fewer, batches, _ = assemble(make("views", "action", views=["right", "front"]))
    assert set(Path(cache).rglob("latents-*/*")) == before
    assert torch.equal(fewer[1, 0]["latents"][:, 3:], dataset[1, 0]["latents"][:, :3])
    assert batches.collate([fewer[0, 0]])["actions"].shape == (1, 6, 8)


def test_one_camera_of_several_is_a_clip_like_any_other(make, data, cache):
    """For post-training of a single-view base, and for pretraining of both families and of tokenizers."""
    config = make("camera", "action", views=[], camera="left", window_starts=[0], val_data=[str(data)])
    model, loss_of, dataset, batches, validation = assemble(config)
    _, _, together, _, _ = assemble(make("views", window_starts=[0]))
    sample = dataset[1, 0]
    assert torch.equal(sample["latents"], together[1, 0]["latents"][:, 3:6]) and "views" not in sample
    assert sample["camera"]["extrinsics"].shape == (9, 4, 4) and validation[data.name][0]["latents"].shape[1] == 3
    batch = batches.collate([dataset[i, 0] for i in range(2)])
    assert batch["camera"].shape == (2, 6, 3, 4, 6) and torch.isfinite(loss_of(model, batch)[0])
    zooming = sample["camera"] | {"intrinsics": sample["camera"]["intrinsics"].expand(9, 3, 3)}  # as many as frames
    assert torch.equal(batches.collate([sample | {"camera": zooming}])["camera"][0], batch["camera"][1])
    with pytest.raises(ValueError, match="clip 'clip-1': actions have 1 numbers"):
        batches.collate([sample | {"actions": sample["actions"][:, :1]}])

    known = dict(data=[str(data)], camera="left", vae=config.vae, cache_dir=cache, num_frames=9, progress=False)
    for config in (DiffusionConfig(train_text_encoder=True, **known), AutoregressiveConfig(**known)):
        plain, _ = build_datasets(config, CosmosVideoTokenizer.from_pretrained(config.vae))
        assert plain.windows[1].keys() > dataset.windows[1].keys()
    config = TokenizerConfig(data=[str(data)], camera="left", num_frames=9)
    assert (
        build_dataset(config)[0]["video"].shape == build_whole(config, str(data))[0]["video"].shape == (3, 9, 32, 48)
    )


def test_at_one_view_the_start_is_the_base_to_the_bit(make, base):
    model = build_model(make("views"), None).transformer.eval()
    plain = CosmosWorldTransformer3D.from_pretrained(base / "transformer").eval()
    assert model.config.num_views == 3 and model.view_embed.views.weight.requires_grad
    given = dict(condition_mask=torch.zeros(2, 1, 3, 4, 6), fps=5)
    inputs = torch.randn(2, 16, 3, 4, 6), torch.zeros(2), torch.randn(2, 5, 32)
    with torch.no_grad():
        for view in range(3):
            assert torch.equal(model(*inputs, **given, view_indices=(view,)).sample, plain(*inputs, **given).sample)


def test_views_learn_from_one_another_and_the_figures_show_it(make, data):
    """All views show the bar at the height of the clip, which only a view that is given tells."""
    config = make("views", lora_rank=0, learned_uncertainty=False, whole_views=0.9, val_data=[str(data)])
    model, loss_of, dataset, batches, validation = assemble(config)
    batch = batches.collate([dataset[i, 0] for i in range(4)])
    before = loss_of.sensitivity(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        torch.manual_seed(step % 8)
        loss, _ = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = loss_of.sensitivity(model, batch)
    assert before["sensitivity_views"] < 0.02 and before["error_ratio_views"] == pytest.approx(1, abs=2e-3)
    assert after["sensitivity_views"] > 0.05 and after["error_ratio_views"] > 1.03
    figures = validate_conditions(model.eval(), loss_of, batches, validation, 4)
    assert {f"{data.name}_denoising_given1", f"{data.name}_error_ratio_views"} <= figures.keys()


def test_some_views_a_step(make):
    """Their latents, texts, rays and places belong together; a trajectory is of all of them."""
    config = make("views", "trajectory", "camera", views_per_step=2)
    model, loss_of, dataset, batches, _ = assemble(config)
    batch = batches.collate([dataset[i, 0] for i in range(2)])
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        part = loss_of.draw_views(batch)
        seen.add(part["view_indices"])
        first = part["view_indices"][0]
        assert torch.equal(part["latents"][:, :, :3], batch["latents"][:, :, 3 * first : 3 * first + 3])
        assert torch.equal(part["text"][:, :16], batch["text"][:, 16 * first : 16 * first + 16])
        assert part["camera"].shape[2] == 6 and torch.equal(part["actions"], batch["actions"])
        assert torch.isfinite(loss_of(model, batch)[0])
    assert seen == {(0, 1), (0, 2), (1, 2)}


def test_rays_of_some_views_are_those_of_a_call_of_them(make, base):
    """Relative to the first of the views that take part, in the model's order, whatever the order of the call."""
    _, loss_of, dataset, batches, _ = assemble(make("views", "camera", views_per_step=2))
    samples = [dataset[i, 0] for i in range(2)]
    sides = {"front": torch.eye(4), "left": named_trajectory("pan_left", 2, angle=60)[1].float()}
    sides["right"] = torch.linalg.inv(sides["left"])
    sides["left"][0, 3], sides["right"][0, 3] = 0.5, -0.7
    for sample in samples:
        poses = [sides[v] @ p for v, p in zip(VIEWS, sample["camera"]["extrinsics"], strict=True)]
        sample["camera"] = sample["camera"] | {"extrinsics": torch.stack(poses)}
    pipe = CosmosMultiViewPipeline.from_pretrained(base)
    extend_conditions(pipe.transformer, num_views=3, view_embed_dim=6, camera_channels=6)
    batch = batches.collate(samples)
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        part = loss_of.draw_views(batch)
        names = [VIEWS[index] for index in part["view_indices"]]
        cameras = [
            {view: dict(intrinsics=c["intrinsics"][v], extrinsics=c["extrinsics"][v]) for v, view in enumerate(VIEWS)}
            for c in (sample["camera"] for sample in samples)
        ]
        for order in (names, names[::-1]):
            places = {view: VIEWS.index(view) for view in order}
            called = [{view: camera[view] for view in order} for camera in cameras]
            run = dict(height=32, width=48, num_frames=9)
            rays = read_view_conditions(pipe, run, places, None, called, None)["camera"]
            kept = pick_views(rays, [order.index(view) for view in names], 2, 2)
            torch.testing.assert_close(part["camera"], kept, atol=1e-5, rtol=0)
        seen.add(part["view_indices"])
    assert (1, 2) in seen


@pytest.mark.parametrize(
    ("conditions", "more", "message"),
    [
        (("views",), dict(views=["front"]), "views must name at least two cameras"),
        (("views",), dict(views=["front", "front"]), "different names"),
        (("views",), dict(views=["front", "roof"]), "no view roof: the clip has front, left, right"),
        (("camera",), {}, "views names cameras, but the base has one view: add views to conditions"),
        (("views",), dict(views_per_step=1), r"views_per_step must be 0 .all. or 2 to 3"),
        (("views",), dict(whole_views=1.5), r"whole_views must be in \[0, 1\]"),
        (("views", "action", "trajectory"), {}, "action and trajectory enter the network by the same door"),
        (("instruction",), dict(views=[]), "the clip has the views front, left, right: name one as `camera`"),
        (("instruction",), dict(views=[], camera="roof"), "no view roof: the clip has front, left, right"),
        (("views",), dict(camera="left"), "camera names the one view to read, but this run has front, left, right"),
        (
            ("action", "views"),
            dict(views=["left"]),
            "for one alone leave views out of conditions and name it as camera",
        ),
    ],
)
def test_mistakes_are_refused(make, conditions, more, message):
    with pytest.raises(ValueError, match=message):
        assemble(make(*conditions, **more))


def run_script(base, data, cache, folder, flags):
    runpy.run_path(str(SCRIPT))["main"](
        f"--init_from {base} --data {data} --val_data {data} --output_dir {folder} --cache_dir {cache} --batch_size 2 "
        f"--max_steps 2 --log_every 1 --progress false --max_condition_frames 1 --trajectory_points 4 {flags}".split()
    )
    return folder / "export"


def generate(pipe, **more):
    settings = dict(prompt=PROMPT, output_type="latent", generator=torch.Generator().manual_seed(0))
    return pipe(**settings | more).frames


def test_an_adapter_from_shard_to_pipeline_and_a_trajectory_on_top(base, data, cache, tmp_path):
    """The script's adapter brings views, their names and the size; fused and saved it is a base of several views, on which another
    run can learn trajectories."""
    export = run_script(
        base,
        data,
        cache,
        tmp_path / "views",
        f"--conditions views --views {' '.join(VIEWS)} --views_per_step 2 --lora_rank 4",
    )
    log = [json.loads(line) for line in (tmp_path / "views" / "log.jsonl").read_text().splitlines()]
    assert "sensitivity_views" in log[0] and f"val_{data.name}_error_ratio_views" in log[-1]
    pipe = CosmosMultiViewPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    plain = CosmosVideo2WorldPipeline.from_pretrained(base)
    plain.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(export, adapter_name="views")
    assert pipe.views == tuple(VIEWS) and pipe.trained_settings == dict(height=32, width=48, num_frames=9, fps=5.0)
    image = np.full((1, 32, 48, 3), 90, dtype=np.uint8)
    result = generate(pipe, image={"left": image})
    assert list(result) == VIEWS and result["front"].shape == (1, 16, 3, 4, 6)
    plain.load_lora_weights(export)
    with pytest.raises(ValueError, match="model has 3 views: call it through CosmosMultiViewPipeline"):
        plain(image=image[0], prompt=PROMPT)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "several")
    again = CosmosMultiViewPipeline.from_pretrained(tmp_path / "several")
    again.set_progress_bar_config(disable=True)
    assert again.views == tuple(VIEWS)
    torch.testing.assert_close(generate(again, image={"left": image})["right"], result["right"], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="the base has the views front, left, right already"):
        PosttrainConfig(init_from=str(tmp_path / "several"), conditions=["views"], views=VIEWS)
    export = run_script(tmp_path / "several", data, cache, tmp_path / "way", "--conditions trajectory --lora_rank 2")
    again.load_lora_weights(export)
    points = np.zeros((4, 3))
    points[:, 2] = np.linspace(0.2, 0.8, 4)
    assert generate(again, image={"left": image}, actions=points)["left"].shape == (1, 16, 3, 4, 6)
    with pytest.raises(ValueError, match="needs actions="):
        generate(again, image={"left": image})


def test_the_evaluation_of_an_adapter(base, data, cache, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycolmap", reason="needs the extra cosmos-hf[geometry]")
    monkeypatch.setattr(geometry, "ENLARGED_HEIGHT", 64)  # the figures are not looked at here
    export = run_script(
        base, data, cache, tmp_path, f"--conditions views trajectory --views {' '.join(VIEWS)} --lora_rank 2"
    )
    output = tmp_path / "views.json"

    def evaluate(*more):
        known = (
            f"--model {base} --adapter {export} --data {data} --output {output} --num_clips 1 --num_inference_steps 1"
        )
        main = runpy.run_path(str(SCRIPT.parents[1] / "pipelines" / "evaluate_views.py"))["main"]
        main([*known.split(), "--device", "cpu", *more])

    evaluate("--compare_base")
    figures = json.loads(output.read_text())[data.name]
    assert set(figures) == {"truth", "reconstruction", "frames", "view", "base_frames"}
    assert set(figures["truth"]["geometry"]) == {"temporal", "temporal_known", "cross_view", "trajectory"}
    assert (
        figures["view"]["psnr"]["model"]["count"] == 2 and figures["frames"]["psnr"]["copy_first_frame"]["count"] == 3
    )
    assert figures["frames"]["geometry"]["trajectory"]["length"]["mean"] == pytest.approx(0.8, rel=0.01)
    assert (tmp_path / "views" / f"{data.name}.png").exists()
    with pytest.raises(SystemExit):
        evaluate("--views", "left", "right")
    assert "trajectories are in the axes of the camera front: name it among the --views" in capsys.readouterr().err


def test_arrays_of_other_cameras_are_refused(data):
    clips = open_clips(data)
    files = clips.read(clips.keys[0])
    files["json"] = json.dumps(dict(caption="a robot arm", views=["front"])).encode()
    with pytest.raises(ValueError, match="arrays are of the views front: no left"):
        SampleReader(views=("front", "left")).read_arrays(files, "clip", ("camera",))


def test_training_in_full_exports_a_pipeline(base, data, cache, tmp_path):
    export = run_script(base, data, cache, tmp_path, "--conditions views trajectory --views front right --lora_rank 0")
    pipe = CosmosMultiViewPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.views == ("front", "right") and pipe.action_spec.kind == "trajectory"
    assert generate(pipe, actions=np.full((4, 3), [0, 0, 0.4]))["right"].shape == (1, 16, 3, 4, 6)
