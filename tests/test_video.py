"""Pictures and clips as people have them: what is read is what a viewer shows, what is no use is refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fvdm_jax import video
from fvdm_jax.program import Refusal

SIDE = 48
BARS = np.zeros((SIDE, SIDE, 3), np.uint8)
BARS[:, :16], BARS[:, 16:32], BARS[:, 32:] = (220, 30, 40), (40, 200, 60), (30, 60, 220)


def ramp(frames: int, height: int = SIDE, width: int = 64) -> np.ndarray:
    """A clip whose every frame has its own brightness."""
    levels = np.linspace(20, 230, frames).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


@pytest.fixture
def picture(tmp_path):
    """Saves a picture under a name and gives the path; whatever Pillow takes for saving."""

    def save(image: Image.Image, name: str, **options) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def seen(path: Path) -> np.ndarray:
    return video.read(path, 1, (SIDE, SIDE))[0].astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.gif", "wrong_name.jpg"])
def test_a_picture_is_what_was_drawn(picture, name):
    options = {"lossless": True} if name == "a.webp" else {"format": "PNG"} if "wrong" in name else {}
    path = picture(Image.fromarray(BARS), name, **options)
    assert video.probe(path).kind == "image" and video.probe(path).frames == 1
    assert np.abs(seen(path) - BARS).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_as_its_exif_says(picture, orientation):
    turns = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6}
    transposes = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    assert set(turns) == set(transposes)
    upright = Image.fromarray(np.concatenate([BARS, BARS[::-1] // 2], 0))
    stored = upright.transpose(transposes[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = picture(stored, "a.jpg", quality=97, exif=exif)
    assert (video.probe(path).width, video.probe(path).height) == upright.size
    found = video.read(path, 1, (2 * SIDE, SIDE))[0].astype(int)
    # JPEG; a wrong turn is off by more than 100.
    assert np.abs(found - np.asarray(upright)).mean() < 6


def test_transparency_lies_on_white(picture):
    image = np.dstack([BARS, np.full((SIDE, SIDE), 255, np.uint8)])
    image[:, :16, 3] = 0
    for mode in ("RGBA", "LA", "P"):
        path = picture(Image.fromarray(image).convert(mode), f"{mode}.png")
        assert seen(path)[:, :14].min() >= 250, mode


def test_16_bits_are_scaled_to_8(picture):
    deep = (np.arange(SIDE) * 65535 // (SIDE - 1)).astype(np.uint16)
    path = picture(Image.fromarray(np.broadcast_to(deep, (SIDE, SIDE)).copy()), "deep.png")
    assert np.abs(seen(path)[0, :, 0] - np.rint(np.linspace(0, 255, SIDE))).max() <= 1


def test_cmyk_and_grey_and_palettes_are_colours(picture):
    assert np.abs(seen(picture(Image.fromarray(BARS).convert("CMYK"), "a.tiff")) - BARS).max() <= 2
    grey = Image.fromarray(BARS).convert("L")
    assert np.abs(seen(picture(grey, "g.png"))[..., 0] - np.asarray(grey, int)).max() <= 1
    assert np.abs(seen(picture(Image.fromarray(BARS).quantize(8), "p.png")) - BARS).max() <= 2
    assert seen(picture(Image.fromarray(BARS[..., 0] > 100), "bit.png"))[0, 0].tolist() == [255, 255, 255]


def profile(*swapped: bytes) -> bytes:
    """sRGB's profile, or one whose primaries are exchanged."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for one, other in zip(swapped[::2], swapped[1::2], strict=True):
        content = content.replace(one, b"....", 1).replace(other, one, 1).replace(b"....", other, 1)
    return content


def test_a_colour_profile_is_applied(picture):
    """What a profile with red and blue exchanged calls red is blue; also in RGBA, as screenshots are."""
    exchanged = profile(b"rXYZ", b"bXYZ")
    for mode in ("RGB", "RGBA"):
        image = Image.fromarray(BARS).convert(mode)
        assert np.abs(seen(picture(image, "s.png", icc_profile=profile())) - BARS).max() <= 1
        found = seen(picture(image, "x.png", icc_profile=exchanged))
        assert np.abs(found - BARS[..., ::-1]).max() <= 3, mode
    broken = picture(Image.fromarray(BARS), "b.png", icc_profile=b"no profile")
    assert np.abs(seen(broken) - BARS).max() <= 1


def test_an_animated_gif_is_a_clip(picture):
    frames = [Image.fromarray(frame) for frame in ramp(6)]
    path = picture(frames[0], "a.gif", save_all=True, append_images=frames[1:], duration=50)
    assert video.probe(path)[:1] == ("gif",) and video.probe(path).frames == 6
    found = video.read(path, 4, (SIDE, SIDE), skip=2)
    assert np.abs(found[:, 0, 0, 0].astype(int) - ramp(6)[2:, 0, 0, 0]).max() <= 3


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], rows: bytes, *chunks: bytes, bits: int = 8, kind: int = 2) -> bytes:
    """One that promises so many pixels, whatever rows it holds."""
    told = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", told), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


STRANGERS = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "is neither an image nor a video"),
    "web page": (b"<!DOCTYPE html><html>", "is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG"),
    "pdf": (b"%PDF-1.7", "is a PDF"),
    "heic": (b"\0\0\0\x18ftypheic", "is a HEIC"),
    "zip": (b"PK\x03\x04", "is an archive"),
    "playlist": (b"#EXTM3U\nfile:///etc/passwd", "is a playlist"),
    "a bomb": (png((30000, 30000), b""), "50 million pixels"),
    "a large one": (png((9000, 9000), b""), "50 million pixels|9000x9000"),
    "a tiny one": (png((8, 8), b""), "is 8x8 pixels"),
    "no pixels": (png((64, 64), b""), "damaged"),
    "a torn header": (png((64, 64), b"")[:20], "damaged"),
}


@pytest.mark.parametrize("content, what", STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_picture_is_refused(tmp_path, content, what):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(Refusal, match=what):
        video.probe(path)
        video.read(path, 1, (SIDE, SIDE))


def test_a_cut_photograph_is_refused(picture):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png", "a.webp"):
        path = picture(Image.fromarray(noise), name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(Refusal, match="damaged|cut short"):
            video.probe(path)


def test_an_mp4_comes_back_frame_by_frame(tmp_path):
    path, clip = tmp_path / "a.mp4", ramp(21)
    video.write_mp4(path, clip, 16, "a comment")
    assert video.probe(path)[:5] == ("video", "mov", 64, SIDE, 21)
    found = video.read(path, 17, (SIDE, 64), skip=3)
    # H.264 at crf 16 in 8-bit video range.
    assert np.abs(found[..., 0].mean((1, 2)) - clip[3:20, 0, 0, 0]).max() < 2
    assert np.abs(found.astype(int) - clip[3:20]).max() < 6


def test_a_trimmed_clip_is_what_a_player_shows(tmp_path):
    """Telephones trim by an edit list that skips frames which stay in the file."""
    path, clip = tmp_path / "a.mp4", ramp(30)
    video.write_mp4(path, clip, 10)
    content = bytearray(path.read_bytes())
    # After the name: version and flags, a count, then the duration in 1/1000 s and the start.
    duration, start = (content.index(b"elst") + offset for offset in (12, 16))
    scale = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    struct.pack_into(">I", content, duration, 2000)
    struct.pack_into(">I", content, start, struct.unpack_from(">I", content, start)[0] + scale)
    path.write_bytes(content)
    assert video.probe(path).frames == 20
    found = video.read(path, 20, (SIDE, 64))
    assert np.abs(found[..., 0].mean((1, 2)) - clip[10:, 0, 0, 0]).max() < 2


def test_a_rotated_clip_stands_upright(tmp_path):
    """The display matrix in the header of the track, as telephones write it: a quarter turn."""
    path, wide = tmp_path / "a.mp4", np.broadcast_to(np.hstack([BARS, BARS // 2]), (5, SIDE, 2 * SIDE, 3))
    video.write_mp4(path, wide, 10)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    struct.pack_into(">9i", content, matrix, 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    found = video.read(path, 1, (2 * SIDE, SIDE))[0].astype(int)
    upright = np.rot90(wide[0], -1)
    assert np.abs(found - upright)[4:-4, 4:-4].mean() < 8


def test_colours_survive_an_mp4(tmp_path):
    video.write_mp4(tmp_path / "a.mp4", np.broadcast_to(BARS, (5, *BARS.shape)), 16)
    found = video.read(tmp_path / "a.mp4", 1, (SIDE, SIDE))[0].astype(int)
    # Within the bars; chroma has half the resolution.
    assert np.abs(found - BARS)[:, [4, 8, 20, 26, 38, 44]].max() < 8


def test_the_same_pixels_are_the_same_file(tmp_path):
    """x264 alone is not so sure: with its macroblock tree one file in ten differs."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    smooth = noise // 2 + ramp(9, 32, 48) // 2
    files = set()
    for _ in range(40):
        video.write_mp4(tmp_path / "a.mp4", smooth, 8, "a comment")
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_an_mp4_is_what_players_want(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    video.write_mp4(path, ramp(9), 24, "a comment")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 24)
        assert container.metadata["comment"] == "a comment"
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the header must come first"


def test_a_gif_comes_back(tmp_path):
    video.write_gif(tmp_path / "a.gif", ramp(9), 16)
    assert video.probe(tmp_path / "a.gif").frames == 9
    found = video.read(tmp_path / "a.gif", 9, (SIDE, 64))
    assert np.abs(found.astype(int) - ramp(9)).mean() < 6
    with Image.open(tmp_path / "a.gif") as image:
        durations = []
        for frame in range(9):
            image.seek(frame)
            durations.append(image.info["duration"])
    assert abs(sum(durations) - 9 * 1000 / 16) <= 10


def test_clips_that_are_no_use_are_refused(tmp_path):
    path = tmp_path / "a.mp4"
    video.write_mp4(path, np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), dtype=np.uint8), 16)
    with pytest.raises(Refusal, match="25 frames needed, 17 found"):
        video.read(path, 20, (SIDE, SIDE), skip=5)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(Refusal, match="cut short"):
        video.probe(path)
    path.write_bytes(content[:24])
    with pytest.raises(Refusal, match="damaged|cut short"):
        video.probe(path)


def test_a_file_with_sound_only_is_refused(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", 44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    with pytest.raises(Refusal, match="has no pictures"):
        video.probe(tmp_path / "a.mp4")


def test_a_picture_covers_the_size_and_is_cropped(picture):
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = BARS
    assert np.abs(seen(picture(Image.fromarray(wide), "a.png")) - BARS).max() <= 1
    found = video.read(picture(Image.fromarray(BARS), "b.png"), 1, (4 * SIDE, 4 * SIDE))
    assert found.shape == (1, 4 * SIDE, 4 * SIDE, 3)


def test_pixels_and_unit_are_inverse():
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(video.to_pixels(video.to_unit(every)), every)
    assert video.to_unit(every)[[0, 255]].tolist() == [-1, 1]
    assert video.to_pixels(np.array([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="not finite"):
        video.to_pixels(np.array([0.0, np.nan]))


def test_the_contact_sheet_shows_every_frame_and_what_was_kept():
    sheet = np.asarray(video.contact_sheet(ramp(9), columns=9, strength=[0, 1, 0.5]))
    assert sheet.ndim == 3 and sheet.shape[1] > 9 * 64
    kept = (sheet == np.array(video.KEPT, np.uint8)).all(-1)
    columns = np.flatnonzero(kept.any(0)) * 9 // sheet.shape[1]
    assert set(columns.tolist()) == {0, 5, 6, 7, 8}, "frame 0 was kept, 1 to 4 generated, 5 to 8 loosened"
    with pytest.raises(ValueError, match="give uint8"):
        video.contact_sheet(ramp(3).astype(np.float32))
