"""Clips whose numbers lie in text files: Bridge-style annotations, and tables beside the videos of a folder.

Bridge-style (the layout that IRASim and the paper's robot post-training use):
    <root>/annotation/<split>/<number>.json    {"videos": [{"video_path": ...}, ...], "state": [T, 6 or 7],
                                                "continuous_gripper_state": [T], "texts": [...]}
    <root>/videos/...                          what the paths, relative to <root>, name
States are [x, y, z, roll, pitch, yaw, gripper], and actions are derived from them (`robot_states`).

Tables: `clip.csv` beside `clip.mp4`, a row for every frame (or, for actions alone, for every step), with columns that begin
with `action` and `state`; or lists "actions", "states", "intrinsics", "extrinsics" in `clip.json`.
"""

import csv
import json
from pathlib import Path

import numpy as np

from ..conditioning.robot_states import actions_from_states
from .samples import pack_arrays
from .video import count_frames

ANNOTATIONS = ("annotation", "annotations")
LISTS = ("actions", "states", "intrinsics", "extrinsics")  # of a clip's JSON


class BridgeClips:
    """The clips of one split of a Bridge-style data set; `folder` holds its annotations."""

    def __init__(self, folder: Path):
        self.root = folder.parents[0] if folder.name in ANNOTATIONS else folder.parents[1]
        self._files = {path.stem: path for path in sorted(folder.glob("*.json"))}
        self.keys = list(self._files)

    def read(self, key: str) -> dict[str, bytes | Path]:
        path = self._files[key]
        try:
            label = json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        videos = [self.root / entry["video_path"] for entry in label.get("videos", [])]
        if not videos:
            raise ValueError(f"{path} names no 'videos'")
        names = [str(entry.get("camera", f"view{i}")) for i, entry in enumerate(label["videos"])]
        files = dict(zip([f"{name}.mp4" for name in names] if videos[1:] else ["mp4"], videos, strict=True))
        texts = label.get("texts") or [label.get("text") or label.get("task") or ""]
        record = {"caption": str(texts[0]), "episode_id": label.get("episode_id", key)}
        arrays = {}
        if "state" in label:
            states = np.asarray(label["state"], dtype=float)
            if states.ndim != 2 or states.shape[1] not in (6, 7):
                raise ValueError(f"'state' in {path} must be [T, 6] or [T, 7], got {states.shape}")
            gripper = label.get("continuous_gripper_state", states[:, 6] if states.shape[1] == 7 else None)
            if gripper is None or len(gripper) != len(states):
                raise ValueError(f"'continuous_gripper_state' in {path} must have {len(states)} entries like 'state'")
            arrays["states"] = np.c_[states[:, :6], gripper]
            arrays["actions"] = actions_from_states(arrays["states"])
        return files | {"json": json.dumps(record).encode(), "npz": pack_arrays(arrays)}


def annotation_folder(path: Path) -> Path | None:
    """The folder of annotations that `path` means: itself, or its only one. None where `path` is no Bridge-style data set.

    Raises FileNotFoundError naming the splits where there are several.
    """
    if any(part in ANNOTATIONS for part in (path.name, path.parent.name)) and any(path.glob("*.json")):
        return path
    if path.name in ANNOTATIONS:
        path = path.parent
    for name in ANNOTATIONS:
        folder = path / name
        if folder.is_dir():
            if any(folder.glob("*.json")):
                return folder
            splits = sorted(str(split) for split in folder.iterdir() if any(split.glob("*.json")))
            if len(splits) == 1:
                return Path(splits[0])
            if splits:
                raise FileNotFoundError(f"{path} has several splits; name one: {', '.join(splits)}")
    return None


def tables_beside(files: dict[str, bytes | Path], video: Path) -> dict[str, bytes | Path]:
    """A clip's files with its csv and the lists of its JSON turned into arrays ("npz"), where there are any."""
    arrays = {}
    if "csv" in files:
        arrays = _columns(Path(files["csv"]))
    if "json" in files:
        record = _record(Path(files["json"]))
        arrays |= {name: _array(record[name], name, files["json"]) for name in LISTS if name in record}
    if not arrays:
        return files
    if "npz" in files:
        raise ValueError(f"{video} has arrays in an npz and in a table or JSON: keep one")
    if "actions" in arrays and len(arrays["actions"]) == _frames(arrays, video):
        arrays["actions"] = arrays["actions"][:-1]  # nothing follows the last frame
    return {name: file for name, file in files.items() if name != "csv"} | {"npz": pack_arrays(arrays)}


def read_actions(path: str | Path, num_frames: int) -> np.ndarray:
    """The actions [T - 1, A] of a clip's file beside it: npz or json ("actions"), csv (columns `action...`); or of a npy.

    Of a table or list with an entry for each of the `num_frames` frames the last one is left out: nothing follows the last frame.
    Raises FileNotFoundError, and ValueError where there are none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        with np.load(path) as archive:
            found = {name: archive[name] for name in archive.files}
    elif path.suffix == ".csv":
        found = _columns(path)
    elif path.suffix == ".json":
        found = _record(path)
    else:
        raise ValueError(f"{path}: actions are read from .npz, .npy, .csv and .json")
    if "actions" not in found:
        raise ValueError(f"{path} has no 'actions'; there is {', '.join(found) or 'nothing'}")
    actions = _array(found["actions"], "actions", path)
    return actions[:-1] if path.suffix in (".csv", ".json") and len(actions) == num_frames else actions


def _frames(arrays: dict[str, np.ndarray], video: Path) -> int:
    return len(arrays["states"]) if "states" in arrays else count_frames(video)[0]


def _columns(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # tables from Excel begin with a byte-order mark
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise ValueError(f"{path} needs a line of names and at least one row")
    names = [name.strip() for name in rows[0]]
    arrays = {}
    for kind in ("action", "state"):
        columns = [i for i, name in enumerate(names) if name.startswith(kind)]
        if columns:
            try:
                arrays[f"{kind}s"] = np.array([[float(row[i]) for i in columns] for row in rows[1:]])
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}: a row holds no number in a column of {kind}s: {error}") from error
    if not arrays:
        raise ValueError(f"{path} has no column that begins with 'action' or 'state': {', '.join(names)}")
    return arrays


def _record(path: Path) -> dict:
    """A clip's JSON; what is wrong with it is said when its caption is read."""
    try:
        record = json.loads(path.read_bytes())
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _array(value, name: str, path) -> np.ndarray:
    try:
        return np.array(value, dtype=float)
    except ValueError as error:
        raise ValueError(f"{name!r} in {path} is no table of numbers: {error}") from error
