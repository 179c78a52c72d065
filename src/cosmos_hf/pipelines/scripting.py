"""What the scripts in `pipelines/` share: arguments, seeds, saving with metadata, and errors as messages."""

import argparse
import platform
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from ..data.video import write_video


def add_generation_arguments(parser: argparse.ArgumentParser, model: str):
    parser.add_argument("--model", default=model, help="folder or Hub id of a pipeline")
    parser.add_argument("--prompt")
    parser.add_argument("--negative_prompt")
    parser.add_argument("--output", default="outputs/world.mp4")
    for name in ("height", "width", "num_frames", "num_inference_steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's")
    for name in ("fps", "guidance_scale"):
        parser.add_argument(f"--{name}", type=float, help="default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def call_arguments(args: argparse.Namespace) -> dict:
    """Parsed arguments -> keyword arguments of a pipeline's call."""
    names = (
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "num_frames",
        "num_inference_steps",
        "fps",
        "guidance_scale",
    )
    return {name: getattr(args, name) for name in names} | dict(
        generator=torch.Generator().manual_seed(args.seed), output_type="pt"
    )


def save_result(args: argparse.Namespace, pipe, result, **more) -> Path:
    """Write the first video as mp4, with what made it stored inside."""
    frames = (result.frames[0].transpose(0, 1) * 255).round().to(torch.uint8)  # [T, 3, H, W] in [0, 1] -> [3, T, H, W]
    path = write_video(args.output, frames, result.fps, provenance(args, pipe) | more)
    print(f"{path}: {frames.shape[1]} frames of {frames.shape[2]}x{frames.shape[3]} at {result.fps:g} fps")
    return path


def provenance(args: argparse.Namespace, pipe) -> dict:
    """What is needed to make a video again."""
    libraries = ("cosmos-hf", "torch", "diffusers", "transformers")
    return dict(
        settings={name: value for name, value in vars(args).items() if value is not None},
        pipeline=type(pipe).__name__,
        model=str(args.model),
        versions={name: version(name) for name in libraries} | {"python": platform.python_version()},
    )


@contextmanager
def report(parser: argparse.ArgumentParser):
    """Errors that the user can mend end the script with their message, not with a stack trace."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
