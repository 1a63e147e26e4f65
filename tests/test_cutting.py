"""What is taken of each clip, and what cannot be used."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from made import clip, damage, moving, pictures
from PIL import Image
from test_corpus import captions
from test_decode import written

from fvdm_jax import video
from fvdm_jax.data.corpus import find
from fvdm_jax.data.cutting import (
    Cut,
    centring,
    file_of,
    key,
    named,
    nearest,
    read,
    report,
    rows,
    summary,
    windows,
)
from fvdm_jax.program import Refusal

CUT = Cut((9, 5), ((32, 48), (48, 32)), 8.0)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    """The tests run in an empty folder with a folder of clips."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()


def looked(cut: Cut = CUT, **options) -> dict:
    """What becomes of each file in the folder of clips, by its name."""
    return {row.source.path.name: row for row in rows(find([Path("clips")], **options), cut)}


def test_the_report_says_of_each_file_what_becomes_of_it():
    clip("a.mp4", 30)
    clip("größe ü.mp4", 12, 16, height=64, width=48)
    clip("odd.mp4", 9, height=50, width=46)
    clip("short.mp4", 4)
    clip("silent.mp4", caption=None)
    clip("twice.mp4", 30)
    whole = Path("clips/a.mp4").read_bytes()
    Path("clips/cut.mp4").write_bytes(whole[: len(whole) // 2])
    Path("clips/web.mp4").write_text("<html>not found</html>")
    Path("clips/old.flv").write_bytes(b"FLV\1\5\0\0\0")
    video.write_gif(Path("clips/g.gif"), moving(11), 10)
    Path("clips/g.txt").write_text("a gif")
    Image.fromarray(moving(1)[0]).save("clips/thumb.png")
    cut = Cut((9, 5), ((32, 48), (48, 32)), 8.0, most=None)
    found = list(rows(find([Path("clips")]), cut))
    assert [len(row.clips) + bool(row.reason) for row in found if row.reason] == [1] * 7
    lines = {line.split("  ")[0]: line for line in report(found).splitlines()}
    expected = {
        "clips/a.mp4": ["30  48x64", "3 × 9x32x48"],
        "clips/größe ü.mp4": ["6  64x48", "5x48x32"],
        "clips/g.gif": ["9  48x64", "9x32x48"],
        "clips/odd.mp4": ["9  50x46", "9x48x32"],
        "clips/short.mp4": ["4  48x64", "is too short: 4 frames at 8 a second, 5 are the least"],
        "clips/silent.mp4": ["has no caption"],
        "clips/twice.mp4": ["is the same as clips/a.mp4, with the same caption"],
        "clips/cut.mp4": ["is cut short"],
        "clips/web.mp4": ["is a web page"],
        "clips/old.flv": ["is neither an image nor a video"],
        "clips/thumb.png": ["is a single picture; --images"],
    }
    assert lines.keys() == {"file", *expected}
    for name, words in expected.items():
        assert all(word in lines[name] for word in words), lines[name]
    assert summary(found).splitlines() == [
        "11 files: 6 clips of 4, none of 7",
        "         9x48x32  1", "         9x32x48  4", "         5x48x32  1",
    ]  # fmt: skip


def test_windows_take_the_longest_that_fits_one_after_the_other():
    assert windows(200, (81, 49, 25), None) == [(0, 81), (81, 81), (162, 25)]
    assert windows(200, (25, 49, 81), 2) == [(0, 81), (81, 81)] and windows(60, (81, 49, 25)) == [(0, 49)]
    assert windows(24, (81, 49, 25), None) == [] and windows(162, (81,), None) == [(0, 81), (81, 81)]


def test_the_nearest_shape_is_taken():
    sizes = ((480, 832), (832, 480), (624, 624))
    assert nearest((1080, 1920), sizes) == (480, 832) and nearest((1920, 1080), sizes) == (832, 480)
    assert nearest((900, 1000), sizes) == (624, 624) and nearest((720, 1080), sizes) == (480, 832)


def test_windows_of_a_clip_are_what_video_reads():
    clip("a.mp4", 40, 16)
    (row,) = looked(Cut((9,), ((32, 48),), 8.0, most=None)).values()
    assert [(c.skip, c.frames) for c in row.clips] == [(0, 9), (9, 9)]
    assert [c.name.rpartition("/")[2] for c in row.clips] == ["a.mp4#0-8", "a.mp4#9-17"]
    for one, pixels in zip(row.clips, read(row.clips, CUT), strict=True):
        assert np.array_equal(pixels, video.read("clips/a.mp4", 9, (32, 48), one.skip, 8.0))
    # Also when what lies before has been encoded already.
    (last,) = read(row.clips[1:], CUT)
    assert np.array_equal(last, video.read("clips/a.mp4", 9, (32, 48), 9, 8.0))


def test_a_variable_rate_is_followed():
    """A frame stands until the next one comes, whatever the file's rate is on average."""
    written("clips/a.mp4", [0, 125, 600, 625, 700, 1000], (48, 32))
    row = looked(caption="it stands")["a.mp4"]
    (pixels,) = read(row.clips, CUT)
    assert row.frames == 9 and np.rint(pixels.mean((1, 2, 3)) / 10).tolist() == [0, 1, 1, 1, 1, 3, 4, 4, 5]


def test_a_rotated_clip_goes_to_the_bucket_of_its_shape():
    path = clip("a.mp4", 5, height=32, width=64)
    content = bytearray(path.read_bytes())
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    row = looked()["a.mp4"]
    assert row.size == (64, 32) and row.clips[0].bucket == (5, 48, 32)


def test_numbered_pictures_are_a_clip():
    drawn = pictures("clips/s", range(8, 13))
    Path("clips/s.txt").write_text("numbers")
    cut = Cut((5,), ((32, 48),), 8.0, fps_in=8.0)
    row = looked(cut)["s"]
    assert row.source.caption == "numbers" and not row.reason
    (pixels,) = read(row.clips, cut)
    assert np.array_equal(pixels, np.stack(drawn))
    half = Cut((5,), ((32, 48),), 16.0, fps_in=8.0)
    (pixels,) = read(looked(half)["s"].clips, half)
    assert np.array_equal(pixels, np.stack(drawn)[[0, 0, 1, 1, 2]])
    assert "say it with --fps-in" in looked()["s"].reason
    os.remove("clips/s/f10.png")
    assert "has no picture 10" in looked(cut)["s"].reason
    Image.fromarray(drawn[0]).save("clips/s/f010.png")
    Image.fromarray(drawn[0]).save("clips/s/f10.png")
    assert "has two pictures of number 10" in looked(cut)["s"].reason


def test_pictures_with_captions_of_their_own_are_single():
    pictures("clips/s", range(3))
    Path("clips/s/f1.txt").write_text("one")
    assert list(captions("clips").values()) == [None, "one", None]
    images = Cut((5,), ((32, 48),), 8.0, images=True)
    row = looked(images)["f1.png"]
    assert row.clips[0].bucket == (1, 32, 48) and row.frames == 1
    (pixels,) = read(row.clips, images)
    assert np.array_equal(pixels, video.read("clips/s/f1.png", 1, (32, 48)))
    # One that the user names needs no flag, and folders can be said to hold no frames.
    (asked,) = rows(find([Path("clips/s/f1.png")]), CUT)
    assert len(asked.clips) == 1
    os.remove("clips/s/f1.txt")
    assert len(captions("clips")) == 1 and len(captions("clips", sequences=False)) == 3
    Path("clips/t.csv").write_text("file,text\ns,a folder of no frames\n")
    assert (
        "is a folder"
        in {r.source.path.name: r.reason for r in rows(find([Path("clips")], None, False), CUT)}["s"]
    )


def test_a_random_crop_is_the_same_for_the_same_frames():
    clip("a.mp4", 20, height=32, width=96)
    cut = Cut((9,), ((32, 48),), 8.0, None, "random")
    row = looked(cut)["a.mp4"]
    places = [centring(c, cut) for c in row.clips]
    assert len(set(places)) == 2 and all(0 <= p <= 1 for place in places for p in place)
    left = int((96 - 48) * places[0][0] + 0.5)
    first = next(read(row.clips, cut))
    whole = video.read("clips/a.mp4", 9, (32, 96), 0, 8.0)
    assert np.abs(first.astype(int) - whole[:, :, left : left + 48]).mean() < 12
    os.rename("clips/a.mp4", "clips/b.mp4")
    again = looked(cut, caption="other")["b.mp4"]
    assert [centring(c, cut) for c in again.clips] == places
    assert centring(row.clips[0], CUT) == (0.5, 0.5)


def test_a_key_follows_from_all_that_a_record_does_and_from_nothing_else():
    clip("a.mp4", 20)
    cut = Cut((9,), ((32, 48),), 8.0, None)
    first, second = looked(cut)["a.mp4"].clips
    told = first.source._replace(caption="something else")
    others = [
        key(second, cut), key(first, cut, "bfloat16"), key(first._replace(size=(48, 32)), cut),
        key(first._replace(content="0" * 64), cut), key(first._replace(source=told), cut),
        key(first, Cut((9,), ((32, 48),), 8.0, None, "random")),
        key(first, Cut((9,), ((32, 48),), 9.0, None)),
    ]  # fmt: skip
    assert len({key(first, cut), *others}) == 1 + len(others)
    os.rename("clips", "moved")
    (row,) = rows(find([Path("moved/a.mp4")], "it moves"), Cut((9,), ((32, 48), (5, 5)), 8.0))
    assert key(row.clips[0], cut) == key(first, cut)


def test_a_record_is_known_by_the_name_of_its_file():
    files = {"/a.mp4", "/b#0-8"}
    assert file_of("/a.mp4", files) == file_of("/a.mp4#9-17", files) == "/a.mp4"
    assert file_of("/b#0-8", files) == file_of("/b#0-8#0-8", files) == "/b#0-8"
    assert file_of("/c.mp4", files) is None and file_of("/b", files) is None


def test_names_that_are_no_text_are_found():
    clip("a.mp4")
    try:
        os.rename(b"clips/a.mp4", b"clips/\xff.mp4")
    except OSError:
        pytest.skip("the file system takes no such name")
    (row,) = rows(find([Path("clips")], "x"), CUT)
    assert named(row.source).endswith("clips/?.mp4") and len(row.clips) == 1
    json.dumps(named(row.source)).encode("utf-8")
    assert "clips" in report([row])


def test_a_file_that_is_damaged_is_refused_when_it_is_read():
    path = clip("a.mp4", 30)
    damage(path, 4)
    row = looked()["a.mp4"]
    assert row.clips
    with pytest.raises(Refusal, match="a.mp4: .*(damaged|decoded)"):
        list(read(row.clips, CUT))
