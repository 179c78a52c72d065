"""LeRobot data sets, v2.0, v2.1 and v3.0, as clips of the one schema (`samples`), read without the lerobot package.

An episode is a clip, its task the caption. `observation.state` becomes `states`; row t of `action` leads from frame t to frame
t + 1, so the last row is left out. Cameras are called by the last part of their names (`observation.images.top` is "top");
where there is one alone, it is the clip's only video. In v3.0 many episodes lie in one video file, each from its own time on.
"""

import json
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from ..conditioning.action import FILE_NAME, ActionSpec
from .samples import VideoSegment, pack_arrays

try:
    import pyarrow.parquet as parquet
except ImportError as error:
    raise ImportError(f"LeRobot data sets need pyarrow: pip install 'cosmos-hf[lerobot]' ({error})") from error

VERSIONS = ("v2.0", "v2.1", "v3.0")
INFO = "meta/info.json"
HUB_PREFIX = "hf://"


def download(name: str) -> Path:
    """`hf://<user>/<data set>` or `hf://<user>/<data set>@<revision>` -> the local copy of that repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"the data set {repository} cannot be had from the Hub: {error}") from error


class LeRobotClips:
    """The episodes of a LeRobot data set in a local folder.

    Args:
        root: folder that holds `meta/info.json`.
        action, state: names of the features that become `actions` and `states`; None leaves them out, and a default that the
            data set lacks is left out, too.

    Raises ValueError for a version that is not known, and for cameras that are stored as pictures instead of videos.
    """

    def __init__(self, root: str | Path, action: str | None = "action", state: str | None = "observation.state"):
        self.root = Path(root)
        self.info = _json(self.root / INFO)
        self.version = str(self.info.get("codebase_version"))
        if self.version not in VERSIONS:
            raise ValueError(f"{self.root} has the LeRobot version {self.version}; known are {', '.join(VERSIONS)}")
        self.features = self.info["features"]
        for name, default in ((action, "action"), (state, "observation.state")):
            if name is not None and name != default and name not in self.features:
                raise ValueError(f"{self.root} has no feature {name!r}; there is {', '.join(self.features)}")
        self.action = action if action in self.features else None
        self.state = state if state in self.features else None
        self.fps = float(self.info["fps"])
        pictures = [name for name, feature in self.features.items() if feature["dtype"] == "image"]
        if pictures:
            raise ValueError(
                f"{self.root} stores {', '.join(pictures)} as pictures: convert them to videos (LeRobot's use_videos)"
            )
        cameras = [name for name, feature in self.features.items() if feature["dtype"] == "video"]
        if not cameras:
            raise ValueError(f"{self.root} has no camera")
        self.cameras = {name.rpartition(".")[2]: name for name in cameras}
        if len(self.cameras) < len(cameras):
            self.cameras = {name: name for name in cameras}
        self.episodes = self._read_episodes()
        self._by_key = {f"episode_{row['episode_index']:06d}": row for row in self.episodes}
        self.keys = sorted(self._by_key)

    def read(self, key: str) -> dict[str, bytes | VideoSegment]:
        """The files of an episode. ValueError where its rows do not fit its length."""
        row = self._by_key[key]
        arrays = self._arrays(row)
        for name, array in arrays.items():
            if len(array) != row["length"] - (name == "actions"):
                raise ValueError(f"{name} of {key} has {len(array)} rows for a length of {row['length']} frames")
        record = dict(
            caption=". ".join(row.get("tasks") or []),
            fps=self.fps,
            num_frames=row["length"],
            episode_index=row["episode_index"],
            robot_type=self.info.get("robot_type"),
            action_names=self.names(self.action) if self.action else [],
            state_names=self.names(self.state) if self.state else [],
            views=list(self.cameras),
        )
        files = {"json": json.dumps(record).encode(), "npz": pack_arrays(arrays)}
        for view, camera in self.cameras.items():
            files["mp4" if len(self.cameras) == 1 else f"{view}.mp4"] = self._video(camera, row)
        return files

    def names(self, feature: str) -> list[str]:
        """What a feature's numbers are called; their index where the data set does not say."""
        width = int(np.prod(self.features[feature]["shape"]))
        names = self.features[feature].get("names")
        if isinstance(names, dict):  # {"motors": [...]}, or name -> place
            lists = [value for value in names.values() if isinstance(value, list)]
            names = lists[0] if lists else list(names)
        return [str(name) for name in names] if isinstance(names, list) and len(names) == width else _count(width)

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Feature -> {"min", "max", "mean", "std", "count"} over the whole data set, as its own files say; may be empty."""
        whole = self.root / "meta" / "stats.json"
        if whole.exists():
            return {name: {k: np.array(v) for k, v in part.items()} for name, part in _json(whole).items()}
        lines = self.root / "meta" / "episodes_stats.jsonl"
        parts = [json.loads(line)["stats"] for line in lines.read_text().splitlines()] if lines.exists() else []
        names = [name for name in (self.action, self.state) if name and all(name in part for part in parts)]
        return {name: _pooled([part[name] for part in parts]) for name in names if parts}

    @cached_property
    def stated_spec(self) -> ActionSpec | None:
        """What the data set says of its actions in `meta/action_spec.json`, which `LeRobotWriter` writes; None without one."""
        meta = self.root / "meta"
        return ActionSpec.load(meta) if self.action is not None and (meta / FILE_NAME).exists() else None

    def action_spec(self, **known) -> ActionSpec:
        """What the data set itself says of its actions, with its range, and `known` (`ActionSpec`'s fields) in place of that.

        LeRobot itself keeps no units, frame or convention: where there is no `meta/action_spec.json`, what is not given is taken
        for absolute targets of joints, without units and a gripper.
        """
        if self.action is None:
            raise ValueError(f"{self.root} has no actions")
        names = self.names(self.action)
        found = self.statistics.get(self.action, {})
        seen = {}
        if {"min", "max"} <= set(found):
            seen = {"low": tuple(found["min"].tolist()), "high": tuple(found["max"].tolist())}
        if self.stated_spec is not None:
            return replace(self.stated_spec, **(known if self.stated_spec.low else seen | known))
        assumed = dict(names=tuple(names), frame="joints", kind="absolute", rate=self.fps, units=("",) * len(names))
        return ActionSpec(**assumed | {"embodiment": self.info.get("robot_type") or ""} | seen | known)

    def _read_episodes(self) -> list[dict]:
        if self.version.startswith("v2"):
            path = self.root / "meta" / "episodes.jsonl"
            if not path.exists():
                raise FileNotFoundError(f"no such file: {path}")
            return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        files = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(f"no *.parquet in {self.root / 'meta' / 'episodes'}")
        rows = []
        for file in files:
            wanted = [name for name in parquet.read_schema(file).names if not name.startswith("stats/")]
            rows += parquet.read_table(file, columns=wanted).to_pylist()
        return rows

    def _place(self, row: dict) -> dict:
        """What the path patterns of `info.json` are filled with."""
        index = row["episode_index"]
        return dict(episode_index=index, episode_chunk=index // self.info.get("chunks_size", 1000))

    def _arrays(self, row: dict) -> dict[str, np.ndarray]:
        place = self._place(row)
        if self.version == "v3.0":
            place |= dict(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        path = self.root / self.info["data_path"].format(**place)
        if not path.exists():
            raise FileNotFoundError(f"no such file: {path}")
        wanted = {"actions": self.action, "states": self.state}
        wanted = {name: feature for name, feature in wanted.items() if feature}
        table = _table(path, tuple(wanted.values()))
        chosen = table["episode_index"] == row["episode_index"]
        arrays = {name: table[feature][chosen] for name, feature in wanted.items()}
        if "actions" in arrays:
            arrays["actions"] = arrays["actions"][:-1]
        return arrays

    def _video(self, camera: str, row: dict) -> VideoSegment:
        place, start = self._place(row) | {"video_key": camera}, 0.0
        if self.version == "v3.0":
            place |= {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index")}
            start = float(row[f"videos/{camera}/from_timestamp"])
        path = self.root / self.info["video_path"].format(**place)
        if self.version == "v3.0":
            return VideoSegment(path, start, int(row["length"]), self.fps)
        return path


@lru_cache(maxsize=4)
def _table(path: Path, features: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of a file as float32 [rows, width], and `episode_index` [rows]. Kept, since v3.0 has many episodes in a file."""
    table = parquet.read_table(path, columns=[*features, "episode_index"])
    columns = {"episode_index": table["episode_index"].to_numpy()}
    for feature in features:
        rows = table[feature].to_pylist()
        if len({np.size(row) for row in rows}) > 1:
            raise ValueError(
                f"{feature} in {path} has rows of different width: {sorted({np.size(row) for row in rows})}"
            )
        columns[feature] = np.array(rows, dtype=np.float32).reshape(len(rows), -1)
    return columns


def _json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _count(width: int) -> list[str]:
    return [str(i) for i in range(width)]


def _pooled(parts: list[dict]) -> dict[str, np.ndarray]:
    """Statistics of episodes -> of all of them together."""
    count = np.array([np.ravel(part["count"])[0] for part in parts], dtype=float)[:, None]
    mean, std = (np.array([np.ravel(part[name]) for part in parts]) for name in ("mean", "std"))
    total = (count * mean).sum(0) / count.sum()
    variance = (count * (std**2 + (mean - total) ** 2)).sum(0) / count.sum()
    return {
        "min": np.min([np.ravel(part["min"]) for part in parts], axis=0),
        "max": np.max([np.ravel(part["max"]) for part in parts], axis=0),
        "mean": total,
        "std": np.sqrt(variance),
        "count": count.sum(),
    }
