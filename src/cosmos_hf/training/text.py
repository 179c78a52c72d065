"""Text for training: a vocabulary and a small T5 encoder of one's own, or the embeddings of a frozen encoder.

The published models take T5-11B's embeddings (arXiv 2501.03575, section 5.1.2). A nano model has a T5 encoder of the same
architecture that is trained with it, so the pipelines are the same.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Config, T5EncoderModel

# Sizes of encoders that are trained with the world model; d_model is the transformer's text_embed_dim.
TEXT_PRESETS = {
    "nano": dict(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    "tiny": dict(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
}
SPECIAL = ("<pad>", "</s>", "<unk>")


def train_vocabulary(captions: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary in lower case that ends a text with </s> as T5's does; any text can be written in it.

    Raises ValueError where `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    pad, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)


def load_or_train_vocabulary(folder: Path, captions: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """The vocabulary kept in `folder`, made from the captions where there is none: a resumed run must not renumber words."""
    if not (folder / "tokenizer.json").exists():
        train_vocabulary(captions, vocab_size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def build_text_encoder(preset: str, vocab_size: int) -> T5EncoderModel:
    if preset not in TEXT_PRESETS:
        raise ValueError(f"unknown text_preset {preset!r}; there is {', '.join(TEXT_PRESETS)}")
    # Without dropout: its mask would be the only draw that gradient checkpointing has to keep.
    return T5EncoderModel(T5Config(**TEXT_PRESETS[preset], vocab_size=vocab_size, dropout_rate=0.0, pad_token_id=0))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> ids and mask [B, length]. Raises ValueError for one that is longer: training never cuts a caption."""
    tokens = tokenizer(captions, padding="max_length", max_length=length, return_tensors=None)
    for caption, ids in zip(captions, tokens["input_ids"], strict=True):
        if len(ids) > length:
            raise ValueError(
                f"max_sequence_length is {length}, {len(ids)} tokens are needed for the caption {caption!r}"
            )
    return torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])


def embed_tokens(encoder: T5EncoderModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, N] twice -> embeddings [B, N, D], zero past each text's end: the transformer attends to all positions."""
    embeds = encoder(ids, attention_mask=mask).last_hidden_state
    return embeds * mask[..., None].to(embeds.dtype)
