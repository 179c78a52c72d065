"""Several cameras in a tiny autoregressive pipeline: post-training, its adapter, and generation from any of the views."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from cosmos_hf.evaluation import geometry
from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.ar_generation import KnownCodes
from cosmos_hf.models.ar_layers import view_of
from cosmos_hf.models.autoencoder_cosmos import PRESETS as TOKENIZERS
from cosmos_hf.models.autoencoder_cosmos import CosmosVideoTokenizer
from cosmos_hf.models.condition_adapters import ConditionAdapter
from cosmos_hf.models.medusa_cosmos import speculative_generate
from cosmos_hf.pipelines.autoregressive import CosmosAutoregressivePipeline

SCRIPT = Path(__file__).parents[2] / "training" / "posttrain.py"
VIEWS = ["front", "left", "right"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    transformer = CosmosARForCausalLM(CosmosARConfig(**PRESETS["tiny"] | dict(latent_shape=(3, 4, 6))))
    vae = CosmosVideoTokenizer(**TOKENIZERS["tiny-discrete"]).eval()
    vae.quant_conv.weight.data.mul_(20)  # clips have different codes
    folder = tmp_path_factory.mktemp("base")
    size = dict(height=32, width=48, num_frames=9, fps=5)
    CosmosAutoregressivePipeline(vae=vae, transformer=transformer, **size).save_pretrained(folder)
    return folder


def train(base, data, out, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    known = ["--family", "autoregressive", "--init_from", str(base), "--data", str(data), "--output_dir", str(out)]
    known += [
        "--cache_dir",
        str(out.parent / "cache"),
        "--batch_size",
        "2",
        "--learning_rate",
        "0.01",
        "--progress",
        "false",
    ]
    runpy.run_path(str(SCRIPT))["main"]([*known, *map(str, flags)])
    return out / "export"


@pytest.fixture(scope="module")
def adapter(base, clips_of_three_cameras, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "views"
    flags = ("--conditions", "views", "--views", *VIEWS, "--lora_rank", 4, "--max_steps", 20, "--warmup_steps", 1)
    return train(base, clips_of_three_cameras, out, *flags, "--val_data", str(clips_of_three_cameras))


@pytest.fixture
def pipe(base, adapter):
    pipe = CosmosAutoregressivePipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter)
    return pipe


def picture(shade, frames=1):
    return torch.full((3, frames, 32, 48), shade, dtype=torch.uint8)


def test_one_camera_of_several_trains_a_single_view_base(base, clips_of_three_cameras, tmp_path):
    flags = ("--conditions", "action", "--action_spec", "driving", "--lora_rank", 2, "--max_steps", 1)
    export = train(base, clips_of_three_cameras, tmp_path / "run", *flags, "--camera", "right")
    assert json.loads((export / "conditions.json").read_text())["names"] == ["action"]
    with pytest.raises(ValueError, match="the clip has the views front, left, right: name one as `camera`"):
        train(base, clips_of_three_cameras, tmp_path / "other", *flags)


# ---- model -----------------------------------------------------------------------------------------------------------


def test_views_share_positions_and_differ_by_their_vector():
    torch.manual_seed(0)
    sizes = PRESETS["tiny"] | dict(latent_shape=(2, 6, 4), num_views=3)
    model = CosmosARForCausalLM(CosmosARConfig(**sizes)).eval()
    positions = torch.arange(2 * 6 * 4)[None]
    views = view_of(model.config, positions, (2, 6, 4))[0]
    assert views.view(2, 3, 8).eq(torch.arange(3)[:, None]).all()
    (cos, sin), _ = model.model.positions(positions, (2, 6, 4), torch.float32)
    assert torch.equal(cos[0, :8], cos[0, 8:16]) and not torch.equal(cos[0, :8], cos[0, 24:32])
    with pytest.raises(ValueError, match="5 rows are not those of 3 views"):
        model(torch.zeros(1, 2, dtype=torch.long), latent_shape=(2, 5, 4))
    with pytest.raises(ValueError, match="must have rows for num_views=4"):
        CosmosARConfig(**sizes | dict(num_views=4))


@torch.no_grad()
def test_every_way_to_generate_gives_the_same_codes():
    torch.manual_seed(0)
    model = CosmosARForCausalLM(CosmosARConfig(**PRESETS["tiny"] | dict(latent_shape=(3, 6, 4), num_views=3))).eval()
    prompt = torch.randint(1000, (2, 24))
    greedy = model.generate(prompt)
    model.packs_weights = False
    assert torch.equal(model.generate(prompt), greedy)
    tokens = prompt
    for _ in range(48):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, greedy)
    assert torch.equal(speculative_generate(model, prompt, draft="previous_frame").sequences, greedy)
    known = torch.full((2, 72), -1)
    known[:, :24], known[:, 32:40] = prompt, torch.randint(1000, (2, 8))
    forced = model.generate(prompt, logits_processor=[KnownCodes(known)])
    assert torch.equal(forced[:, 32:40], known[:, 32:40]) and not torch.equal(forced[:, 40:], greedy[:, 40:])
    assert torch.equal(forced[:, :32], greedy[:, :32])


def test_step_zero_is_the_base_for_the_first_view(base):
    model = CosmosARForCausalLM.from_pretrained(base / "transformer").eval()
    tokens = torch.randint(1000, (1, 24))
    expected = model(tokens).logits
    changes = {"num_views": 3}
    adapter = ConditionAdapter(changes, {"model.view_embed.weight": torch.ones(3, 48)}, {})
    adapter.add_to(model, scale=0.0)
    assert model.config.latent_shape == [3, 12, 6]
    torch.testing.assert_close(model(tokens).logits, expected)
    adapter.remove_from(model)
    assert model.config.latent_shape == [3, 4, 6] and model.model.view_embed is None
    adapter.add_to(model)
    assert not torch.allclose(model(tokens).logits, expected, atol=1e-3)


# ---- training and pipeline -------------------------------------------------------------------------------------------


def test_any_views_are_given_and_the_others_generated(pipe):
    assert pipe.views == tuple(VIEWS) and pipe.transformer.config.num_views == 3
    first = {view: picture(60 + 20 * v) for v, view in enumerate(VIEWS)}
    frames = pipe(image=first, temperature=0, output_type="latent").frames
    assert list(frames) == VIEWS and frames["left"].shape == (1, 3, 4, 6)
    for view in VIEWS:
        given = pipe.vae.encode(first[view][None].float() / 127.5 - 1).indices
        assert torch.equal(frames[view][:, :1], given)
    moving = picture(80, 9)
    moving[:, 4:] = 200
    front = {"front": first["front"]}

    def draw(left):
        return pipe(
            image=front, video={"left": left}, output_type="latent", generator=torch.Generator().manual_seed(0)
        ).frames

    whole, other = draw(moving), draw(picture(80, 9))
    assert torch.equal(whole["left"], pipe.vae.encode(moving[None].float() / 127.5 - 1).indices)
    assert not torch.equal(other["right"][:, 1:], whole["right"][:, 1:])  # what is given matters to the others
    pictures = pipe(image=first, num_frames=13, generator=torch.Generator().manual_seed(0)).frames
    assert len(pictures["right"][0]) == 13 and pictures["right"][0][0].size == (48, 32)  # longer than the window


def test_the_script_measures_it(base, adapter, clips_of_three_cameras, tmp_path, monkeypatch):
    pytest.importorskip("pycolmap", reason="needs the extra cosmos-hf[geometry]")
    monkeypatch.setattr(geometry, "ENLARGED_HEIGHT", 64)  # the figures are not looked at here
    flags = [
        "--model",
        str(base),
        "--adapter",
        str(adapter),
        "--data",
        str(clips_of_three_cameras),
        "--num_clips",
        "1",
    ]
    script = SCRIPT.parents[1] / "pipelines" / "evaluate_views.py"
    runpy.run_path(str(script))["main"](
        [*flags, "--compare_base", "--device", "cpu", "--output", str(tmp_path / "views.json")]
    )
    figures = json.loads((tmp_path / "views.json").read_text())[clips_of_three_cameras.name]
    assert {"truth", "reconstruction", "frames", "view", "base_frames"} == figures.keys()


def test_a_seed_gives_the_same_video_alone_or_in_a_batch(pipe):
    first = {"front": [picture(60), picture(120)], "right": picture(200)}
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    both = pipe(image=first, generator=seeds, output_type="latent").frames
    alone = pipe(
        image=first | {"front": picture(120)}, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).frames
    assert torch.equal(both["left"][1:], alone["left"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(image=picture(60)), r"image must be a dict by the views' names \(front, left, right\)"),
        (dict(image={"roof": picture(60)}), "image names roof: the views are front, left, right"),
        (dict(image={"left": picture(60)}), r"the first frame of the first view \(front\) must be given"),
        (dict(image={"front": picture(60)}, video={"left": picture(60, 9)}, draft="previous_frame"), "leave it out"),
        (dict(image={"front": picture(60)}, use_diffusion_decoder=True), "no diffusion_decoder"),
    ],
)
def test_contradictions_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_fused_it_is_a_base_of_several_views(pipe, clips_of_three_cameras, tmp_path):
    first = {view: picture(60 + 20 * v) for v, view in enumerate(VIEWS)}
    expected = pipe(image=first, temperature=0, output_type="latent").frames["right"]
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    again = CosmosAutoregressivePipeline.from_pretrained(tmp_path / "fused")
    again.set_progress_bar_config(disable=True)
    assert again.views == tuple(VIEWS)
    assert torch.equal(again(image=first, temperature=0, output_type="latent").frames["right"], expected)
    flags = ("--conditions", "action", "--action_spec", "driving", "--lora_rank", 0, "--max_steps", 2)
    acting = train(tmp_path / "fused", clips_of_three_cameras, tmp_path / "action", *flags)
    acting = CosmosAutoregressivePipeline.from_pretrained(acting)
    assert acting.views == tuple(VIEWS) and acting.transformer.conditions == ("actions",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--conditions", "views", "--views", "front"), "views must name at least two cameras"),
        (("--conditions", "action", "--views", "front", "left"), "add views to conditions"),
        (("--conditions", "camera"), "one or several of action, instruction, views"),
    ],
)
def test_mistakes_are_refused(base, clips_of_three_cameras, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train(base, clips_of_three_cameras, tmp_path / "run", *flags)
