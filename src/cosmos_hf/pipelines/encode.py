"""Inputs of the pipelines: text to embeddings, frames to conditioning latents, seeds to noise; and their checks."""

import logging

import torch
from PIL import Image

from ..data.video import FILE_TYPES, Box, count_frames, letterbox, read_video, source_size

logger = logging.getLogger(__name__)


def encode_text(tokenizer, text_encoder, texts: list[str], max_sequence_length: int, device) -> torch.Tensor:
    """Texts -> T5 embeddings [len(texts), max_sequence_length, D], zero past each text's end.

    The networks attend to all positions and were trained with zeros there, so the length is part of the model and is
    not trimmed. A text that does not fit is cut with a warning that shows what was lost.
    """
    tokens = tokenizer(
        texts, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    )
    full = tokenizer(texts)["input_ids"]
    for text, ids in zip(texts, full, strict=True):
        if len(ids) > max_sequence_length:
            lost = tokenizer.decode(ids[max_sequence_length - 1 : -1])
            logger.warning("prompt cut to %d tokens; lost: %r (of %r)", max_sequence_length, lost, text)
    mask = tokens.attention_mask.to(device)
    embeds = text_encoder(tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
    return embeds * mask[..., None].to(embeds.dtype)


def encode_prompts(
    pipe, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, batch_size: int, guided: bool, device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(conditional, unconditional or None) embeddings [batch_size, N, D]; no text at all is a tensor of zeros.

    The networks saw zeros for a dropped text in training, so zeros are the unconditional text unless a negative prompt
    (or its embeddings) takes their place.
    """
    length, width = pipe.config.max_sequence_length, pipe.transformer.config.text_embed_dim

    def embed(text, embeds, name):
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            embeds = encode_text(pipe.tokenizer, pipe.text_encoder, texts, length, device)
        if embeds is None:
            return torch.zeros(batch_size, length, width, device=device, dtype=pipe.transformer.dtype)
        if embeds.ndim != 3 or embeds.shape[-1] != width:
            raise ValueError(f"{name} must be [batch, tokens, {width}], got {tuple(embeds.shape)}")
        if batch_size % len(embeds):
            raise ValueError(f"{name} has {len(embeds)} items, which does not divide the batch of {batch_size}")
        return embeds.repeat_interleave(batch_size // len(embeds), dim=0).to(device, pipe.transformer.dtype)

    conditional = embed(prompt, prompt_embeds, "prompt_embeds")
    if not guided:
        return conditional, None
    unconditional = embed(negative_prompt, negative_prompt_embeds, "negative_prompt_embeds")
    if torch.equal(conditional, unconditional):
        raise ValueError(
            "guidance would do nothing: the prompt and the negative prompt have equal embeddings. "
            "Give another prompt, or guidance_scale=0."
        )
    return conditional, unconditional


def check_text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale: float):
    """Refuse contradictions among the text arguments before anything is computed."""
    for name, text, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if text is not None and embeds is not None:
            raise ValueError(f"give {name} or {name}_embeds, not both")
        if text is not None and not (isinstance(text, str) or all(isinstance(item, str) for item in text)):
            raise ValueError(f"{name} must be a string or a list of strings, got {type(text).__name__}")
    negative = negative_prompt is not None or negative_prompt_embeds is not None
    if negative and guidance_scale == 0:
        raise ValueError("a negative prompt needs guidance_scale > 0: with 0 it would be ignored")
    if guidance_scale < 0:
        raise ValueError(f"guidance_scale must be >= 0 (0 switches guidance off), got {guidance_scale}")


def count_prompts(prompt, prompt_embeds) -> int:
    if prompt_embeds is not None:
        return len(prompt_embeds)
    return 1 if prompt is None or isinstance(prompt, str) else len(prompt)


def check_size(pipe, height: int, width: int, num_frames: int):
    """Height and width must be multiples of the tokenizer's factor times the patch; frames 1 + k * factor."""
    patch = getattr(pipe.transformer.config, "patch_size", (1, 1, 1))[1]  # an autoregressive model has none
    factor = pipe.vae.config.spatial_compression * patch
    for name, size in (("height", height), ("width", width)):
        if size <= 0 or size % factor:
            below, above = size // factor * factor, (size // factor + 1) * factor
            raise ValueError(f"{name} must be a multiple of {factor}, got {size}: use {below or above} or {above}")
    check_frame_count("num_frames", num_frames, pipe.vae.config.temporal_compression)


def check_frame_count(name: str, count: int, factor: int):
    if count < 1 or (count - 1) % factor:
        below = max(0, count - 1) // factor * factor + 1
        raise ValueError(f"{name} must be 1 + k * {factor}, got {count}: use {below} or {below + factor}")


def draw_noise(shape: tuple[int, ...], generator, device) -> torch.Tensor:
    """Unit noise [B, C, T', H', W'] in float32, item i from its own generator: alone or in a batch, a seed is a video.

    `generator` is None, one generator for the whole batch, or a list or tuple of B. Noise is drawn on the generator's device, so a
    seed on the processor gives the same video on any accelerator.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} videos: give one per video, or a single one")
        return torch.cat([draw_noise((1, *shape[1:]), g, device) for g in generator])
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)


def read_conditioning(
    image,
    video,
    count: int | None,
    most: int,
    factor: int,
    height: int,
    width: int,
    fps: float,
    fit: str = "crop",
    from_end: bool = True,
) -> torch.Tensor:
    """An image or a video, or a list of them (one per item) -> the uint8 frames [B, 3, n, H, W] to continue from.

    A video gives its last n frames (its first without `from_end`), resampled to `fps`; n is `count`, or for None the largest
    legal number (1 + k * factor) that every video has, at most `most`. `fit` is "crop" or "pad" (`read_video`). Raises ValueError
    for both or neither, and for a count that is not legal.
    """
    if (image is None) == (video is None):
        raise ValueError("give exactly one of image and video")
    if count is not None:
        check_frame_count("num_conditioning_frames", count, factor)
        if count > most:
            raise ValueError(
                f"num_conditioning_frames must be at most {most} here, got {count}: some frames must be left to generate"
            )
    if image is not None:
        if count not in (None, 1):
            raise ValueError(f"an image is one frame; num_conditioning_frames={count} needs a video")
        images = image if isinstance(image, (list, tuple)) else [image]
        clips = [read_video(item, height=height, width=width, fit=fit).frames for item in images]
        if any(clip.shape[1] != 1 for clip in clips):
            raise ValueError("image holds several frames: pass it as video")
        return torch.stack(clips)
    videos = list(video) if _is_list_of_videos(video) else [video]
    if count is None:
        count = min(most, *(_length(item, fps) for item in videos))
        count = max(0, count - 1) // factor * factor + 1
    size = dict(fps=fps, height=height, width=width, fit=fit)
    return torch.stack([read_video(item, num_frames=count, from_end=from_end, **size).frames for item in videos])


def source_sizes(image, video) -> list[tuple[int, int]]:
    """(height, width) of every image or video that a call was given; none where it has both or neither."""
    if (image is None) == (video is None):
        return []
    if image is not None:
        items = image if isinstance(image, (list, tuple)) else [image]
    else:
        items = list(video) if _is_list_of_videos(video) else [video]
    return [source_size(item) for item in items]


def content_box(sizes: list[tuple[int, int]], height: int, width: int) -> Box | None:
    """Where inputs of these sizes lie in a padded frame; None where they fill it. ValueError where they differ in shape."""
    boxes = {letterbox(*size, height, width) for size in sizes}
    if len(boxes) > 1:
        raise ValueError(
            f"fit='pad' needs inputs of one shape in a call, got sizes {sorted(set(sizes))}: call once for each"
        )
    (box,) = boxes
    return None if (box.height, box.width) == (height, width) else box


def _length(video, fps: float) -> int:
    """Frames that a video has at a rate."""
    return count_frames(video, fps)[0] if isinstance(video, FILE_TYPES) else read_video(video).frames.shape[1]


def _is_list_of_videos(video) -> bool:
    """A list of PIL images is one video; a list of anything else, or a 5-dimensional tensor or array, is a batch of videos."""
    if isinstance(video, (list, tuple)):
        return not all(isinstance(item, Image.Image) for item in video)
    return getattr(video, "ndim", 0) == 5


def repeat_to_batch(frames: torch.Tensor, batch_size: int, num_videos_per_prompt: int) -> torch.Tensor:
    """Conditioning frames of one item or of every prompt -> one per generated video."""
    if len(frames) not in (1, batch_size):
        raise ValueError(f"{len(frames)} images or videos for {batch_size} prompts: give one, or one per prompt")
    return frames.expand(batch_size, -1, -1, -1, -1).repeat_interleave(num_videos_per_prompt, dim=0)
