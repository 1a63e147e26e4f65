"""What a file of pictures is, and its pictures one by one, as upright RGB images.

What a file is, is read from its first bytes; its name says nothing. Only the decoder of that one format is
ever called, and nothing reaches the network or another file. Of an image: EXIF orientation and colour
profile are applied, transparency lies on white, 16 bits are scaled to 8, an animated PNG or WebP gives its
first frame.
Of a clip: all its frames, or those that are shown at a rate asked for; an animated GIF is a clip.
"""

import contextlib
import io
import os
import re
import stat
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator

import numpy as np

from fvdm_jax.clips import clip_frames, probe_clip
from fvdm_jax.media import Media, at_rate, check_size
from fvdm_jax.program import Refusal

BACKGROUND = (255, 255, 255)
"""What shows through a transparent image."""

IMAGES = (
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"BM", "BMP"),
    (rb"II\*\0|MM\0\*", "TIFF"),
    (rb"GIF8[79]a", "GIF"),
)
CLIPS = (
    (rb"....(ftyp|moov|mdat|wide|free|skip)", "mov"),
    (rb"\x1a\x45\xdf\xa3", "matroska"),
    (rb"RIFF....AVI ", "avi"),
)
STRANGERS = (
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1|avi[fs])", "a HEIC or AVIF picture"),
    (rb"version https://git-lfs", "a Git LFS pointer; the file itself was never fetched (git lfs pull)"),
    (rb"\s*(<!doctype html|<html)", "a web page, not the file it links to"),
    (rb"\s*(<\?xml|<svg|<!--)", "an SVG or XML text"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
    (rb"\s*(#EXTM3U|ffconcat|\[playlist\])", "a playlist"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive"),
)
READABLE = "give a PNG, JPEG, WebP, BMP, TIFF, GIF, MP4, MOV, WebM, MKV or AVI file"


MOST_ANIMATED = 10**9
"""Pixels of all frames of an animated GIF together, which have to be decoded to know when each is shown."""


def probe(path: str | os.PathLike) -> Media:
    """What the file at `path` holds; an image is decoded, of a clip only read when frames are shown.

    Raises Refusal, named `path`, for anything that `pictures` could not use.
    """
    kind, form = _sniff(path)
    with _refusing(path):
        if kind == "image":
            return _probe_image(path, form)
        return probe_clip(path, form)


@contextlib.contextmanager
def pictures(path: str | os.PathLike, fps: float | None = None) -> Iterator[Iterator]:
    """The pictures of the file at `path`, decoded one at a time, as PIL images. Raises Refusal.

    With `fps` those that a player shows at 0, 1/fps, 2/fps … seconds, up to the last one's beginning.
    """
    kind, form = _sniff(path)
    decode = _gif_frames if form == "GIF" else _still if kind == "image" else clip_frames
    with _refusing(path), contextlib.closing(decode(path, form)) as timed:
        yield (picture for _, picture in timed) if fps is None else at_rate(timed, fps)


def _sniff(path) -> tuple[str, str]:
    name = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name) or name.startswith("\\\\"):
        raise Refusal(path, "is an address on a network", "download it and give the file")
    try:
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):
            what = "folder" if stat.S_ISDIR(mode) else "pipe or device"
            raise Refusal(path, f"is a {what}, not a file", READABLE)
        with open(name, "rb") as file:
            head = file.read(64)
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise Refusal(path, f"cannot be read: {reason}", "give a picture or a clip that exists") from failure
    return _named(path, head)


def _named(path, head: bytes) -> tuple[str, str]:
    for table, kind in ((STRANGERS, ""), (IMAGES, "image"), (CLIPS, "video")):
        for magic, form in table:
            if re.match(magic, head, re.DOTALL | re.IGNORECASE if not kind else re.DOTALL):
                if not kind:
                    raise Refusal(path, f"is {form}", READABLE)
                return kind, form
    raise Refusal(path, "is neither an image nor a video" if head else "is empty", READABLE)


@contextlib.contextmanager
def _refusing(path) -> Iterator[None]:
    """Turns whatever the decoders say of a bad file into a Refusal."""
    from PIL import Image, UnidentifiedImageError

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    known = (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        struct.error,
        zlib.error,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except bombs as large:
        raise Refusal(path, "is far larger than 50 million pixels", "scale it down first") from large
    except UnidentifiedImageError as broken:
        raise Refusal(path, "is a damaged image", "give a whole one") from broken
    except known as broken:
        reason = getattr(broken, "strerror", None) or str(broken) or type(broken).__name__
        raise Refusal(path, f"is damaged or cut short ({reason})", "give a whole file") from broken


def _probe_image(path, form: str) -> Media:
    with _opened(path, form) as image:
        frames = getattr(image, "n_frames", 1) if form == "GIF" else 1
        if frames * image.width * image.height > MOST_ANIMATED:
            raise Refusal(path, f"has {frames} frames of {image.width}x{image.height}", "give it as an MP4")
        span = round(sum(_seconds(image, i) for i in range(frames - 1)), 6)
        # Asked for before decoding, which a JPEG then does at an eighth of the size in an eighth of the time.
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:
            width, height = height, width
        image.seek(0)
        image.draft(None, (width // 8, height // 8))
        _colours(path, form, image)
        return Media("gif" if frames > 1 else "image", form, width, height, frames, span)


def _seconds(image, index: int) -> float:
    """How long a frame of an animation is shown; players take less than 20 ms for 100."""
    image.seek(index)
    duration = image.info.get("duration") or 0
    return (duration if duration >= 20 else 100) / 1000


@contextlib.contextmanager
def _opened(path, form: str):
    from PIL import Image

    with (
        _silent() if form == "TIFF" else contextlib.nullcontext(),
        open(path, "rb") as file,
        Image.open(file, formats=[form]) as image,
    ):
        check_size(path, *image.size)
        yield image


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches the standard error stream: libtiff would print there, beside the line of a refusal."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _still(path, form: str) -> Iterator:
    from PIL import ImageOps

    with _opened(path, form) as image:
        yield 0.0, _colours(path, form, ImageOps.exif_transpose(image))


def _gif_frames(path, form: str) -> Iterator:
    time = 0.0
    with _opened(path, form) as image:
        for index in range(image.n_frames):
            seconds = _seconds(image, index)
            yield time, _colours(path, form, image)
            time += seconds


def _colours(path, form, image):
    """The picture as RGB on the background, decoded."""
    from PIL import Image

    if image.mode in ("F", "LAB", "HSV") or (image.mode == "I" and form != "PNG"):
        raise Refusal(path, f"has pixels of the kind {image.mode}", "save it as RGB with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    profile = image.info.get("icc_profile")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return _profiled(image, profile).convert("RGB")


def _profiled(image, profile: bytes | None):
    """The image in sRGB, if it says in which other colours it is; as it is where what it says is no use."""
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
