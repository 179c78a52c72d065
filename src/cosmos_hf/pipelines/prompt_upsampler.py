"""A short prompt made into the kind of description that the world models were trained on (arXiv 2501.03575, section 5.1.1).

Standalone and optional: any chat model of transformers does it, one for text, or one for text and pictures that also looks at
what is to be continued. The result is kept on disk, and both prompts go into a video's metadata.
"""

import argparse
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..data.video import fit_image, read_video

TEXT_INSTRUCTION = """\
Rewrite the user's idea as the description of one continuous video shot, for a model that draws what it reads.
Keep every thing, action, colour, number and order of events that the user names, and contradict none; add what is missing.
Say what is there and what it is made of, who moves, how and in which direction, from the first moment to the last; what the
place and the light are like; where the camera stands and whether it moves. Physics stays plausible, nothing cuts or fades.
One paragraph of plain present-tense prose, about 100 words, no list, no heading, no comment about the task."""

PICTURE_INSTRUCTION = """\
The picture is the last frame of a video. Describe the shot that goes on from it, for a model that draws what it reads.
Begin with what the picture shows: things, materials, colours, where each is, the place, the light, where the camera stands.
Then say what happens next: who moves, how and in which direction. Follow the user's idea where there is one and change nothing
that is seen; physics stays plausible, nothing cuts or fades.
One paragraph of plain present-tense prose, about 100 words, no list, no heading, no comment about the task."""


@dataclass
class UpsampledPrompt:
    """`original` and `prompt`, the richer one; `model` made it. `cached`: it was on disk. `skipped`: it was long enough."""

    original: str
    prompt: str
    model: str
    cached: bool = False
    skipped: bool = False


class CosmosPromptUpsampler:
    """Makes prompts richer.

    upsampler = CosmosPromptUpsampler.from_pretrained("folder/or/hub-id")
    prompt = upsampler("a robot arm stacks two cubes").prompt

    Args:
        model, processor: a chat model and its tokenizer (text), or an image-text-to-text model and its processor.
        name: of the model, for the metadata and the cache.
        instruction: what the model is told; None is the published style, by whether there is a picture.
        max_new_tokens: of the answer; what is cut off by it goes back to the last full sentence.
        longest: prompts of more words are left as they are.
        cache_dir: folder of results; None keeps none.
    """

    def __init__(
        self,
        model,
        processor,
        name: str = "",
        instruction: str | None = None,
        max_new_tokens: int = 256,
        longest: int = 250,
        cache_dir: str | Path | None = None,
    ):
        self.model, self.processor = model.eval(), processor
        self.name = name or str(model.config._name_or_path)
        self.instruction, self.max_new_tokens, self.longest = instruction, max_new_tokens, longest
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.sees = sees_pictures(model.config)
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{self.name} is not a chat model: its tokenizer has no chat template. Choose an instruction-tuned one"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = "auto",
        four_bit: bool = False,
        cache_dir: str | Path | None = f"{HF_HOME}/cosmos_hf/prompts",
        **options,
    ) -> "CosmosPromptUpsampler":
        """Load a model from a folder or the Hub; `four_bit` keeps its weights in NF4 (needs bitsandbytes)."""
        loading = dict(dtype=dtype)
        if four_bit:
            if find_spec("bitsandbytes") is None:
                raise ValueError("four_bit needs bitsandbytes: pip install bitsandbytes, or leave it off")
            loading["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            loading["device_map"] = {"": device}
        sees = sees_pictures(AutoConfig.from_pretrained(name))
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(name, **loading)
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(name)
        return cls(model if four_bit else model.to(device), processor, str(name), cache_dir=cache_dir, **options)

    def __call__(self, prompt: str | None = None, image=None) -> UpsampledPrompt:
        """A richer prompt; `image` is the picture or video to be continued (its last frame counts), for a model that sees.

        Raises ValueError for neither, for a picture given to a model that reads only, and for an empty answer.
        """
        if image is not None and not self.sees:
            raise ValueError(
                f"{self.name} reads text only: leave out the picture, or choose an image-text-to-text model"
            )
        if not prompt and image is None:
            raise ValueError("give a prompt, or a picture to a model that sees")
        if prompt and len(prompt.split()) > self.longest:
            return UpsampledPrompt(prompt, prompt, self.name, skipped=True)
        picture = None if image is None else _last_frame(image)
        path = self._cache_path(prompt, picture)
        if path is not None and path.exists():
            return UpsampledPrompt(**json.loads(path.read_text()) | {"cached": True})
        answer = self._ask(prompt, picture)
        result = UpsampledPrompt(prompt or "", answer, self.name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            unfinished.write_text(json.dumps(vars(result), indent=1))
            os.replace(unfinished, path)
        return result

    def _instruction(self, picture) -> str:
        return self.instruction or (TEXT_INSTRUCTION if picture is None else PICTURE_INSTRUCTION)

    @torch.no_grad()
    def _ask(self, prompt: str | None, picture: Image.Image | None) -> str:
        idea = prompt or "Decide what happens next."
        if self.sees:
            content = [{"type": "text", "text": f"{self._instruction(picture)}\n\nThe user's idea: {idea}"}]
            if picture is not None:
                content.insert(0, {"type": "image", "image": picture})
            messages = [{"role": "user", "content": content}]
        else:
            messages = [
                {"role": "system", "content": self._instruction(picture)},
                {"role": "user", "content": idea},
            ]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        fresh = output[0, inputs["input_ids"].shape[1] :]
        text = " ".join(self.processor.decode(fresh, skip_special_tokens=True).split()).strip("\"' ")
        if len(fresh) >= self.max_new_tokens and (ends := [*re.finditer(r"[.!?](?=\s|$)", text)]):
            text = text[: ends[-1].end()]
        if not text:
            raise ValueError(
                f"{self.name} gave no answer to {prompt!r}: choose another model, or leave the prompt as it is"
            )
        return text

    def _cache_path(self, prompt, picture) -> Path | None:
        if self.cache_dir is None:
            return None
        asked = [self.name, self._instruction(picture), self.max_new_tokens, prompt]
        digest = hashlib.sha256(json.dumps(asked).encode() + (b"" if picture is None else picture.tobytes()))
        return self.cache_dir / f"{digest.hexdigest()}.json"


def sees_pictures(config) -> bool:
    """Whether a model of this config takes pictures along with text."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _last_frame(image) -> Image.Image:
    """Of a picture or video, at most 512 pixels on the longer side: enough to describe it, and quick."""
    if isinstance(image, (str, Path)) and not Path(image).exists():
        raise FileNotFoundError(f"no such file: {image}")
    frames = read_video(image, num_frames=1, from_end=True).frames
    picture = Image.fromarray(frames[:, 0].permute(1, 2, 0).numpy())
    scale = 512 / max(picture.size)
    return picture if scale >= 1 else fit_image(picture, round(picture.height * scale), round(picture.width * scale))


# ---- for the scripts -----------------------------------------------------------------------------------------------


@dataclass
class ScriptPrompts:
    """What a script's `--upsampler` changes in a pipeline's call and adds to the metadata; nothing without it."""

    call: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)


def upsample_argument(args: argparse.Namespace, image=None) -> ScriptPrompts:
    """The richer prompt in place of `--prompt`; `image` is looked at by a model that sees."""
    if not args.upsampler:
        return ScriptPrompts()
    upsampler = _loaded(args.upsampler, args.device, args.upsampler_4bit)
    result = upsampler(args.prompt, image if upsampler.sees else None)
    prompts = dict(original=result.original, upsampled=result.prompt, upsampler=result.model)
    return ScriptPrompts(dict(prompt=result.prompt), dict(prompts=prompts))


@lru_cache(maxsize=1)
def _loaded(name: str, device: str, four_bit: bool) -> CosmosPromptUpsampler:
    return CosmosPromptUpsampler.from_pretrained(name, device=device, four_bit=four_bit)
