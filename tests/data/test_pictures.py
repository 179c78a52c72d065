"""Pictures as clips of one frame, alone and beside clips."""

import pytest
import torch
from PIL import Image

from cosmos_hf.data.clips import collate_clips
from cosmos_hf.data.pictures import PictureDataset, WithPictures, find_pictures


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        Image.new("RGB", (40 + i, 30), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


class Clips:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"video": torch.zeros(3, 5, 16, 16, dtype=torch.uint8), "fps": 5.0, "key": str(index)}


def test_a_picture_is_a_clip_of_one_frame(folder):
    whole = PictureDataset(folder, random=False)
    assert len(whole) == 5 and whole[3]["video"].shape == (3, 1, 30, 43)
    assert whole[3]["video"][0].unique().tolist() == [120] and whole[3]["key"].endswith("3.png")
    batch = collate_clips([PictureDataset(folder, crop=(16, 24))[i, 7] for i in range(3)])
    assert batch["video"].shape == (3, 3, 1, 16, 24)


def test_crops_follow_the_draw(folder):
    ramp = torch.arange(60, dtype=torch.uint8).expand(40, -1).contiguous().numpy()
    Image.fromarray(ramp).save(folder / "ramp.png")
    pictures = PictureDataset(folder / "ramp.png", crop=(16, 16))
    firsts = {int(pictures[0, draw]["video"][0, 0, 0, 0]) for draw in range(8)}
    assert len(firsts) > 3 and torch.equal(pictures[0, 3]["video"], pictures[0, 3]["video"])


def test_pictures_beside_clips(folder):
    joint = WithPictures(Clips(), PictureDataset(folder, crop=(16, 16)), 3)
    batch = collate_clips([joint[0, 1], joint[1, 2]])
    assert batch["pictures"].shape == (2, 3, 3, 16, 16) and batch["video"].shape == (2, 3, 5, 16, 16)
    reds = [set(sample[:, 0, 0, 0].tolist()) for sample in batch["pictures"]]
    assert all(len(red) == 3 for red in reds)  # three different ones
    assert torch.equal(joint[0, 1]["pictures"], batch["pictures"][0])


def test_broken_pictures_follow_the_policy(folder):
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"sample '.*broken.png' is broken"):
        PictureDataset(folder)[5]
    skipping = PictureDataset(folder, crop=(16, 16), on_broken="skip")
    assert skipping[5] is None
    joint = WithPictures(Clips(), skipping, 5)
    assert joint[0, 1]["pictures"].shape == (5, 3, 16, 16)
    with pytest.raises(ValueError, match="sample .* frames of 30x40 are smaller than the crop 64x64"):
        PictureDataset(folder, crop=(64, 64))[0]


def test_mistakes_are_refused(folder, tmp_path):
    assert len(find_pictures(folder)) == 5
    (folder / "clip.mp4").touch()
    assert find_pictures(folder) == []
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        PictureDataset(folder)
    (folder / "clip.mp4").unlink()
    with pytest.raises(ValueError, match="6 pictures for each clip are wanted, the data set has 5"):
        WithPictures(Clips(), PictureDataset(folder), 6)
    with pytest.raises(ValueError, match="of sizes .* set a crop"):
        WithPictures(Clips(), PictureDataset(folder), 2)[0, 0]
