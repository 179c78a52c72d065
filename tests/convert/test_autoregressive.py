"""Converted checkpoints of the reference reproduce its outputs: network, cache, generation, training loss, gradients."""

import runpy
from pathlib import Path

import pytest
import torch

from cosmos_hf import CosmosAutoregressivePipeline, preflight
from cosmos_hf.convert import load_original
from cosmos_hf.convert.autoregressive import join_shards
from cosmos_hf.models.ar_cosmos import PRESETS, CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.ar_layers import absolute_table, axis_frequencies, rotation_table
from cosmos_hf.models.ar_loss import IGNORED, ignored_tokens
from golden_files import golden, golden_json, weights
from tiny_pipelines import SMALL, TEXT, autoregressive, components, diffusion_decoder

SCRIPT = Path(__file__).parents[2] / "pipelines" / "convert_autoregressive.py"
NAMES = ("ar_base_4b", "ar_cross_5b", "ar_yarn_12b", "ar_cross_yarn_13b")


def load(name, **more):
    tensors, metadata, config = golden("autoregressive", name, **more)
    model = load_original("Transformer", config, weights(tensors), training_type=metadata["training_type"])
    return model, tensors, metadata, config


def close(actual, expected, tolerance=3e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def base():
    return load("ar_base_4b", outputs=True)


@pytest.fixture(scope="module")
def checkpoint():
    """Of the reference's names and shapes; the numbers do not matter."""
    return load("ar_base_4b")


# ---- the network ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prefill_and_cached_decoding(base):
    model, tensors, metadata, _ = base
    length, tokens = int(metadata["prefill_len"]), tensors["tokens"]
    out = model(tokens[:, :length], use_cache=True)
    close(out.logits[:, -tensors["prefill.logits"].shape[1] :], tensors["prefill.logits"])
    steps = []
    for i in range(length, length + 3):
        steps.append(model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True).logits)
    close(torch.cat(steps, 1), tensors["decode.logits"])
    close(out.past_key_values.layers[0].keys, tensors["cache_k.layer0"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "masked."])
def test_a_layer_with_everything(prefix):
    """YaRN, absolute embedding, cross-attention with and without mask, `<bov>`."""
    model, tensors, metadata, _ = load("ar_cross_yarn_13b", outputs=True)
    mask = tensors["context_mask"] if prefix else None
    out = model(
        tensors["tokens"][:, : int(metadata["prefill_len"])],
        encoder_hidden_states=tensors["context"],
        encoder_attention_mask=mask,
        output_hidden_states=True,
    )
    hidden = model.model.layers[0](
        model.model.embed_tokens(tensors["tokens"][:, :49]),
        *model.model.positions(torch.arange(49)[None], (5, 4, 6), torch.float32),
        context=tensors["context"],
        context_mask=None if mask is None else mask[:, None, None],
    )
    close(hidden, tensors[f"{prefix}prefill.hidden"][0])
    if len(model.model.layers) == 1:  # the shortened file: its last state is normalised
        hidden = model.model.norm(hidden)
    close(out.hidden_states[1], hidden, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_in_full(name, attention):
    model, tensors, metadata, _ = load(name, full=True)
    model.set_attn_implementation(attention)
    for prefix in ("", "masked."):
        if f"{prefix}full.logits" not in tensors:
            continue
        context = {}
        if "context" in tensors:
            context = {"encoder_hidden_states": tensors["context"]}
            if prefix:
                context["encoder_attention_mask"] = tensors["context_mask"]
        close(model(tensors["tokens"], **context).logits, tensors[f"{prefix}full.logits"])
        length = int(metadata["prefill_len"])
        out = model(tensors["tokens"][:, :length], use_cache=True, output_hidden_states=True, **context)
        close(out.logits, tensors[f"{prefix}prefill.logits"])
        close(torch.stack(out.hidden_states[1:-1]), tensors[f"{prefix}prefill.hidden"][:-1])
        steps = [
            model(
                tensors["tokens"][:, i : i + 1], past_key_values=out.past_key_values, use_cache=True, **context
            ).logits
            for i in range(length, length + 3)
        ]
        close(torch.cat(steps, 1), tensors[f"{prefix}decode.logits"])


def test_tables():
    model, tensors, _, _ = load("ar_cross_yarn_13b")
    time, height, _ = axis_frequencies(model.config)
    close(time, tensors["rope.temporal_inv_freq"], 1e-6)
    close(height, tensors["rope.spatial_inv_freq"], 1e-6)
    cos, sin = rotation_table(model.config, (5, 4, 6))
    close(cos, tensors["rope.cos"][: len(cos)], 1e-6)
    close(sin, tensors["rope.sin"][: len(sin)], 1e-6)
    absolute = absolute_table(model.config, (5, 4, 6))
    assert torch.equal(absolute, tensors["abs_pos_emb"][: len(absolute)])
    assert tensors["abs_pos_emb"][len(absolute) :].abs().max() == 0


@pytest.mark.parametrize(
    ("preset", "name"), [("4b", "4B"), ("5b-video2world", "5B-Video2World"), ("12b", "12B"), ("13b-video2world", "13B-Video2World")]
)  # fmt: skip
def test_frequencies_of_the_published_models(preset, name):
    tensors, _, _ = golden("autoregressive", "ar_official_rope_freqs")
    time, height, width = axis_frequencies(CosmosARConfig(**PRESETS[preset]))
    close(time, tensors[f"Cosmos-Predict1-{name}.temporal_inv_freq"], 1e-6)
    close(height, tensors[f"Cosmos-Predict1-{name}.spatial_inv_freq"], 1e-6)
    assert torch.equal(height, width)


def test_what_the_reference_left_out_of_yarn_can_be_switched_on():
    config = CosmosARConfig(**PRESETS["12b"] | dict(yarn_width_from_height=False, yarn_attention_temperature=True))
    _, height, width = axis_frequencies(config)
    assert (width <= height).all() is not True and not torch.equal(height, width)
    cos, _ = rotation_table(config, (1, 1, 2))
    assert cos[0, 0].item() == pytest.approx(1.0693147)


# ---- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ar_base_4b", "ar_cross_5b"])
def test_generation(name, base):
    tensors, _, _ = golden("autoregressive", "ar_generate")
    model = base[0] if name == "ar_base_4b" else load(name, full=True)[0]
    options = {"max_new_tokens": 16}
    if f"{name}.context" in tensors:
        options["encoder_hidden_states"] = tensors[f"{name}.context"]
    prompt = tensors[f"{name}.prompt"]

    def new(**more):
        return model.generate(prompt, **options, **more)[:, -16:]

    greedy = tensors[f"{name}.greedy"]
    assert torch.equal(new(), greedy)
    assert torch.equal(new(cache_implementation="static"), greedy)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(new(do_sample=True, top_p=0.8, generator=generator), tensors[f"{name}.top_p0.8_seed3"])
    torch.manual_seed(3)
    # The file does not name its temperature: 0.9 is the one among those tried that gives all its codes.
    top_k = tensors[f"{name}.top_k20_seed3"]
    assert torch.equal(new(do_sample=True, top_k=20, temperature=0.9), top_k)


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ar_base_4b", "ar_cross_5b"])
def test_training_loss_and_gradients(name):
    tensors, metadata, _ = golden("autoregressive", f"train_loss_{name}", full=True)
    model, *_ = load(name, full=True)
    given = ignored_tokens(model.config, (5, 4, 6), condition_frames=1, as_reference=True)
    labels = tensors["tokens"].clone()
    labels[:, :given] = IGNORED
    expected = tensors["labels"]
    assert torch.equal(labels[:, 1:], expected.masked_fill(expected == int(metadata["ignore_index"]), IGNORED))
    loss = model(tensors["tokens"], labels=labels, encoder_hidden_states=tensors.get("context")).loss
    loss.backward()
    close(loss, tensors["loss.total"], 1e-5)
    names = {
        "layers.0.attention.wq.weight": "model.layers.0.self_attn.q_proj.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for key, ours in names.items():
        close(model.get_parameter(ours).grad, tensors[f"grad.{key}"], 1e-5)


def test_the_corrected_loss_does_not_train_on_what_was_given():
    text = CosmosARConfig(**PRESETS["5b-video2world"])
    plain = CosmosARConfig(**PRESETS["4b"])
    assert ignored_tokens(text, (5, 4, 6), 1) == 25 and ignored_tokens(text, (5, 4, 6), 1, as_reference=True) == 24
    assert ignored_tokens(plain, (5, 4, 6), 1) == ignored_tokens(plain, (5, 4, 6), 1, as_reference=True) == 24
    assert ignored_tokens(text, (5, 4, 6), 0) == 1


# ---- the full-size checkpoints, and what the converter refuses -----------------------------------------------------------


@pytest.mark.parametrize("preset", ["4b", "5b-video2world", "12b", "13b-video2world"])
def test_every_key_of_the_published_models(preset):
    name = f"Cosmos-Predict1-{preset.replace('b', 'B', 1).replace('video2world', 'Video2World')}"
    keys, index = golden_json("manifests", name), golden_json("manifests", "_index")[name]
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()
    }
    state |= {"layers.0.attention._extra_state": torch.zeros(0)}
    kind = index["tokenizer"]["training_type"]
    model = load_original("Transformer", index["model_config"], {"model": {f"model.{k}": v for k, v in state.items()}},
                          training_type=kind)  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == index["n_params"]
    ours = {k: v for k, v in model.config.to_dict().items() if k != "transformers_version"}
    preset = {k: v for k, v in CosmosARConfig(**PRESETS[preset]).to_dict().items() if k != "transformers_version"}
    assert {k for k in ours if ours[k] != preset[k]} == set()


def split(state):
    """A checkpoint of two tensor-parallel ranks."""
    halves = ({}, {})
    for key, value in state.items():
        dim = 1 if key.endswith((".wo.weight", ".w2.weight")) else None if "norm" in key else 0
        for half, part in zip(halves, [value] * 2 if dim is None else value.chunk(2, dim), strict=True):
            half[key] = part
    return halves


def test_shards_are_joined(checkpoint):
    _, tensors, metadata, config = checkpoint
    state = weights(tensors)
    shards = split(state)
    shards[1]["layers.0.attention._extra_state"] = torch.zeros(0)
    joined = join_shards([{"model": shard} for shard in shards])
    assert joined.keys() == state.keys() and all(torch.equal(joined[k], state[k]) for k in state)
    with pytest.raises(ValueError, match="shard 1 has other keys than shard 0"):
        join_shards([shards[0], {k: v for k, v in shards[1].items() if k != "norm.weight"}])
    shards[1]["norm.weight"] = shards[1]["norm.weight"] + 1
    with pytest.raises(ValueError, match="norm.weight is not split"):
        join_shards(shards)


def test_fused_names_of_transformer_engine(checkpoint):
    model, tensors, _, config = checkpoint
    state = weights(tensors)
    for i in range(4):
        layer = f"layers.{i}."
        state[layer + "self_attention.layernorm_qkv.layer_norm_weight"] = state.pop(layer + "attention_norm.weight")
        for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
            state[f"{layer}self_attention.layernorm_qkv.{name}_weight"] = state.pop(
                f"{layer}attention.w{short}.weight"
            )
        state[layer + "self_attention.proj.weight"] = state.pop(layer + "attention.wo.weight")
        state[layer + "layernorm_mlp.layer_norm_weight"] = state.pop(layer + "ffn_norm.weight")
        gate, up = (state.pop(f"{layer}feed_forward.{w}.weight") for w in ("w1", "w3"))
        state[layer + "layernorm_mlp.fc1_weight"] = torch.cat([gate, up])
        state[layer + "layernorm_mlp.fc2_weight"] = state.pop(layer + "feed_forward.w2.weight")
    again = load_original("Transformer", config, state).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_wrong_checkpoints_are_refused(checkpoint):
    _, tensors, _, config = checkpoint
    state = weights(tensors)

    def refused(message, state=state, kind=None, **changes):
        with pytest.raises(ValueError, match=message):
            load_original("Transformer", {**config, **changes}, state, training_type=kind)

    refused(r"unknown keys \['stray'\]", state={**state, "stray": torch.zeros(1)})
    refused(
        r"missing \(our names\) \['model.norm.weight'\]", state={k: v for k, v in state.items() if k != "norm.weight"}
    )
    refused(r"norm.weight has shape \(127,\)", state={**state, "norm.weight": state["norm.weight"][1:]})
    refused("no output.weight", state={k: v for k, v in state.items() if k != "output.weight"})
    refused("has 512 rows, the config's vocab_size is 500", vocab_size=500)
    refused("norm_type='layernorm' is not supported", norm_type="layernorm")
    refused("stray=1 is not known", stray=1)
    refused("training_type must be one of", kind="image_to_video")
    with pytest.raises(ValueError, match="argument dim is missing"):
        load_original("Transformer", {k: v for k, v in config.items() if k != "dim"}, state)


def original_state(model) -> dict:
    """The state dict under the reference's names."""
    state = {}
    for key, value in model.state_dict().items():
        for new, old in (
            ("model.", ""), ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
            ("self_attn", "attention"), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"), ("mlp", "feed_forward"),
            ("cross_attn_layernorm", "cross_attention_norm"), ("cross_attn", "cross_attention"), ("q_proj", "wq"),
            ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo"), ("embed_tokens", "tok_embeddings"), ("lm_head", "output"),
        ):  # fmt: skip
            key = key.replace(new, old)
        state[key] = value.clone()
    return state


def test_script(tmp_path, capsys):
    model = CosmosARForCausalLM(CosmosARConfig(**PRESETS["tiny"])).bfloat16()
    files = []
    for rank, shard in enumerate(split(original_state(model))):
        files.append(str(tmp_path / f"shard{rank}.pt"))
        torch.save({k: v.clone() for k, v in shard.items()}, files[-1])
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--checkpoint", *files, "--preset", "tiny", "--output", str(tmp_path / "out")])
    assert "torch.bfloat16" in capsys.readouterr().out
    again = CosmosARForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert (tmp_path / "out" / "preflight.json").exists()
    with pytest.raises(SystemExit):
        main(["--checkpoint", files[0], "--preset", "tiny", "--output", str(tmp_path / "out2")])
    assert "lm_head.weight" not in capsys.readouterr().out


def test_script_writes_a_whole_pipeline(tmp_path, capsys, monkeypatch):
    """Checkpoint, tokenizer, text encoder and diffusion decoder -> a folder that the next command of the page reads."""
    ours, size = autoregressive(text=True), SMALL | TEXT
    monkeypatch.setitem(PRESETS, "tiny-text", size)
    torch.save(original_state(ours.transformer), tmp_path / "model.pt")
    ours.save_pretrained(tmp_path / "parts")
    decoder = diffusion_decoder(code_spatial_compression=8)
    decoder.save_pretrained(tmp_path / "decoder")
    main = runpy.run_path(str(SCRIPT))["main"]

    def convert(output, *more, preset="tiny-text"):
        given = ("--checkpoint", tmp_path / "model.pt", "--preset", preset, "--output", tmp_path / output, *more)
        main([str(argument) for argument in given])

    parts = ("--text_encoder", tmp_path / "parts", "--diffusion_decoder", tmp_path / "decoder")
    convert("out", "--vae", tmp_path / "parts" / "vae", *parts)
    assert "outputs recorded" in capsys.readouterr().out
    preflight(tmp_path / "out")
    pipe = CosmosAutoregressivePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.height, pipe.config.width, pipe.config.num_frames) == (32, 32, 9)
    assert pipe.diffusion_decoder is not None and pipe.tokenizer is not None
    call = dict(image=torch.zeros(3, 1, 32, 32, dtype=torch.uint8), prompt="a cube", top_p=0, output_type="latent")
    ours.register_to_config(max_sequence_length=pipe.config.max_sequence_length)
    assert torch.equal(pipe(**call).frames, ours(**call).frames)

    convert("plain", "--vae", tmp_path / "parts" / "vae", "--no_preflight")
    assert CosmosAutoregressivePipeline.from_pretrained(tmp_path / "plain").text_encoder is None
    capsys.readouterr()
    components("tiny")["vae"].save_pretrained(tmp_path / "continuous")
    diffusion_decoder().save_pretrained(tmp_path / "coarse")
    for arguments, message in (
        (parts, "are parts of a pipeline: give --vae, too"),
        (("--vae", tmp_path / "none"), "no such folder"),
        (("--vae", tmp_path / "continuous"), "the codes of a discrete one are needed"),
        (
            ("--vae", tmp_path / "parts" / "vae", "--text_encoder", tmp_path / "decoder"),
            "no folder text_encoder and no",
        ),
        (("--vae", tmp_path / "parts" / "vae", "--diffusion_decoder", tmp_path / "coarse"), "do not belong together"),
    ):
        with pytest.raises(SystemExit):
            convert("wrong", *arguments)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()
