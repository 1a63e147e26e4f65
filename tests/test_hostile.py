"""What people give a sampler without meaning well, or without knowing: pictures, clips, prompts, places.

What test_video and test_request have is not repeated here.
"""

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import made
import numpy as np
import pytest
from PIL import Image
from test_video import BARS, SIDE, chunk, png, ramp, seen

from fvdm_jax import video
from fvdm_jax.commands import parse
from fvdm_jax.program import Refusal

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


def zeros(count: int) -> bytes:
    """So many zero bytes, compressed; a gigabyte is one megabyte."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(count // MIB)) + packer.flush()


def test_16_bits_of_colour_are_scaled_and_not_clipped(tmp_path):
    deep = BARS.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (tmp_path / "a.png").write_bytes(png((SIDE, SIDE), rows, bits=16))
    assert np.abs(seen(tmp_path / "a.png") - BARS).max() <= 1


def test_names_and_kinds_of_jpeg_do_not_matter(tmp_path):
    smooth = np.broadcast_to(np.linspace(20, 230, SIDE).astype(np.uint8)[:, None, None], (SIDE, SIDE, 3))
    for name, options in (("A.JPEG", {"progressive": True}), ("picture", {}), ("a.txt", {"subsampling": 0})):
        Image.fromarray(smooth).save(tmp_path / name, "JPEG", quality=97, **options)
        assert np.abs(seen(tmp_path / name) - smooth).max() <= 4


def test_an_animated_picture_that_is_no_gif_is_its_first_frame(tmp_path):
    frames = [Image.fromarray(frame) for frame in ramp(4, SIDE, SIDE)]
    for name in ("a.png", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        held = video.probe(tmp_path / name)
        assert (held.kind, held.frames) == ("image", 1)
        assert np.abs(seen(tmp_path / name) - np.asarray(frames[0], int)).max() <= 1


def test_a_hidden_colour_does_not_show(tmp_path):
    """Below full transparency lies red: in RGBA, and as the transparent entry of a palette."""
    hidden = np.zeros((SIDE, SIDE, 4), np.uint8)
    hidden[..., 0] = 255
    Image.fromarray(hidden).save(tmp_path / "a.png")
    Image.fromarray(hidden[..., :3]).quantize(2).save(tmp_path / "p.png", transparency=0)
    for name in ("a.png", "p.png"):
        assert seen(tmp_path / name).min() == 255, name


@pytest.mark.parametrize("kind", ["F", "LAB"])
def test_kinds_of_pixels_that_are_not_known_are_refused(tmp_path, kind):
    Image.new(kind, (32, 32)).save(tmp_path / "a.tiff")
    with pytest.raises(Refusal, match=f"pixels of the kind {kind}|damaged"):
        video.probe(tmp_path / "a.tiff")


BMP = struct.pack("<2sIHHI", b"BM", 100, 0, 0, 54) + struct.pack(
    "<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0
)
BOMBS = {
    "30000x30000": lambda: png((30000, 30000), b""),
    "whose pixels are there": lambda: png((30000, 30000), b"")[:-24] + chunk(b"IDAT", zeros(1 << 30)),
    "a BMP of 2^31": lambda: BMP + bytes(64),
    "65500x1": lambda: png((65500, 1), b""),
    "zTXt of a gigabyte": lambda: png(
        (32, 32), bytes(32 * 97), chunk(b"zTXt", b"Comment\0\0" + zeros(1 << 30))
    ),
    "iTXt of a gigabyte": lambda: png(
        (32, 32), bytes(32 * 97), chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros(1 << 30))
    ),
    "iCCP of a gigabyte": lambda: png((32, 32), bytes(32 * 97), chunk(b"iCCP", b"a\0\0" + zeros(1 << 30))),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_takes_no_memory(tmp_path, bomb):
    """Refused, or read without what was packed into it; with less than 100 MiB above the interpreter."""
    (tmp_path / "a.png").write_bytes(bomb())
    code = """
import resource, sys, PIL.Image, PIL.ImageOps, numpy
from fvdm_jax import video
from fvdm_jax.program import Refusal
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try: video.probe(sys.argv[1]); video.read(sys.argv[1], 1, (32, 32)); said = "read"
except Refusal as refusal: said = str(refusal)
print(peak() - before, said)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    used, _, said = done.stdout.strip().partition(" ")
    assert int(used) < 100 * 1024 and not done.stderr, done.stdout
    assert said == "read" or said.startswith("error: ")


SECRET = "file:///etc/passwd"
STRANGERS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
    "eps for dos": b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "concat without a head": b"file '/etc/passwd'\n",
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n" + SECRET.encode(),
    "pls": b"[playlist]\nFile1=" + SECRET.encode(),
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "dash": b"<?xml version='1.0'?><MPD><BaseURL>" + SECRET.encode() + b"</BaseURL></MPD>",
    "a font": b"\0\1\0\0\0\x0f\0\x80\0\3\0\x70DSIG",
    "raw h264": b"\0\0\0\1\x67\x42\xc0\x1e",
}


@pytest.mark.parametrize("content", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_what_names_other_files_is_never_opened(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match="^error: .*; give a PNG"):
        video.probe(tmp_path / name)


PLACES = (
    "https://x/a.png", "rtsp://x/a", "concat:a.mp4|b.mp4", "lavfi:testsrc", "\\\\host\\a.png", "%04d.png",
    "/dev/zero", "/dev/stdin", "/proc/self/mem", ".", "pipe", "a\0b", "n" * 300, "pipe:0", "loop",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    began = time.monotonic()
    with pytest.raises(Refusal) as refused:
        video.probe(place)
    assert str(refused.value).isprintable() and time.monotonic() - began < 1


def test_a_clip_cannot_name_another_file(tmp_path):
    """An mp4 whose data are said to lie in another file (dref): that file is not read."""
    path = tmp_path / "a.mp4"
    video.write_mp4(path, ramp(5), 8)
    content = path.read_bytes()
    at = content.index(b"url \0\0\0\1") - 4
    other = tmp_path / "other"
    other.write_bytes(content)
    name = f"file://{other}".encode() + b"\0"
    entry = struct.pack(">I", 12 + len(name)) + b"url \0\0\0\0" + name
    grown = bytearray(content[:at] + entry + content[at + 12 :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = grown.index(box) - 4
        struct.pack_into(">I", grown, place, struct.unpack_from(">I", grown, place)[0] + len(name))
    # Without its own pixels what is shown could come from the other file alone.
    mdat = grown.index(b"mdat")
    grown[mdat + 4 :] = bytes(len(grown) - mdat - 4)
    path.write_bytes(bytes(grown))
    with pytest.raises(Refusal):
        video.read(path, 5, (SIDE, 64))


@pytest.mark.parametrize("form, codec", [("webm", "libvpx-vp9"), ("mkv", "libx264"), ("mov", "mjpeg")])
def test_containers_odd_sizes_and_changing_rates(tmp_path, form, codec):
    """Frames at 0, 1, 2, 6 and 8 eighths of a second: at 8 a second the third is shown four times."""
    import av

    odd = codec == "libvpx-vp9"
    drawn, path = ramp(5, 47 if odd else 48, 63 if odd else 64), tmp_path / f"a.{form}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 8, options={"bf": "0"} if codec == "libx264" else {})
        stream.height, stream.width = drawn.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for time_shown, pixels in zip((0, 1, 2, 6, 8), drawn, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = time_shown
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    held = video.probe(path)
    assert (held.width, held.height, held.at(8)) == (*drawn.shape[2:0:-1], 9)
    found = video.read(path, 9, (32, 32), fps=8)[:, 16, 16, 0].astype(int)
    assert np.abs(found - drawn[[0, 1, 2, 2, 2, 2, 3, 3, 4], 16, 16, 0]).max() < 12


def test_of_a_long_clip_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    from fvdm_jax import clips

    video.write_mp4(tmp_path / "a.mp4", iter(ramp(600, 32, 32)), 24)
    decoded, rgb = [], clips._rgb
    monkeypatch.setattr(clips, "_rgb", lambda *a: decoded.append(1) or rgb(*a))
    assert len(video.read(tmp_path / "a.mp4", 9, (32, 32), skip=3, fps=24)) == 9
    assert len(decoded) <= 13


def test_a_damaged_packet_is_named_and_not_concealed(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.mp4"
    video.write_mp4(path, rng.integers(0, 255, (17, 64, 64, 3), dtype=np.uint8), 8)
    made.damage(path, 6)
    assert len(video.read(path, 3, (64, 64))) == 3
    with pytest.raises(Refusal, match="frame .* is damaged|cannot be decoded after frame"):
        video.read(path, 17, (64, 64))


PROMPTS = {
    "empty": "", "blank": " \t ", "long": "word " * 2000, "emoji and RTL": "👩‍👩‍👧 שלום عالم \u202eabc",
    "special tokens": "<pad></s><unk> <extra_id_0>", "escapes": "\x1b[31mred\x07", "newlines": "a\nb\r\n",
}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_may_say_anything(here, model, prompt):
    request = parse(["--model", str(model), "--prompt", prompt])
    assert request.prompt == prompt and json.loads(json.dumps(request.settings))["prompt"] == prompt
    with pytest.raises(Refusal) as refused:
        parse(["--model", str(model), "--prompt", prompt, "--keep", f"0={prompt}.png"])
    assert str(refused.value).isprintable()


def test_what_is_no_text_is_refused(here, model):
    for prompt in ("a\0b", "a\udce9b"):
        with pytest.raises(Refusal, match="--prompt: .* is not valid text"):
            parse(["--model", str(model), "--prompt", prompt])
    for content, what in (
        (b"a\xff\xfeb\n", "is not text in UTF-8"),
        (b"a\0b\n", "is not valid text"),
        (b"\n", "0 lines"),
    ):
        Path("p.txt").write_bytes(content)
        with pytest.raises(Refusal, match=what):
            from fvdm_jax.commands import lines

            lines(parse(["--model", str(model), "--prompts", "p.txt"]))


@pytest.mark.parametrize(
    "out", ["/proc/a.mp4", "/dev/full/a.mp4", "n" * 300 + ".mp4", "a.png/b.mp4", ".mp4", "a\0.mp4"]
)
def test_places_that_cannot_be_written_are_refused_beforehand(here, model, out):
    before = sorted(here.iterdir())
    with pytest.raises(Refusal, match="--out"):
        parse(["--model", str(model), "--out", out])
    assert sorted(here.iterdir()) == before
