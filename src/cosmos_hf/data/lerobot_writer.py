"""Rollouts written as a LeRobot v3.0 data set, one video and one table file per episode."""

import json
from pathlib import Path

import numpy as np
import torch

from ..conditioning.action import ActionSpec
from .lerobot import INFO
from .video import write_video

try:
    import pyarrow
    import pyarrow.parquet as parquet
except ImportError as error:
    raise ImportError(f"LeRobot data sets need pyarrow: pip install 'cosmos-hf[lerobot]' ({error})") from error

CHUNK = 1000  # files in a folder
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_INDEX = ("timestamp", "frame_index", "episode_index", "index", "task_index")


class LeRobotWriter:
    """Writes episodes one by one; `close` (or leaving the `with` block) completes the data set.

    Args:
        root: folder to make; it must be empty or not exist.
        fps: frames and actions per second.
        spec: what actions mean: their names go into the data set, all of it into `meta/action_spec.json`.
        state_names: names of the numbers of a state, where there are states.
        robot_type: LeRobot's name of the robot.
    """

    def __init__(
        self,
        root: str | Path,
        fps: float,
        spec: ActionSpec | None = None,
        state_names: list[str] | None = None,
        robot_type: str = "cosmos-hf",
    ):
        self.root = Path(root)
        if self.root.exists() and any(self.root.iterdir()):
            raise ValueError(f"{self.root} is not empty: a data set is written into a new folder")
        if fps != round(fps):
            raise ValueError(f"LeRobot's rate is a whole number of frames per second, got {fps:g}")
        if spec is not None and spec.rate != fps:
            raise ValueError(f"the actions are given at {spec.rate:g} per second, the frames at {fps:g}")
        self.fps, self.spec, self.state_names, self.robot_type = int(fps), spec, state_names, robot_type
        self._features: dict[str, dict] = {}
        self._episodes, self._tasks, self._frames = [], {}, 0
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        videos: torch.Tensor | dict[str, torch.Tensor],
        actions=None,
        states=None,
        task: str = "",
    ):
        """Add an episode.

        Args:
            videos: uint8 [3, T, H, W], or one per view.
            actions: [T - 1, A]; LeRobot has a row for every frame, so the last one is written twice.
            states: [T, S].
            task: the instruction or caption.
        """
        videos = videos if isinstance(videos, dict) else {"main": videos}
        lengths = {view: video.shape[1] for view, video in videos.items()}
        length = next(iter(lengths.values()))
        if len(set(lengths.values())) > 1 or length < 2:
            raise ValueError(f"all views need the same number of frames, at least 2, got {lengths}")
        columns = self._checked_columns(actions, states, length)
        features = self._describe(videos, columns)
        if self._features and features != self._features:
            raise ValueError(f"this episode has {_shapes(features)}, those before have {_shapes(self._features)}")
        self._features = features
        number = len(self._episodes)
        place = dict(chunk_index=number // CHUNK, file_index=number % CHUNK)
        row = dict(
            episode_index=number,
            tasks=[task],
            length=length,
            dataset_from_index=self._frames,
            dataset_to_index=self._frames + length,
            **{f"data/{name}": value for name, value in place.items()},
            **{f"meta/episodes/{name}": 0 for name in place},
        )
        for view, frames in videos.items():
            camera = f"observation.images.{view}"
            path = self.root / "videos" / camera / (_FILE.format(**place) + ".mp4")
            write_video(path, frames, self.fps)
            row |= {f"videos/{camera}/{name}": value for name, value in place.items()}
            row |= {f"videos/{camera}/from_timestamp": 0.0, f"videos/{camera}/to_timestamp": length / self.fps}
        columns |= self._index_columns(number, length, self._tasks.setdefault(task, len(self._tasks)))
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)
            for statistic, value in _statistics(values).items():
                row[f"stats/{name}/{statistic}"] = value
        _write_table(self.root / "data" / (_FILE.format(**place) + ".parquet"), columns)
        self._episodes.append(row)
        self._frames += length

    def close(self) -> Path:
        """Write what describes the whole. Raises ValueError for a data set without an episode."""
        if not self._episodes:
            raise ValueError("a data set needs at least one episode")
        meta = self.root / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True, exist_ok=True)
        parquet.write_table(
            pyarrow.Table.from_pylist(self._episodes), meta / "episodes" / "chunk-000" / "file-000.parquet"
        )
        tasks = {"task_index": list(self._tasks.values()), "task": list(self._tasks)}
        pandas = {  # readers that use pandas take the task as the table's index
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [
                dict(name=name, field_name=name, pandas_type=kind, numpy_type=dtype, metadata=None)
                for name, kind, dtype in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
            ],
        }
        table = pyarrow.table(tasks).replace_schema_metadata({"pandas": json.dumps(pandas)})
        parquet.write_table(table, meta / "tasks.parquet")
        statistics = {name: _statistics(np.concatenate(parts)) for name, parts in self._columns.items()}
        _write_json(meta / "stats.json", statistics)
        info = dict(
            codebase_version="v3.0",
            robot_type=self.robot_type,
            total_episodes=len(self._episodes),
            total_frames=self._frames,
            total_tasks=len(self._tasks),
            chunks_size=CHUNK,
            data_files_size_in_mb=100,
            video_files_size_in_mb=500,
            fps=self.fps,
            splits={"train": f"0:{len(self._episodes)}"},
            data_path=f"data/{_FILE}.parquet",
            video_path="videos/{video_key}/" + f"{_FILE}.mp4",
            features=self._features,
        )
        _write_json(self.root / INFO, info)
        if self.spec is not None:
            self.spec.save(meta)
        return self.root

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()

    def _checked_columns(self, actions, states, length: int) -> dict[str, np.ndarray]:
        columns = {}
        if (actions is None) != (self.spec is None):
            raise ValueError(
                "actions and their ActionSpec go together: the writer got " + ("none" if self.spec else "no spec")
            )
        if actions is not None:
            actions = self.spec.check(actions, self.fps).numpy()
            if len(actions) != length - 1:
                raise ValueError(f"{len(actions)} actions for {length} frames, {length - 1} are needed")
            columns["action"] = np.concatenate([actions, actions[-1:]])
        if (states is None) != (self.state_names is None):
            raise ValueError("states and state_names go together, one is missing")
        if states is not None:
            states = np.asarray(states, dtype=np.float32)
            if states.shape != (length, len(self.state_names)):
                raise ValueError(f"states must be [{length}, {len(self.state_names)}], got {states.shape}")
            columns["observation.state"] = states
        return columns

    def _index_columns(self, episode: int, length: int, task: int) -> dict[str, np.ndarray]:
        steps = np.arange(length)
        return {
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, episode),
            "index": self._frames + steps,
            "task_index": np.full(length, task),
        }

    def _describe(self, videos: dict[str, torch.Tensor], columns: dict[str, np.ndarray]) -> dict[str, dict]:
        features = {}
        for name in columns:
            names = list(self.spec.names) if name == "action" else self.state_names
            features[name] = dict(dtype="float32", shape=[len(names)], names=names)
        for view, video in videos.items():
            _, _, height, width = video.shape
            height, width = height + height % 2, width + width % 2
            told = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": self.fps,
                "video.channels": 3,
                "has_audio": False,
            }
            features[f"observation.images.{view}"] = dict(
                dtype="video", shape=[height, width, 3], names=["height", "width", "channels"], info=told
            )
        for name in _INDEX:
            dtype = "float32" if name == "timestamp" else "int64"
            features[name] = dict(dtype=dtype, shape=[1], names=None)
        return features


def _statistics(values: np.ndarray) -> dict[str, list]:
    table = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    found = dict(min=table.min(0), max=table.max(0), mean=table.mean(0), std=table.std(0))
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(table)]}


def _write_table(path: Path, columns: dict[str, np.ndarray]):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, values in columns.items():
        if values.ndim == 2:
            flat = pyarrow.array(values.ravel(), type=pyarrow.float32())
            arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            arrays[name] = pyarrow.array(values)
    parquet.write_table(pyarrow.table(arrays), path)


def _write_json(path: Path, record: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2))


def _shapes(features: dict[str, dict]) -> dict[str, list]:
    return {name: feature["shape"] for name, feature in features.items() if name not in _INDEX}
