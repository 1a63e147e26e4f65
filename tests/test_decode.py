"""Clips at whatever rate and size they come."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fvdm_jax import video
from fvdm_jax.program import Refusal

SIDE = 48


def written(path, times, size=(SIDE, SIDE)):
    """An mp4 whose frame i is grey of brightness 10·i, shown from times[i] milliseconds on."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if size[0] % 2 else "libx264", 1000)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            grey = np.full((*size[::-1], 3), 10 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def seen_at(path, fps: float) -> list[int]:
    """Which of the frames of `written` are read at this rate, all that there are."""
    count = video.probe(path).at(fps)
    pixels = video.read(path, count, (SIDE, SIDE), fps=fps)
    with pytest.raises(Refusal, match=f"{count + 1} frames needed, {count} found"):
        video.read(path, count + 1, (SIDE, SIDE), fps=fps)
    return np.rint(pixels.mean((1, 2, 3)) / 10).astype(int).tolist()


def test_a_clip_is_read_at_the_rate_asked_for(tmp_path):
    even = written(tmp_path / "even.mp4", range(0, 800, 40))
    assert video.probe(even).frames == 20 and seen_at(even, 25) == list(range(20))
    assert seen_at(even, 12.5) == list(range(0, 20, 2))
    assert seen_at(even, 50) == [i // 2 for i in range(39)]
    assert seen_at(even, 10) == [0, 2, 5, 7, 10, 12, 15, 17]


def test_a_variable_rate_is_followed(tmp_path):
    """As phones write: a frame stands until the next one comes."""
    path = written(tmp_path / "phone.mp4", [0, 100, 500, 520, 540, 1000])
    assert seen_at(path, 10) == [0, 1, 1, 1, 1, 2, 4, 4, 4, 4, 5]
    assert video.read(path, 6, (SIDE, SIDE)).shape[0] == 6


def test_an_avi_is_read_in_its_order(tmp_path):
    """With frames that look ahead its clock says when they are decoded, not when they are shown."""
    import av

    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("libx264", 25, options={"bf": "3", "b-adapt": "0"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for index in range(20):
            grey = np.full((SIDE, SIDE, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    assert seen_at(tmp_path / "a.avi", 25) == list(range(20))


@pytest.mark.parametrize("fps", [7, 12, 23.976, 25, 29.97, 50, 60])
def test_as_many_frames_are_read_as_are_promised(tmp_path, fps):
    """Clocks of whole milliseconds, as of Matroska, at rates that do not divide them."""
    for count in (2, 18, 24):
        path = written(tmp_path / f"{count}.mp4", [round(1000 * i / 30) for i in range(count)])
        assert len(seen_at(path, fps)) == video.probe(path).at(fps)


def test_a_clip_of_days_is_refused(tmp_path):
    path = written(tmp_path / "a.mkv", [0, 40, 80, 10**9])
    with pytest.raises(Refusal, match="lasts 278 hours"):
        video.probe(path)


def test_a_gif_is_read_at_the_rate_asked_for(tmp_path):
    frames = [Image.new("RGB", (SIDE, SIDE), (40 * i,) * 3) for i in range(4)]
    options = {"save_all": True, "append_images": frames[1:], "duration": [100, 300, 100, 100]}
    path = tmp_path / "a.gif"
    frames[0].save(path, **options)
    count = video.probe(path).at(10)
    assert count == 6
    brightness = video.read(path, count, (SIDE, SIDE), fps=10).mean((1, 2, 3)) / 40
    assert np.rint(brightness).astype(int).tolist() == [0, 1, 1, 1, 2, 3]


def test_odd_sides_are_no_matter(tmp_path):
    path = written(tmp_path / "odd.mp4", range(0, 400, 40), (SIDE + 1, SIDE - 3))
    assert video.probe(path)[2:4] == (SIDE + 1, SIDE - 3)
    assert video.read(path, 9, (32, 48)).shape == (9, 32, 48, 3)
    Image.new("RGB", (77, 33)).save(tmp_path / "odd.png")
    assert video.read(tmp_path / "odd.png", 1, (16, 32)).shape == (1, 16, 32, 3)


def test_a_clip_without_frames_is_refused(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mkv"), "w", format="matroska") as container:
        container.add_stream("libx264", 24, width=64, height=64).pix_fmt = "yuv420p"
        container.start_encoding()
    with pytest.raises(Refusal, match="cut short .End of file"):
        video.probe(tmp_path / "a.mkv")
