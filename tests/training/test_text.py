"""The vocabulary that is trained on captions, and the small T5 encoder."""

import pytest
import torch
from transformers import AutoTokenizer

from cosmos_hf.training.text import (
    build_text_encoder,
    embed_tokens,
    load_or_train_vocabulary,
    tokenize,
    train_vocabulary,
)

CAPTIONS = ["A robot arm picks up the red cube.", "A robot arm pushes the blue ball to the left."] * 3


def test_vocabulary_round_trips_any_text():
    vocabulary = train_vocabulary(CAPTIONS, 400)
    assert len(vocabulary) <= 400
    for text in ("a robot arm picks up the red cube.", "unseen words: zebra, 7 käse"):
        ids = vocabulary(text)["input_ids"]
        assert ids[-1] == vocabulary.eos_token_id and vocabulary.unk_token_id not in ids
        assert vocabulary.decode(ids, skip_special_tokens=True).strip() == text
    assert vocabulary("RED cube")["input_ids"] == vocabulary("red cube")["input_ids"]
    assert len(vocabulary(CAPTIONS[0])["input_ids"]) < 12  # words, not letters


def test_vocabulary_is_kept_and_loads_anywhere(tmp_path):
    first = load_or_train_vocabulary(tmp_path, CAPTIONS, 400)
    second = load_or_train_vocabulary(tmp_path, ["something else entirely"], 400)
    third = AutoTokenizer.from_pretrained(tmp_path)
    text = "a robot arm pushes the red ball"
    assert first(text)["input_ids"] == second(text)["input_ids"] == third(text)["input_ids"]
    assert third.pad_token_id == 0


def test_embeddings_are_zero_past_the_end():
    vocabulary = train_vocabulary(CAPTIONS, 400)
    ids, mask = tokenize(vocabulary, ["the red cube", "the blue ball to the left"], 16)
    embeds = embed_tokens(build_text_encoder("tiny", 400), ids, mask)
    assert embeds.shape == (2, 16, 32)
    assert torch.equal(embeds.abs().sum(-1) > 0, mask.bool())


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        train_vocabulary(CAPTIONS, 100)
    with pytest.raises(ValueError, match="unknown text_preset 'large'"):
        build_text_encoder("large", 400)
    with pytest.raises(
        ValueError, match="max_sequence_length is 3, 1[0-9] tokens are needed for the caption 'A robot"
    ):
        tokenize(train_vocabulary(CAPTIONS, 400), CAPTIONS, 3)
