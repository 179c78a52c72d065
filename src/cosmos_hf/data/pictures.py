"""Folders of pictures as clips of one frame, alone or beside clips: data of image tokenizers and of joint training."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .clips import BROKEN, BrokenSamples
from .samples import VIDEO_SUFFIXES, SampleReader
from .video import IMAGE_SUFFIXES, read_video


def find_pictures(path: str | Path) -> list[Path]:
    """The pictures in a folder and its subfolders, or the one that `path` is. Empty where there are none, and where videos or
    shards lie beside them: then it is a folder of those, and the pictures are something else."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    suffixes = {file.suffix.lower() for file in files}
    if suffixes & {*VIDEO_SUFFIXES, ".tar"}:
        return []
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]


class PictureDataset(Dataset):
    """Samples as those of `ClipDataset` with one frame: `video` uint8 [3, 1, H, W], `fps` 0, `caption` "", `key`, `record` {}.

    Args:
        paths: folders of pictures, one or several.
        crop: (height, width) to cut, at a random place if `random`, else in the centre; None keeps the picture.
        on_broken, max_broken: as in `ClipDataset`; a picture smaller than the crop is a broken one.
    """

    def __init__(self, paths, *, crop=None, random=True, on_broken: str = "error", max_broken: float = 0.01):
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self._files = []
        for path in paths:
            found = find_pictures(path)
            if not found:
                raise FileNotFoundError(f"{path} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
            self._files += found
        self.reader = SampleReader(num_frames=1, crop=crop, random=random)
        self.broken = BrokenSamples(on_broken, max_broken)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int | tuple[int, int]) -> dict | None:
        """Picture `index`, its crop by `draw` where (index, draw) is given. None for a skipped one."""
        index, draw = index if isinstance(index, tuple) else (index, 0)
        file = self._files[index]
        try:
            sample = {"video": read_video(file).frames, "fps": 0.0, "caption": "", "key": str(file), "record": {}}
            return self.reader.crop_sample(sample, np.random.default_rng(draw))
        except BROKEN as error:
            self.broken.meet(str(file), error, len(self))


class WithPictures(Dataset):
    """Clips, each with `pictures` uint8 [count, 3, H, W] beside it, drawn by the clip's draw.

    `pictures` is a data set of samples with one frame. Of a skipped picture's place another takes it.
    """

    def __init__(self, clips: Dataset, pictures: Dataset, count: int):
        if not 1 <= count <= len(pictures):
            raise ValueError(f"{count} pictures for each clip are wanted, the data set has {len(pictures)}")
        self.clips, self.pictures, self.count = clips, pictures, count

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: tuple[int, int]) -> dict | None:
        sample, rng = self.clips[index], np.random.default_rng([index[1], 1])
        if sample is None:
            return None
        taken = []
        for number in rng.permutation(len(self.pictures)):
            picture = self.pictures[int(number), int(rng.integers(2**31))]
            if picture is not None:
                taken.append(picture["video"][:, 0])
            if len(taken) == self.count:
                break
        sizes = {tuple(picture.shape[1:]) for picture in taken}
        if len(sizes) > 1 or len(taken) < self.count:
            raise ValueError(
                f"{len(taken)} pictures of sizes {sorted(sizes)}: they must be {self.count} of one, set a crop"
            )
        return sample | {"pictures": torch.stack(taken)}
