"""A base in 4 bits (QLoRA) and in 16, for both families; bitsandbytes' processor path is enough for small ones."""

import importlib.util
import logging

import pytest
import torch

from cosmos_hf.models.ar_cosmos import PRESETS as LANGUAGE
from cosmos_hf.models.ar_cosmos import CosmosARConfig, CosmosARForCausalLM
from cosmos_hf.models.four_bit import four_bit_blocks
from cosmos_hf.models.transformer_cosmos import PRESETS, CosmosWorldTransformer3D
from cosmos_hf.training import adaptation
from cosmos_hf.training.memory import BASE_BYTES
from cosmos_hf.training.posttrain import PosttrainConfig
from cosmos_hf.training.posttrain_autoregressive import ARPosttrainConfig

needs_library = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")


def diffusion():
    torch.manual_seed(0)
    transformer = CosmosWorldTransformer3D(**PRESETS["tiny-video2world"])
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


def language():
    torch.manual_seed(0)
    return CosmosARForCausalLM(CosmosARConfig(**LANGUAGE["tiny"])).eval()


def run(transformer):
    if isinstance(transformer, CosmosARForCausalLM):
        return transformer(torch.arange(20)[None]).logits
    x = torch.arange(16 * 3 * 16.0).sin().view(1, 16, 3, 4, 4)
    return transformer(x, torch.zeros(1), torch.ones(1, 4, 32), condition_mask=torch.zeros(1, 1, 3, 4, 4)).sample


def test_without_the_library_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("cosmos_hf.models.four_bit.find_spec", lambda name: None)
    message = r"weights in 4 bits need bitsandbytes: pip install 'cosmos-hf\[quantized\]', or take bfloat16"
    with pytest.raises(ValueError, match=message):
        four_bit_blocks(diffusion())
    for cls, condition in ((PosttrainConfig, "camera"), (ARPosttrainConfig, "action")):
        with pytest.raises(ValueError, match=message):
            cls(init_from=str(tmp_path), conditions=[condition], base_precision="nf4", output_dir="x", data=["x"])


@needs_library
@pytest.mark.parametrize("build", [diffusion, language])
def test_blocks_are_quantised_and_nearly_the_same(build):
    model = build()
    before, linears = run(model), [m for m in adaptation.blocks_of(model).modules() if isinstance(m, torch.nn.Linear)]
    count = sum(layer.weight.numel() for layer in linears)
    assert four_bit_blocks(model) == len(linears)
    packed = [m for m in model.modules() if type(m).__name__ == "FrozenLinear4bit"]
    size = sum(m.weight.nbytes + sum(t.nbytes for t in _scales(m)) for m in packed)
    assert len(packed) == len(linears) and BASE_BYTES["nf4"] <= size / count < 1  # small layers have a table each
    off = (run(model) - before).norm() / before.norm()
    assert 1e-4 < off < 0.5
    again = build()
    four_bit_blocks(again)
    assert torch.equal(run(again), run(model))  # the same base gives the same layers
    assert again.load_state_dict(model.state_dict())
    changed = model.state_dict()
    name = next(name for name, value in changed.items() if value.dtype == torch.uint8 and "quant_state" not in name)
    changed[name] = changed[name] ^ 1
    with pytest.raises(RuntimeError, match="the 4-bit weights of the base are others than those of the checkpoint"):
        again.load_state_dict(changed)


def _scales(layer):
    state = layer.weight.quant_state
    return (state.absmax, state.state2.absmax)


@needs_library
@pytest.mark.parametrize(("build", "prefix"), [(diffusion, "transformer_blocks"), (language, "model.layers")])
def test_lora_learns_on_a_base_that_stays(build, prefix, caplog):
    model = build()
    kind = ARPosttrainConfig if build is language else PosttrainConfig
    config = object.__new__(kind)
    targets = ["q_proj", "down_proj"] if build is language else ["to_q", "ff.net.2"]
    vars(config).update(base_precision="nf4", mixed_precision="no", lora_rank=4, lora_alpha=4.0, lora_targets=targets)
    with caplog.at_level(logging.INFO):
        adaptation.freeze(model, config)
    assert "linear layers of the base in 4 bits (NF4)" in caplog.text
    before = run(model)
    adaptation.add_lora(model, config, prefix)
    assert torch.equal(run(model), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    for _ in range(2):  # the first step moves B alone, which starts at zero
        optimizer.zero_grad()
        run(model.train()).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())
    assert not torch.equal(run(model.eval()), before)
    with pytest.raises(ValueError, match="quantise a model before adapters are loaded"):
        four_bit_blocks(model)


def test_sharded_launches_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("cosmos_hf.models.four_bit.find_spec", lambda name: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="base_precision=nf4 runs on one device or under DDP, not under FSDP"):
        ARPosttrainConfig(init_from=str(tmp_path), conditions=["action"], base_precision="nf4")


def test_a_base_in_16_bits_has_lora_in_32():
    model = language()
    config = object.__new__(ARPosttrainConfig)
    vars(config).update(base_precision="bfloat16", lora_rank=4, lora_alpha=4.0, lora_targets=["q_proj"])
    adaptation.freeze(model, config)
    adaptation.add_lora(model, config, "model.layers")
    kinds = {name.rpartition(".lora_")[1]: p.dtype for name, p in model.named_parameters() if "q_proj" in name}
    assert kinds == {"": torch.bfloat16, ".lora_": torch.float32}
    assert model.lm_head.weight.dtype == torch.float32
