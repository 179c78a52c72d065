"""Rendering a split of a world into WebDataset shards, in parallel, resumable and deterministic.

Layout: `<root>/<split>/<split>-00000.tar` with `<key>.mp4`, `<key>.json` and `<key>.npz` per clip, and `<root>/dataset.json`.
Clips of several cameras have `<key>.<view>.mp4` for each. A shard appears under its name only when it is complete.

A world is a module: `VERSION`, `SPLITS`, `FPS`, `HEIGHT`, `WIDTH`, `NUM_FRAMES`, and `simulate(split, index, seed, renderer,
truth)` for a clip with `videos()` (frames by view, "" for the only one), `arrays()` and `record()`. `truth` asks for what is
costly to render beside the pictures: masks or depth.
"""

import io
import json
import multiprocessing
import os
import platform
import tarfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import av
import numpy as np
import webdataset
from tqdm import tqdm

from . import driving, driving_front, rooms, tabletop, tabletop_hand, tabletop_instructions, tabletop_objects
from .render import choose_renderer, mujoco, restart_filament

WORLDS = {
    "tabletop": tabletop,
    "tabletop_instructions": tabletop_instructions,
    "tabletop_objects": tabletop_objects,
    "tabletop_hand": tabletop_hand,
    "rooms": rooms,
    "driving": driving,
    "driving_front": driving_front,
}
# On a processor with AVX-512 the x264 of PyAV 18.1 codes equal frames of 64x96 in another way each time. Its code for older
# processors always gives one result, for 96x128 the same bytes as before, and is as fast for pictures as small as these.
_ONE_RESULT = {"x264-params": "asm=sse4"} if platform.machine().lower() in ("x86_64", "amd64") else {}


def render_split(
    root: str | Path,
    split: str,
    num_clips: int,
    world: str = "tabletop",
    seed: int = 0,
    clips_per_shard: int = 100,
    num_workers: int = 2,
    renderer: str | None = None,
    progress: bool = True,
) -> Path:
    """Render clips 0..num_clips-1 of a split; complete shards are kept, so a run that was cut short goes on.

    What happens in a clip depends on (seed, split, its index) only, and equal arguments give equal bytes. Validation
    splits carry masks or depth. In `val_counterfactual` four clips in a row are the four plans from one start state.
    `renderer` None takes the best one that runs here. Raises ValueError for an unknown world or split, a count below 1,
    or where `root` holds data of another world, version, seed, renderer or shard size.
    """
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; there is {', '.join(WORLDS)}")
    if split not in WORLDS[world].SPLITS:
        raise ValueError(f"the world {world!r} has no split {split!r}; there is {', '.join(WORLDS[world].SPLITS)}")
    for name, value in (("num_clips", num_clips), ("clips_per_shard", clips_per_shard), ("num_workers", num_workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    renderer = renderer or choose_renderer()
    folder = Path(root) / split
    folder.mkdir(parents=True, exist_ok=True)
    _check_record(
        Path(root),
        dict(
            world=world,
            version=WORLDS[world].VERSION,
            seed=seed,
            renderer=renderer,
            clips_per_shard=clips_per_shard,
        ),
    )
    jobs = []
    for number, start in enumerate(range(0, num_clips, clips_per_shard)):
        path = folder / f"{split}-{number:05d}.tar"
        count = min(clips_per_shard, num_clips - start)
        if _clips_in(path) < count:
            jobs.append((world, path, split, range(start, start + count), seed, renderer))
    done = num_clips - sum(len(job[3]) for job in jobs)
    # spawn: a forked process would share the renderer's context. The rng of a clip does not depend on its process.
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=num_clips, initial=done, unit="clip", desc=split, disable=not progress) as bar,
        ProcessPoolExecutor(min(num_workers, max(1, len(jobs))), mp_context=context) as pool,
    ):
        futures = [pool.submit(_render_shard, *job) for job in jobs]
        for future in as_completed(futures):
            bar.update(future.result())
            _update_counts(Path(root))
    _update_counts(Path(root))
    return folder


def _render_shard(world: str, path: Path, split: str, indices: range, seed: int, renderer: str) -> int:
    restart_filament()
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        with webdataset.TarWriter(str(partial), mtime=0, user="", group="") as writer:
            for index in indices:
                episode = WORLDS[world].simulate(split, index, seed, renderer, split != "train")
                writer.write(sample_of(episode, world, split, index, seed, renderer))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(indices)


def sample_of(episode, world: str, split: str, index: int, seed: int, renderer: str) -> dict:
    """A WebDataset sample: bytes by extension."""
    fps, videos = WORLDS[world].FPS, episode.videos()
    packed = io.BytesIO()
    np.savez_compressed(packed, **episode.arrays())
    record = episode.record()
    told = dict(
        caption=record.pop("caption"),
        fps=fps,
        num_frames=len(next(iter(videos.values()))),
        world=world,
        split=split,
        index=index,
        seed=seed,
        renderer=renderer,
        **record,
    )
    if "" not in videos:
        told["views"] = list(videos)
    files = {f"{view}.mp4" if view else "mp4": encode_mp4(frames, fps) for view, frames in videos.items()}
    key = f"{world}-{split}-{index:06d}"
    return {"__key__": key, **files, "json": json.dumps(told).encode(), "npz": packed.getvalue()}


def encode_mp4(frames: np.ndarray, fps: int, crf: int = 14) -> bytes:
    """uint8 [T, H, W, 3] -> h264 bytes: equal frames give equal bytes, hence one thread and `_ONE_RESULT`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "medium", "threads": "1"} | _ONE_RESULT
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _clips_in(path: Path) -> int:
    if not path.exists():
        return 0
    with tarfile.open(path) as archive:
        return sum(name.endswith(".json") for name in archive.getnames())


def _check_record(root: Path, settings: dict):
    """One folder holds one world, seed and renderer: mixing them would go unnoticed in training."""
    path = root / "dataset.json"
    if path.exists():
        record = json.loads(path.read_text())
        different = {key: (record.get(key), value) for key, value in settings.items() if record.get(key) != value}
        if different:
            changes = ", ".join(f"{key}={old!r} there, {new!r} asked" for key, (old, new) in different.items())
            raise ValueError(f"{path} is of another rendering ({changes}); choose another folder or the same settings")
        return
    world = WORLDS[settings["world"]]
    size = dict(height=world.HEIGHT, width=world.WIDTH, num_frames=world.NUM_FRAMES, fps=world.FPS)
    _write_record(path, {**settings, "simulator": f"mujoco {mujoco.__version__}", **size, "clips": {}})


def _write_record(path: Path, record: dict):
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(record, indent=2))
    partial.rename(path)


def _update_counts(root: Path):
    path = root / "dataset.json"
    record = json.loads(path.read_text())
    for folder in sorted(root.iterdir()):
        if folder.name in WORLDS[record["world"]].SPLITS:
            record["clips"][folder.name] = sum(_clips_in(shard) for shard in folder.glob("*.tar"))
    _write_record(path, record)
