"""Reading and writing of videos, on files made here: rates, rotation, sizes, ends, damage, metadata."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_hf.data import video
from cosmos_hf.data.video import (
    contact_sheet,
    count_frames,
    read_metadata,
    read_video,
    stream_video,
    to_float,
    to_uint8,
    write_video,
)

STEP = 7  # grey levels from one frame to the next


def numbered(count, height=32, width=48):
    """Frames whose grey level tells their number."""
    levels = torch.arange(count, dtype=torch.uint8) * STEP + 8
    return levels.view(1, -1, 1, 1).expand(3, count, height, width).contiguous()


def numbers(clip):
    return [round((float(frame.float().mean()) - 8) / STEP) for frame in clip.frames.unbind(1)]


def write_stamped(path, stamps, time_base, codec="libx264", rotation=None, aspect=None, frames=None):
    """A file with the given time stamps (in `time_base`)."""
    frames = numbered(len(stamps)) if frames is None else frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], "yuv420p"
        stream.codec_context.time_base = time_base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for stamp, array in zip(stamps, frames.permute(1, 2, 3, 0).numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = stamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_round_trip(tmp_path):
    colours = torch.tensor([[200, 30, 40], [20, 180, 60], [30, 40, 220]], dtype=torch.uint8)
    frames = colours.t().reshape(3, 3, 1, 1).expand(3, 3, 32, 48).contiguous()
    clip = read_video(write_video(tmp_path / "deep" / "clip.mp4", frames, 5))
    assert clip.frames.shape == (3, 3, 32, 48) and clip.frames.dtype == torch.uint8 and clip.fps == 5
    assert (clip.frames.int() - frames.int()).abs().max() <= 6  # colours survive 4:2:0 and crf 18
    assert clip.source["source_size"] == [32, 48] and clip.source["path"].endswith("clip.mp4")


def test_odd_sizes_are_padded_by_their_edge(tmp_path):
    clip = read_video(write_video(tmp_path / "odd.mp4", numbered(3, 33, 47), 5))
    assert clip.frames.shape == (3, 3, 34, 48) and numbers(clip) == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("rate", [10, Fraction(30000, 1001)])
def test_own_rate_keeps_every_frame_once(tmp_path, suffix, rate):
    """Also where the container rounds time stamps to milliseconds (mkv)."""
    frames = numbered(30)
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for array in frames.permute(1, 2, 3, 0).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
        container.mux(stream.encode())
    assert numbers(read_video(path)) == list(range(30))
    assert count_frames(path) == (30, float(rate))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(5, [0, 2, 4, 6, 8]), (20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]), (4, [0, 2, 5, 7])],
)
def test_resampling(tmp_path, fps, expected):
    path = write_video(tmp_path / "clip.mp4", numbered(10), 10)
    clip = read_video(path, fps=fps)
    assert numbers(clip) == expected and clip.fps == fps and count_frames(path, fps) == (len(expected), fps)
    assert [round((float(np.asarray(p).mean()) - 8) / STEP) for _, p in stream_video(path, fps)] == expected
    assert {rate for rate, _ in stream_video(path, fps)} == {fps}


def test_variable_frame_rate_follows_the_time_stamps(tmp_path):
    stamps = [0, 100, 150, 200, 600, 1000]  # milliseconds
    path = write_stamped(tmp_path / "phone.mp4", stamps, Fraction(1, 1000))
    assert numbers(read_video(path, fps=10)) == [0, 1, 3, 3, 3, 3, 4, 4, 4, 4, 5]


def test_window_from_start_and_from_end(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(20), 10)
    assert numbers(read_video(path, num_frames=3)) == [0, 1, 2]
    assert numbers(read_video(path, num_frames=3, start=0.5)) == [5, 6, 7]
    assert numbers(read_video(path, num_frames=3, fps=5, from_end=True)) == [15, 17, 19]
    assert numbers(read_video(path, num_frames=20, from_end=True)) == list(range(20))


def test_long_files_are_searched_not_decoded(tmp_path, monkeypatch):
    """A window late in the file: the right frames, and only those since the last key frame are decoded."""
    frames = numbered(31, 16, 16)[:, torch.arange(2400) % 31]
    path = write_video(tmp_path / "long.mp4", frames, 10)
    decoded, original = [], video._decoded

    def counting(container, name):
        for frame in original(container, name):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decoded", counting)
    assert numbers(read_video(path, num_frames=3, start=200.0)) == [2000 % 31, 2001 % 31, 2002 % 31]
    assert numbers(read_video(path, num_frames=2, from_end=True)) == [2398 % 31, 2399 % 31]
    assert len(decoded) < 600


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_phone_rotation_is_undone(tmp_path, degrees):
    """`set_display_rotation` says by how much a player turns the picture, counter-clockwise."""
    frames = torch.full((3, 2, 32, 64), 16, dtype=torch.uint8)
    frames[:, :, :, 32:] = 235  # bright on the right
    path = write_stamped(tmp_path / "phone.mp4", [0, 1], Fraction(1, 10), rotation=degrees, frames=frames)
    read = read_video(path).frames.float().mean((0, 1))
    if degrees == 180:
        assert read.shape == (32, 64) and read[:, :28].mean() > 200
    else:
        assert read.shape == (64, 32)
        top_is_bright = read[:28].mean() > read[36:].mean()
        assert top_is_bright == (degrees == 90)


def test_pixels_that_are_not_square(tmp_path):
    path = write_stamped(tmp_path / "dv.mp4", [0, 1], Fraction(1, 10), aspect=Fraction(2, 1))
    assert read_video(path).frames.shape == (3, 2, 32, 96)


def test_covering_centre_crop_is_antialiased(tmp_path):
    frames = torch.zeros(3, 2, 64, 128, dtype=torch.uint8)
    frames[:, :, :, 32:96] = 200  # the centre square
    path = write_video(tmp_path / "wide.mp4", frames, 5)
    clip = read_video(path, height=16, width=16)
    assert clip.frames.shape == (3, 2, 16, 16) and clip.frames[..., 1:-1].float().mean() > 190
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert (read_video(stripes, height=16, width=16).frames[..., 2:-2].float() - 127.5).abs().max() < 20


def test_images_are_one_frame(tmp_path):
    picture = Image.fromarray(np.full((20, 30, 3), 77, np.uint8))
    picture.save(tmp_path / "still.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.convert("L").save(tmp_path / "grey.jpg", exif=exif)
    assert read_video(tmp_path / "still.png").frames.shape == (3, 1, 20, 30)
    assert read_video(tmp_path / "grey.jpg").frames.shape == (3, 1, 30, 20)
    assert read_video(tmp_path / "still.png").fps is None
    with pytest.raises(ValueError, match=r"still.png has 1 frame, 5 are needed"):
        read_video(tmp_path / "still.png", num_frames=5)
    with pytest.raises(ValueError, match="broken.png is not an image"):
        (tmp_path / "broken.png").write_bytes(b"no picture")
        read_video(tmp_path / "broken.png")


def test_animated_gif(tmp_path):
    pictures = [Image.new("L", (24, 16), 20 * i) for i in range(4)]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=200)
    clip = read_video(tmp_path / "clip.gif")
    assert clip.frames.shape == (3, 4, 16, 24) and clip.fps == 5


def test_from_memory():
    frames = numbered(4)
    arrays = frames.permute(1, 2, 3, 0).numpy()
    for form in (frames, to_float(frames), arrays, [Image.fromarray(a) for a in arrays]):
        clip = read_video(form, fps=5)
        assert torch.equal(clip.frames, frames) and clip.fps == 5
        assert numbers(read_video(form, num_frames=2, from_end=True)) == [2, 3]
    assert read_video(Image.fromarray(arrays[0])).frames.shape == (3, 1, 32, 48)
    buffer = io.BytesIO()
    Image.fromarray(arrays[0]).save(buffer, "gif")
    assert read_video(buffer.getvalue()).frames.shape == (3, 1, 32, 48)
    assert torch.equal(to_uint8(to_float(torch.arange(256, dtype=torch.uint8))), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.zeros(3, 4, 8), {}, r"must be \[3, T, H, W\]"),
        (torch.full((3, 1, 8, 8), 2.0), {}, r"lie in \[-1, 1\]"),
        (torch.full((3, 1, 8, 8), float("nan")), {}, r"lie in \[-1, 1\]"),
        (np.zeros((4, 8, 8, 3)), {}, "must be uint8"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], {}, "differ in size"),
        ([], {}, "got list"),
        (7, {}, "got int"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"num_frames": 5}, "has 4 frames, 5 are needed"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"start": 1.0}, "cut the list"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"num_frames": 0}, "num_frames must be positive"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"height": 8}, "height and width together"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"from_end": True}, "from_end needs num_frames"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"fps": -1}, "fps must be positive"),
    ],
)
def test_unfit_input_is_refused(given, options, message):
    with pytest.raises(ValueError, match=message):
        read_video(given, **options)


def test_files_that_are_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing.mp4"):
        read_video(tmp_path / "nothing.mp4")
    with pytest.raises(FileNotFoundError, match=r"nothing.mp4"):
        read_metadata(tmp_path / "nothing.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text.mp4 is not a video that PyAV reads"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="is not a video that PyAV reads"):
        read_video(tmp_path)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound.mp4 has no video stream"):
        read_video(tmp_path / "sound.mp4")


def test_too_short_and_cut_off(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(10), 10)
    for options in ({}, {"from_end": True}):
        with pytest.raises(ValueError, match=r"clip.mp4 has 5 frames at 5 fps, 9 are needed: give a longer video"):
            read_video(path, num_frames=9, fps=5, **options)
    with pytest.raises(ValueError, match=r"has 2 frames at 10 fps after 0.8 s, 9 are needed"):
        read_video(path, num_frames=9, start=0.8)
    with pytest.raises(ValueError, match="holds no frame"):
        read_video(path, start=3.0)
    (tmp_path / "half.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half.mp4"):
        read_video(tmp_path / "half.mp4")


def test_metadata(tmp_path):
    told = {"prompt": 'a "red" cube\nfalls — ünïcode', "seed": 7, "versions": {"torch": "2"}}
    assert read_metadata(write_video(tmp_path / "a.mp4", numbered(2), 5, told)) == told
    assert read_metadata(write_video(tmp_path / "b.mp4", numbered(2), 5)) == {}
    assert read_metadata(write_stamped(tmp_path / "c.mp4", [0, 1], Fraction(1, 10))) == {}
    with pytest.raises(ValueError, match="must be uint8"):
        write_video(tmp_path / "d.mp4", numbered(2).float(), 5)
    with pytest.raises(ValueError, match="not empty"):
        write_video(tmp_path / "d.mp4", numbered(2)[:, :0], 5)
    with pytest.raises(ValueError, match="fps must be positive"):
        write_video(tmp_path / "d.mp4", numbered(2), 0)


def test_contact_sheet():
    sheet = contact_sheet({"input": numbered(2), "generated": numbered(4)}, columns=["0.0 s", "0.2 s"], scale=2)
    pixels = np.asarray(sheet)
    assert sheet.width >= 4 * 96 and sheet.height >= 2 * 64
    for level in (8, 8 + STEP, 8 + 3 * STEP):  # every frame is on it, the fourth once
        assert (pixels == level).all(-1).sum() >= 64 * 96
    with pytest.raises(ValueError, match="one frame size"):
        contact_sheet({"a": numbered(2), "b": numbered(2, 16, 16)})
