"""What the scripts in `pipelines/` share: arguments, seeds, batches, saving with metadata, and errors as messages."""

import argparse
import copy
import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from ..data.video import IMAGE_SUFFIXES, contact_sheet, read_metadata, write_video
from ..schedulers.exponential_solvers import SOLVERS
from ..schedulers.scheduling_edm_cosmos import GRIDS
from .buckets import RATIOS
from .presets import PRESETS, STORAGES
from .preview import fit_latent_preview

# Arguments that say where and with what to run, not what to make.
PLACES = ("output", "device", "preset", "batch", "preview")
FIXED = (
    "model",
    "adapter",
    "dtype",
    "device",
    "preset",
    "storage",
    "batch",
    "upsampler",
    "upsampler_4bit",
)  # the same for all items of a batch
SAMPLING = ("solver", "grid", "guidance_interval", "guidance_rescale", "batch_guidance", "drop_conditions")
CALL = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "fps", "guidance_scale")


def add_generation_arguments(parser: argparse.ArgumentParser, model: str):
    parser.add_argument("--model", default=model, help="folder or Hub id of a pipeline")
    parser.add_argument("--prompt")
    parser.add_argument("--negative_prompt")
    parser.add_argument("--output", default="outputs/world.mp4", help="the mp4; with --batch a folder")
    parser.add_argument("--resolution", help=f"aspect ratio instead of height and width: {', '.join(RATIOS)}, or auto")
    for name in ("height", "width", "num_frames", "num_inference_steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's")
    for name in ("fps", "guidance_scale"):
        parser.add_argument(f"--{name}", type=float, help="default: the model's")
    parser.add_argument("--solver", choices=SOLVERS, help="default: the model's")
    parser.add_argument("--grid", choices=GRIDS, help="noise levels; default: the solver's")
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigma; guide within"
    )
    parser.add_argument("--guidance_rescale", type=float, help="0 to 1, against the glare of large scales")
    parser.add_argument(
        "--batch_guidance", action="store_true", help="evaluate both branches at once; twice the memory"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--upsampler", help="folder or Hub id of a chat model that makes the prompt richer")
    parser.add_argument(
        "--upsampler_4bit", action="store_true", help="load it with 4 bit weights (needs bitsandbytes)"
    )
    parser.add_argument("--preview", help="png that shows the video in small after every step")
    add_placing_arguments(parser)
    parser.add_argument("--storage", choices=STORAGES, help="keep the transformer's weights smaller: an approximation")


def add_placing_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--preset", choices=PRESETS, help="bring the weights to the device as one of this size needs it"
    )


def load_pipeline(pipeline_class, args: argparse.Namespace):
    """The pipeline of `--model` with its `--adapter`s on `--device`, or as `--preset` places it."""
    more = {"storage": args.storage} if hasattr(args, "storage") else {}
    pipe = pipeline_class.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype), **more)
    for folder in getattr(args, "adapter", None) or []:
        pipe.load_lora_weights(folder)
    if args.preset is None:
        return pipe.to(args.device)
    pipe.apply_preset(args.preset, args.device)
    return pipe


def add_batch_argument(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--batch",
        help='JSON lines, one video each: {"prompt": ..., "seed": ..., "output": ...} and any other argument; what is absent '
        "is as given to the script, a seed counts up from --seed. Videos that are there already are not made again.",
    )


def call_arguments(args: argparse.Namespace) -> dict:
    """Parsed arguments -> keyword arguments of a pipeline's call."""
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name, None)}
    return {name: getattr(args, name) for name in CALL} | dict(
        resolution=getattr(args, "resolution", None),
        sampling=sampling,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
    )


def input_argument(path: str) -> dict[str, str]:
    """A file as the argument of a call that it is: {"image": path} or {"video": path}."""
    return {"image" if path.lower().endswith(tuple(IMAGE_SUFFIXES)) else "video": path}


def preview_arguments(args: argparse.Namespace, pipe) -> dict:
    """The callback that keeps `--preview` up to date; nothing without it."""
    if not getattr(args, "preview", None):
        return {}
    Path(args.preview).parent.mkdir(parents=True, exist_ok=True)
    preview = fit_latent_preview(pipe.vae, pipe.scheduler.config.sigma_data)
    scale = pipe.vae.config.spatial_compression

    def show(step, frames):
        picture = contact_sheet({f"step {step + 1}": frames[0]}, scale=scale)
        unfinished = Path(args.preview).with_suffix(".part.png")
        picture.save(unfinished)
        os.replace(unfinished, args.preview)

    return dict(callback_on_step_end=preview.callback(show), callback_on_step_end_tensor_inputs=("denoised",))


# ---- batches -------------------------------------------------------------------------------------------------------


def run_batch(parser: argparse.ArgumentParser, args: argparse.Namespace, make: Callable[[argparse.Namespace], None]):
    """`make(args)` once, or for every line of `--batch`; a line whose video is there is passed over.

    An item that fails is reported and the others are made; then ValueError tells how many failed. Lines that cannot be
    understood, and existing videos that other settings made, are refused before anything is made.
    """
    if not args.batch:
        return make(args)
    items = read_batch(parser, args)
    waiting = [item for item in items if not _is_done(item)]
    print(f"{args.batch}: {len(items)} videos, {len(items) - len(waiting)} are there already")
    failures = []
    for item in waiting:
        try:
            make(item)
        except (ValueError, OSError) as error:
            failures.append(f"{item.output}: {error}")
            print(f"failed: {failures[-1]}")
    if failures:
        raise ValueError(f"{len(failures)} of {len(waiting)} videos failed:\n" + "\n".join(failures))


def read_batch(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[argparse.Namespace]:
    """The script's arguments of every line of `--batch`. Raises ValueError that names the line, the key and the legal keys."""
    actions = {action.dest: action for action in parser._actions if action.dest not in (*FIXED, "help")}
    items = []
    for number, line in enumerate(Path(args.batch).read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{args.batch}, line {number}"
        try:
            job = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(job, dict) or set(job) - set(actions):
            unknown = sorted(set(job) - set(actions)) if isinstance(job, dict) else type(job).__name__
            raise ValueError(f"{where} must be an object with keys from {', '.join(actions)}; got {unknown}")
        index = len(items)
        item = copy.copy(args)
        folder = Path(args.output).with_suffix("")
        item.seed, item.output = args.seed + index, str(folder / f"{index:04d}.mp4")
        for name, value in job.items():
            setattr(item, name, _typed(actions[name], value, where))
        if not Path(item.output).is_absolute() and "output" in job:
            item.output = str(folder / item.output)
        items.append(item)
    outputs = [item.output for item in items]
    twice = sorted({output for output in outputs if outputs.count(output) > 1})
    if twice:
        raise ValueError(f"{args.batch} writes {', '.join(twice)} more than once")
    return items


def _typed(action: argparse.Action, value, where: str):
    try:
        if value is None or action.type is None:
            typed = value
        else:
            typed = [action.type(v) for v in value] if action.nargs else action.type(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {action.dest} cannot be {value!r}") from error
    if action.choices is not None and typed not in action.choices and typed is not None:
        raise ValueError(f"{where}: {action.dest} must be one of {', '.join(action.choices)}, got {value!r}")
    return typed


def _is_done(item: argparse.Namespace) -> bool:
    if not Path(item.output).exists():
        return False
    before = read_metadata(item.output).get("settings", {})
    wanted = json.loads(json.dumps(_settings(item)))
    differing = [name for name in {*before, *wanted} - {*PLACES} if before.get(name) != wanted.get(name)]
    if differing:
        raise ValueError(
            f"{item.output} is there, made with other settings ({', '.join(sorted(differing))}): move it, or write elsewhere"
        )
    return True


# ---- results -------------------------------------------------------------------------------------------------------


def save_result(args: argparse.Namespace, pipe, result, **more) -> Path:
    """Write the first video as mp4, with what made it stored inside; it appears under its name when it is complete."""
    frames = (result.frames[0].transpose(0, 1) * 255).round().to(torch.uint8)  # [T, 3, H, W] in [0, 1] -> [3, T, H, W]
    metadata = provenance(args, pipe) | dict(frames_sha256=checksum(frames.cpu().numpy().tobytes())) | more
    unfinished = write_video(f"{args.output}.part", frames, result.fps, metadata)
    os.replace(unfinished, args.output)
    print(f"{args.output}: {frames.shape[1]} frames of {frames.shape[2]}x{frames.shape[3]} at {result.fps:g} fps")
    return Path(args.output)


def provenance(args: argparse.Namespace, pipe) -> dict:
    """What is needed to make a video again, and to tell why it did not come out the same."""
    libraries = ("cosmos-hf", "torch", "diffusers", "transformers")
    return dict(
        settings=_settings(args),
        pipeline=type(pipe).__name__,
        model=str(args.model),
        model_checksum=folder_checksum(args.model),
        versions={name: version(name) for name in libraries} | {"python": platform.python_version()},
    )


def _settings(args: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(args).items() if not (value is None or value is False or value == [])}


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_checksum(path: str | Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else checksum(file.read())
        )


def folder_checksum(folder: str | Path) -> str | None:
    """Of the names and sizes of a model's files and of both ends of each: cheap, and another for another model. None for a
    model that is no folder here."""
    if not Path(folder).is_dir():
        return None
    digest, end = hashlib.sha256(), 2**16
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model"):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(end))
                file.seek(max(0, size - end))
                digest.update(file.read(end))
    return digest.hexdigest()


@contextmanager
def report(parser: argparse.ArgumentParser):
    """Errors that the user can mend end the script with their message, not with a stack trace."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
