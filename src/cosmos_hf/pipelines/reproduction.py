"""Making a video again from what is stored inside it, and telling whether it came out the same."""

from pathlib import Path

import torch

from ..data.video import read_metadata, read_video
from ..nano import MODELS, nano_path

_FILES = {
    "model_checksum": "the model's files are not those that made it",
    "adapter_checksum": "the adapters' files are not those that made it",
    "input_sha256": "the input file is another",
    "actions_sha256": "the file of actions is another",
    "camera_sha256": "the camera's file is another",
}
SCRIPTS = ("text2world", "video2world", "ar_video2world", "rollout_world")


def recipe(path: str | Path) -> tuple[str, dict]:
    """(name of the script in `pipelines/`, its settings) that made a video.

    Raises ValueError for a file that no such script wrote. A bundled model is looked up where it lies now, and a prompt that a
    chat model had made richer is taken as it was used.
    """
    metadata = read_metadata(path)
    script = metadata.get("script")
    if script not in SCRIPTS:
        raise ValueError(
            f"{path} does not tell how it was made: only videos of pipelines/{{{','.join(SCRIPTS)}}}.py do"
        )
    settings = dict(metadata["settings"])
    for name in ("output", "batch", "preview", "device", "truth", "keep_chunks", "lerobot"):
        settings.pop(name, None)
    bundled = {folder: name for name, folder in MODELS.items()}
    if not Path(settings["model"]).exists() and Path(settings["model"]).name in bundled:
        settings["model"] = nano_path(bundled[Path(settings["model"]).name])
    settings.pop("upsampler_4bit", None)
    if settings.pop("upsampler", None):
        settings["prompt"] = metadata["prompts"]["upsampled"]
    return script, settings


def command_line(settings: dict) -> list[str]:
    """Settings -> arguments of the script that they belong to."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        elif isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words


def compare(original: str | Path, again: str | Path) -> dict:
    """Two videos with their metadata -> {"equal", "psnr", "differences"}.

    "equal" is about the frames, before the codec where that is known; "psnr" in dB is between the files; "differences" are the
    versions and files that are not the same.
    """
    before, after = read_metadata(original), read_metadata(again)
    differences = [
        f"{name} was {before['versions'].get(name)}, is {now}"
        for name, now in after["versions"].items()
        if before["versions"].get(name) != now
    ]
    for key, what in _FILES.items():
        if before.get(key) != after.get(key):
            differences.append(what)
    a, b = (read_video(path).frames for path in (original, again))
    if a.shape != b.shape:
        return dict(equal=False, psnr=None, differences=[*differences, f"sizes {tuple(a.shape)} and {tuple(b.shape)}"])
    error = ((a.float() - b.float()) / 255).square().mean()
    psnr = 100.0 if error == 0 else (-10 * torch.log10(error)).item()
    # A long world is written as it goes, before its frames are known: there the decoded files tell.
    told = "frames_sha256" in before and "frames_sha256" in after
    equal = before["frames_sha256"] == after["frames_sha256"] if told else bool(error == 0)
    return dict(equal=equal, psnr=round(psnr, 2), differences=differences)
