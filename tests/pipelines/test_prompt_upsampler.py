"""The prompt upsampler with tiny random chat models, which babble: what is asked, kept, cached and refused."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cosmos_hf import CosmosPromptUpsampler
from cosmos_hf.pipelines.prompt_upsampler import PICTURE_INSTRUCTION, TEXT_INSTRUCTION

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}<assistant>"
)


def vocabulary():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT_INSTRUCTION, PICTURE_INSTRUCTION], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", chat_template=TEMPLATE
    )


def small_llama(size, width=32):
    return LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Folder of a chat model for text."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("reader"), vocabulary()
    LlamaForCausalLM(small_llama(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seer(tmp_path_factory):
    """Folder of a chat model for text and pictures."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("seer"), vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=small_llama(len(tokenizer)), image_token_index=image)
    ).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def test_text(reader, tmp_path):
    upsampler = CosmosPromptUpsampler.from_pretrained(str(reader), cache_dir=tmp_path, max_new_tokens=20)
    asked = []
    generate = upsampler.model.generate
    upsampler.model.generate = lambda **inputs: asked.append(inputs) or generate(**inputs)
    result = upsampler("a cube")
    assert (result.original, result.model, result.cached) == ("a cube", str(reader), False) and result.prompt not in (
        "",
        "a cube",
    )
    text = upsampler.processor.decode(asked[0]["input_ids"][0])
    assert TEXT_INSTRUCTION.split()[0] in text and text.endswith("a cube<assistant>")
    again = upsampler("a cube")
    assert again.cached and again.prompt == result.prompt and len(asked) == 1
    assert upsampler("a ball").original == "a ball" and len(asked) == 2
    # another instruction is another question
    other = CosmosPromptUpsampler.from_pretrained(
        str(reader), cache_dir=tmp_path, max_new_tokens=20, instruction="Say it in French."
    )
    assert not other("a cube").cached
    stored = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(stored) == 3 and {entry["original"] for entry in stored} == {"a cube", "a ball"}


def test_pictures(seer, tmp_path):
    """The picture is part of the question and of the cache's key; of a video its last frame."""
    upsampler = CosmosPromptUpsampler.from_pretrained(str(seer), cache_dir=tmp_path, max_new_tokens=12)
    assert upsampler.sees
    red, green = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "green")
    first = upsampler("a cube", red)
    assert first.prompt and not first.cached and upsampler("a cube", red).cached
    assert not upsampler("a cube", green).cached and not upsampler("a cube").cached
    assert upsampler("a cube", [red, green]).cached  # a video that ends green
    assert upsampler(image=red).original == ""


def test_long_prompts_are_left_alone(reader):
    upsampler = CosmosPromptUpsampler.from_pretrained(str(reader), longest=3, cache_dir=None)
    result = upsampler("a robot arm stacks cubes")
    assert result.skipped and result.prompt == result.original


def test_an_answer_that_was_cut_ends_with_a_sentence(reader):
    upsampler = CosmosPromptUpsampler.from_pretrained(str(reader), cache_dir=None, max_new_tokens=30)
    words = upsampler.processor("One sentence. Another one. And a third that is cut", return_tensors="pt").input_ids
    upsampler.max_new_tokens = words.shape[1]
    upsampler.model.generate = lambda **inputs: torch.cat([inputs["input_ids"], words], 1)
    assert upsampler("a cube").prompt == "One sentence. Another one."
    upsampler.model.generate = lambda **inputs: inputs["input_ids"]
    with pytest.raises(ValueError, match="gave no answer to 'a cube'"):
        upsampler("a cube")


def test_misuse_is_refused(reader, tmp_path):
    upsampler = CosmosPromptUpsampler.from_pretrained(str(reader), cache_dir=None)
    with pytest.raises(ValueError, match="reads text only"):
        upsampler("a cube", Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="give a prompt"):
        upsampler("")
    upsampler.processor.chat_template = None
    with pytest.raises(ValueError, match="is not a chat model"):
        CosmosPromptUpsampler(upsampler.model, upsampler.processor)


def test_four_bit_needs_its_library(reader, monkeypatch):
    monkeypatch.setattr("cosmos_hf.pipelines.prompt_upsampler.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="four_bit needs bitsandbytes: pip install bitsandbytes"):
        CosmosPromptUpsampler.from_pretrained(str(reader), four_bit=True)


def test_four_bit_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    tokenizer = vocabulary()
    LlamaForCausalLM(small_llama(len(tokenizer), width=128)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    upsampler = CosmosPromptUpsampler.from_pretrained(str(tmp_path), four_bit=True, cache_dir=None, max_new_tokens=8)
    assert "Linear4bit" in {type(module).__name__ for module in upsampler.model.modules()}
    assert upsampler("a cube").prompt
