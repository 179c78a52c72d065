"""The blocks as PyTorch compiles them, and their attention by the kernels that diffusers' dispatcher knows."""

import os
from shutil import which

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from parallel_problem import build, inputs


@pytest.mark.parametrize("prepared", [False, True])
def test_blocks_compile_as_one_graph(prepared):
    model, given = build(), inputs(fps=10)
    with torch.no_grad():
        if prepared:
            given["encoder_hidden_states"] = model.prepare_text(given["encoder_hidden_states"])
        expected = model(**given).sample
        torch._dynamo.reset()
        graphs = []
        model.compile_repeated_blocks(
            fullgraph=True, backend=lambda graph, example: (graphs.append(graph), graph.forward)[1]
        )
        torch.testing.assert_close(model(**given).sample, expected, atol=1e-5, rtol=1e-5)
        assert len(graphs) == 1  # both blocks run the same one
        model(**given)
        assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.skipif(which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_blocks_are_equal():
    model, given = build(), inputs(fps=10)
    with torch.no_grad():
        expected = model(**given).sample
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(model(**given).sample, expected, atol=1e-4, rtol=1e-4)


def test_attention_kernels_are_chosen_by_the_dispatcher(monkeypatch):
    model, given = build(), inputs(attention_mask=torch.ones(2, 5).tril())
    used = []
    for name in (AttentionBackendName._NATIVE_MATH, AttentionBackendName.NATIVE):
        kernel = _AttentionBackendRegistry._backends[name]
        monkeypatch.setitem(
            _AttentionBackendRegistry._backends,
            name,
            lambda kernel=kernel, name=name, **kwargs: (used.append(name), kernel(**kwargs))[1],
        )
    active = _AttentionBackendRegistry._active_backend
    with torch.no_grad():
        expected = model(**given).sample
        assert set(used) == {AttentionBackendName.NATIVE} and len(used) == 4  # self and cross, in two blocks
        used.clear()
        try:
            model.set_attention_backend("_native_math")
            torch.testing.assert_close(model(**given).sample, expected, atol=1e-5, rtol=1e-5)
            assert set(used) == {AttentionBackendName._NATIVE_MATH} and len(used) == 4
            with pytest.raises(ValueError, match="backend='fast'` must be one of the following"):
                model.set_attention_backend("fast")
            with pytest.raises(RuntimeError, match="flash-attn"):
                model.set_attention_backend("flash")
        finally:
            model.reset_attention_backend()
            _AttentionBackendRegistry.set_active_backend(active)
