"""Long worlds: one chunk after the other, each continuing the latest latents, written to a file as they come.

Counted in latent frames throughout. A model's window is T' latent frames; the first codes one pixel frame, each other one f of
them. Chunk 0 fills a window. Every later chunk is given the last `overlap` = n latent frames and adds T' - n new ones.

What is given to a later chunk (`history`):

- "latents": the last n - 1 latent frames as the network made them, never decoded and encoded again. In front of them the
  window needs a latent that codes a single frame, as it had in training; this one is encoded from the decoded frame
  just before those n - 1. The new latents prolong one latent video, which one decoder stream decodes: no seam in the decoder.
- "pixels": the last 1 + (n - 1) f decoded frames, encoded again; each window is decoded as a clip of its own, and what it
  repeats is dropped. Every chunk pays the tokenizer's loss again, but no window is longer than in training.

For n = 1 both give the network the same. `history_noise` is the noise level at which it sees the history: above the usual 0.001 it
leans less on details that an earlier chunk may have got wrong.

Memory does not grow with the video, but for the keys and values of the decoder's temporal attention.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..data.video import FILE_TYPES, VideoWriter, read_video, stream_video, to_uint8
from ..models.offloading import wake
from .conditions import (
    as_path,
    check_needed,
    read_conditions,
    spec_of,
    takes_one_action,
    window_of_actions,
    window_of_camera,
)
from .drift import DriftMeter
from .encode import check_text, draw_noise, encode_prompts, read_conditioning
from .sampling import Sampling
from .text2world import generate, latent_shape, resolve
from .video2world import AUGMENT_SIGMA, DEFAULT_CONDITIONING_FRAMES

HISTORIES = ("latents", "pixels")
LATENTS_PER_PUSH = 2  # what the decoder holds at a time


@dataclass
class RolloutResult:
    """`path` of the video, its `num_frames` and `fps`, and `drift`: the entries of `DriftMeter`, one per chunk."""

    path: Path
    num_frames: int
    fps: float
    drift: list[dict]


@torch.no_grad()
def rollout(
    pipe,
    output: str | Path,
    num_frames: int,
    *,
    image=None,
    video=None,
    prompt: str | list[str] | None = None,
    negative_prompt: str | None = None,
    num_conditioning_frames: int | None = None,
    overlap: int = 2,
    history: str = "latents",
    history_noise: float = AUGMENT_SIGMA,
    seed: int = 0,
    truth=None,
    sampling: Sampling | dict | None = None,
    metadata: dict | None = None,
    keep_chunks: bool = False,
    on_chunk: Callable[[int, dict], None] = lambda k, entry: None,
    actions=None,
    camera=None,
    **size,
) -> RolloutResult:
    """Generate a video of any length with a video-to-world pipeline.

    Each chunk's latents are kept in `<output>.chunks` until the video is complete, which grows as `<output>.part`. A run that was
    cut, called again with the same arguments, goes on from there and gives the same video.

    Args:
        output, num_frames: the mp4 to write, and its pixel frames, any number; the last chunk is cut.
        image, video, num_conditioning_frames: what to continue, as in the pipeline's call; neither starts from the prompt.
        prompt: a description, or a list of them, one per chunk, the last of which goes on.
        overlap, history, history_noise: see above.
        seed: draws all noise; chunk 0 is what the pipeline makes of `torch.Generator().manual_seed(seed)`.
        truth: a true video whose first frame is the result's first, to measure the distance to, as long as it lasts.
        sampling, metadata: as in the pipeline's call; what goes into the mp4.
        keep_chunks: leave `<output>.chunks` there, so that a later call with more frames only adds to it.
        actions, camera: of the whole video, [num_frames - 1, A] and num_frames poses, for a model that takes them.
        on_chunk: called with every chunk's number and its entry of the drift curve.
        size: height, width, num_frames_per_chunk, fps, num_inference_steps, guidance_scale; absent is as in its call.

    Raises ValueError for contradictions, among them chunks on disk that other arguments made.
    """
    sampling, source = Sampling.of(sampling), (image, video, num_conditioning_frames)
    plan = _Plan.of(pipe, num_frames, overlap, history, history_noise, prompt, negative_prompt, sampling, size)
    chunks = _Chunks(pipe, plan, seed, sampling, source, (num_frames, actions, camera))
    store = _Store(Path(f"{output}.chunks"), chunks.fingerprint())
    world, true_frames = _World(pipe.vae, overlap, history), _frames_of(truth, plan.run)
    meter, part = DriftMeter(pipe.vae.config.temporal_compression), Path(f"{output}.part")
    with VideoWriter(part, plan.run["fps"], metadata) as writer:
        for k in range(plan.num_chunks):
            if (latents := store.load(k)) is None:
                latents = chunks.make(k, None if k == 0 else world.given())
                store.save(k, latents)
            frames = world.append(latents.to(pipe._execution_device), first=k == 0)
            fresh = _write(writer, frames, room=num_frames - meter.count)
            on_chunk(k, meter.add(fresh, _next_frames(true_frames, fresh.shape[1])))
    os.replace(part, output)
    store.finish(keep_chunks)
    return RolloutResult(Path(output), num_frames, plan.run["fps"], meter.entries)


# ---- what to make --------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """The settings of a rollout, checked."""

    run: dict  # of one chunk, as `resolve` gives it
    latent_frames: int
    num_chunks: int
    overlap: int
    history_noise: float
    prompts: list[str] | None
    negative_prompt: str | None
    history: str

    @classmethod
    def of(cls, pipe, num_frames, overlap, history, history_noise, prompt, negative_prompt, sampling, size) -> "_Plan":
        names = {"num_frames_per_chunk", "height", "width", "fps", "num_inference_steps", "guidance_scale"}
        if set(size) - names:
            raise ValueError(f"rollout has no argument {', '.join(sorted(set(size) - names))}")
        if pipe.takes_views:
            raise ValueError("rollout continues one view: take CosmosVideo2WorldPipeline with a model of one view")
        size = {"num_frames": size.get("num_frames_per_chunk")} | {
            name: size.get(name) for name in names - {"num_frames_per_chunk"}
        }
        if prompt is None and not sampling.drop_conditions:
            if size["guidance_scale"]:
                raise ValueError("guidance needs a prompt. Give prompt, or guidance_scale=0")
            size["guidance_scale"] = 0
        run = resolve(pipe, output_type="latent", **size)
        check_text(prompt, negative_prompt, None, None, run["guidance_scale"])
        if not pipe.transformer.takes_condition_mask:
            raise ValueError("a rollout needs a video-to-world transformer: this one is text-to-world")
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if history not in HISTORIES:
            raise ValueError(f"history must be one of {', '.join(HISTORIES)}, got {history!r}")
        if history_noise < 0:
            raise ValueError(f"history_noise must be a noise level >= 0, got {history_noise}")
        window = pipe.vae.latent_frames(run["num_frames"])
        if not 1 <= overlap < window:
            raise ValueError(
                f"overlap counts latent frames and must be in 1..{window - 1} for chunks of {run['num_frames']} frames "
                f"({window} latent frames), got {overlap}"
            )
        missing = pipe.vae.latent_frames(num_frames) - window
        prompts = [prompt] if isinstance(prompt, str) else prompt
        chunks = 1 + max(0, -(-missing // (window - overlap)))
        return cls(run, window, chunks, overlap, history_noise, prompts, negative_prompt, history)


class _Chunks:
    """Makes chunk after chunk: text, noise and condition to latents as the tokenizer knows them."""

    def __init__(self, pipe, plan: _Plan, seed: int, sampling: Sampling, source: tuple, steering: tuple):
        self.pipe, self.plan, self.seed, self.sampling = pipe, plan, seed, sampling
        image, video, count = source
        self.frames = None
        if image is not None or video is not None:
            run, factor = plan.run, pipe.vae.config.temporal_compression
            most = run["num_frames"] - factor
            most = most if count is not None else min(most, DEFAULT_CONDITIONING_FRAMES)
            size = run["height"], run["width"]
            self.frames = read_conditioning(image, video, count, most, factor, *size, run["fps"])
            if len(self.frames) > 1:
                raise ValueError(f"a rollout continues one image or video, got {len(self.frames)}")
        self._text = (None, None)  # prompt, its embeddings
        self._actions, self._camera = self._steered(*steering)

    def _steered(self, num_frames: int, actions, camera):
        """(actions, camera) of the video of `num_frames` frames, checked; ValueError where the model cannot use or lacks one."""
        pipe, run = self.pipe, self.plan.run
        whole = run | {"num_frames": num_frames}
        if actions is not None and "actions" in pipe.transformer.conditions:
            if spec_of(pipe).kind == "trajectory":
                raise ValueError(
                    "this model's trajectories are told for one clip: a rollout needs a model that takes actions"
                )
            if takes_one_action(pipe):
                raise ValueError(
                    "this model takes one action for a call (action_form='as_written'): a rollout needs a model that takes one for "
                    "every frame; or call the pipeline again and again with the last frames"
                )
            actions = spec_of(pipe).check(actions, run["fps"])
            if actions.shape != (num_frames - 1, spec_of(pipe).width):
                raise ValueError(
                    f"actions must be [{num_frames - 1}, {spec_of(pipe).width}] for {num_frames} frames, got "
                    f"{tuple(actions.shape)}"
                )
        if camera is not None and "camera" in pipe.transformer.conditions:
            camera = as_path(camera, run["height"], run["width"])
            if len(camera) != num_frames:
                raise ValueError(f"camera has {len(camera)} poses for {num_frames} frames")
        check_needed(pipe, whole, actions, camera)
        return actions, camera

    def _conditions(self, k: int) -> dict:
        """The network's other inputs for chunk k. Its first latent frame codes the last pixel frame of the one it repeats."""
        pipe, run, plan = self.pipe, self.plan.run, self.plan
        start = k * (plan.latent_frames - plan.overlap) * pipe.vae.config.temporal_compression
        actions, camera = self._actions, self._camera
        if actions is not None:
            actions = window_of_actions(spec_of(pipe), actions, start, run["num_frames"] - 1)
        if camera is not None:
            camera = window_of_camera(camera, start, run["num_frames"])
        return read_conditions(pipe, run, actions, camera)

    def fingerprint(self) -> dict:
        """All that the latents of the first k chunks depend on, JSON-able; the number of chunks is not among it."""
        plan = self.plan
        given = None if self.frames is None else hashlib.sha256(self.frames.numpy().tobytes()).hexdigest()
        return json.loads(
            json.dumps(
                dict(
                    settings=plan.run,
                    overlap=plan.overlap,
                    history=plan.history,
                    history_noise=plan.history_noise,
                    prompts=plan.prompts,
                    negative_prompt=plan.negative_prompt,
                    seed=self.seed,
                    sampling=vars(self.sampling),
                    given_frames=given,
                    actions=None if self._actions is None else self._actions.tolist(),
                    camera=None
                    if self._camera is None
                    else [self._camera.intrinsics.tolist(), self._camera.extrinsics.tolist()],
                    transformer=_checksum(self.pipe.transformer),
                    tokenizer=_checksum(self.pipe.vae),
                    scheduler=dict(self.pipe.scheduler.config),
                )
            )
        )

    def make(self, k: int, given: torch.Tensor | None) -> torch.Tensor:
        """Latents [1, C, T', H', W'] of chunk k, which begin with the `given` ones [1, C, n, H', W']."""
        pipe, run = self.pipe, self.plan.run
        noise = draw_noise(latent_shape(pipe, 1, run), self._generator(k), pipe._execution_device)
        condition = None
        if given is not None:
            condition = lambda noise: pipe.hold_latents(given, noise, self.plan.history_noise)  # noqa: E731
        elif self.frames is not None:
            condition = lambda noise: pipe.hold_frames(self.frames, noise)  # noqa: E731
        text, negative = self._embeddings(k)
        result = generate(
            pipe,
            run,
            texts=(None, None, text, negative),
            batch_size=1,
            generator=None,
            latents=noise,
            condition=condition,
            callback=None,
            callback_tensors=(),
            output_type="latent",
            return_dict=True,
            sampling=self.sampling,
            conditions=self._conditions(k),
        )
        return pipe.vae.denormalize(result.frames / pipe.scheduler.config.sigma_data)

    def _generator(self, k: int) -> torch.Generator:
        """Of chunk k alone, so that a run may begin anywhere."""
        state = np.random.SeedSequence([self.seed, k]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(self.seed if k == 0 else int(state >> np.uint64(1)))

    def _embeddings(self, k: int):
        plan = self.plan
        if plan.prompts is None and plan.negative_prompt is None:
            return None, None
        prompt = None if plan.prompts is None else plan.prompts[min(k, len(plan.prompts) - 1)]
        if self._text[1] is None or self._text[0] != prompt:
            guided = plan.run["guidance_scale"] > 0
            texts = (prompt, plan.negative_prompt, None, None)
            self._text = (prompt, encode_prompts(self.pipe, *texts, 1, guided, self.pipe._execution_device))
        return self._text[1]


# ---- what was made -------------------------------------------------------------------------------------------------


class _World:
    """The end of a growing latent video: decodes what is added, and keeps what the next chunk is given."""

    def __init__(self, vae, overlap: int, history: str):
        self.vae, self.overlap, self.history = vae, overlap, history
        self._decoder = vae.decoder_stream()
        self._latents = self._frames = None  # the last `overlap` latents and the frames that they stand for

    def append(self, latents: torch.Tensor, first: bool):
        """Take a chunk's latents [1, C, T', H', W']; yields its new frames [1, 3, t, H, W], some at a time."""
        repeated = 0 if first else self.overlap
        drop = 0
        if self.history == "pixels" and not first:
            self._decoder, drop, repeated = self.vae.decoder_stream(), self.vae.num_frames(self.overlap), 0
        kept = self.vae.num_frames(self.overlap)
        fresh = latents[:, :, repeated:]
        self._latents = fresh if first else torch.cat([self._latents, fresh], 2)
        self._latents = self._latents[:, :, -self.overlap :]
        wake(self.vae)  # a stream does not, as encode and decode do
        for part in fresh.to(self.vae.dtype).split(LATENTS_PER_PUSH, dim=2):
            frames = self._decoder.push(part).float().clamp(-1, 1)
            skip = min(drop, frames.shape[2])
            drop, frames = drop - skip, frames[:, :, skip:]
            self._frames = frames if self._frames is None else torch.cat([self._frames, frames], 2)
            self._frames = self._frames[:, :, -kept:]
            yield frames

    def given(self) -> torch.Tensor:
        """The history [1, C, overlap, H', W'] that the next chunk begins with."""
        frames = self._frames if self.history == "pixels" else self._frames[:, :, :1]
        encoded = self.vae.encode(frames.to(self.vae.dtype)).latents.float()
        return encoded if self.history == "pixels" else torch.cat([encoded, self._latents[:, :, 1:].float()], 2)


class _Store:
    """Chunks on disk: what a run that was cut has already made."""

    def __init__(self, folder: Path, fingerprint: dict):
        self.folder = folder
        known = folder / "settings.json"
        if known.exists():
            before = json.loads(known.read_text())
            differing = [name for name in fingerprint if before.get(name) != fingerprint[name]]
            if differing:
                raise ValueError(
                    f"{folder} holds chunks of another run (it differs in {', '.join(differing)}): delete it, or write to "
                    f"another file"
                )
        folder.mkdir(parents=True, exist_ok=True)
        _replace(known, lambda path: path.write_text(json.dumps(fingerprint, indent=1)))

    def _path(self, k: int) -> Path:
        return self.folder / f"chunk-{k:05d}.safetensors"

    def load(self, k: int) -> torch.Tensor | None:
        return load_file(self._path(k))["latents"] if self._path(k).exists() else None

    def save(self, k: int, latents: torch.Tensor):
        tensors = {"latents": latents.float().cpu().contiguous()}
        _replace(self._path(k), lambda path: save_file(tensors, path))

    def finish(self, keep: bool):
        if not keep:
            shutil.rmtree(self.folder)


def _replace(path: Path, write: Callable[[Path], None]):
    """A file appears under its name only when it is complete."""
    unfinished = path.with_name(f"{path.name}.tmp")
    write(unfinished)
    os.replace(unfinished, path)


def _write(writer: VideoWriter, chunk, room: int) -> torch.Tensor:
    """Write a chunk's frames as they come, at most `room` of them -> all that was written, uint8 [3, t, H, W]."""
    written = []
    for frames in chunk:
        frames = to_uint8(frames[0, :, :room]).cpu()
        room -= frames.shape[1]
        if frames.shape[1]:
            writer.write(frames)
            written.append(frames)
    return torch.cat(written, 1)


def _checksum(model) -> str:
    """Of a model's config and of the beginning of each of its tensors: enough to tell another checkpoint, and cheap."""
    # Private fields are about how the config was read; a list of defaults among them has another order in every process.
    config = sorted((name, value) for name, value in model.config.items() if not name.startswith("_"))
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        if not tensor.is_meta:  # sequential offload keeps the weights elsewhere
            digest.update(tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _frames_of(truth, run: dict):
    """An iterator over the true video's frames, uint8 [3, H, W]; of a file, no more than one frame lies in memory."""
    if truth is None:
        return None
    size = dict(fps=run["fps"], height=run["height"], width=run["width"])
    if isinstance(truth, FILE_TYPES):
        return (torch.from_numpy(np.array(picture)).permute(2, 0, 1) for _, picture in stream_video(truth, **size))
    return iter(read_video(truth, **size).frames.unbind(1))


def _next_frames(frames, count: int) -> torch.Tensor | None:
    taken = [] if frames is None else list(itertools.islice(frames, count))
    return torch.stack(taken, 1) if taken else None
