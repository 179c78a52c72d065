"""Code usage against values worked out by hand."""

import math

import pytest
import torch

from cosmos_hf.evaluation.codes import CodeUsage, counting_codes, watch_codes
from cosmos_hf.models.autoencoder_cosmos import PRESETS, CosmosVideoTokenizer


def test_by_hand():
    """Levels (4, 2): codes 0 to 7, channel 0 is the digit `code % 4`."""
    usage = CodeUsage((4, 2))
    usage.update(torch.tensor([[0, 1], [0, 1]]))
    figures = usage.figures()
    assert figures["code_usage"] == 0.25 and figures["dead_codes"] == 0.75
    assert figures["code_bits"] == pytest.approx(1)  # two codes, equally often
    assert figures["level_entropy_0"] == pytest.approx(0.5)  # 1 of 2 bits
    assert figures["level_entropy_1"] == 0
    usage.update(torch.tensor([4, 5, 4, 5]))
    assert usage.figures()["level_entropy_1"] == pytest.approx(1)
    assert usage.figures()["level_entropy_0"] == pytest.approx(0.5)


def test_uniform_codes_have_full_entropy():
    usage = CodeUsage((8, 5))
    usage.update(torch.arange(40))
    assert usage.figures() == pytest.approx(
        dict(code_usage=1, dead_codes=0, code_bits=math.log2(40), level_entropy_0=1, level_entropy_1=1)
    )


def test_the_window_forgets():
    usage = CodeUsage((4, 2), window=8)
    usage.update(torch.arange(8))
    for _ in range(4):
        usage.update(torch.zeros(4, dtype=torch.int64))
    figures = usage.figures()
    assert figures["code_usage"] == 1 / 8 and figures["dead_codes"] == 7 / 8
    assert figures["code_bits"] < 1.7
    with pytest.raises(ValueError, match="no codes"):
        CodeUsage((4, 2)).figures()


def test_a_discrete_tokenizer_is_counted_and_a_continuous_one_not():
    model = CosmosVideoTokenizer(**PRESETS["tiny"] | dict(quantizer="fsq", latent_channels=6)).eval()
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with counting_codes(model) as usage:
        model(video)
    model(video)
    indices = model.encode(video).indices
    assert usage.total == indices.numel() == 8
    assert usage.figures()["code_usage"] == len(indices.unique()) / 64000
    in_training, handle = watch_codes(model, only_training=True)
    model(video)
    assert in_training.total == 0
    model.train()(video)
    assert in_training.total == 8
    handle.remove()
    with counting_codes(CosmosVideoTokenizer(**PRESETS["tiny"])) as nothing:
        assert nothing is None
