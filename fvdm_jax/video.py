"""Pictures and clips, in and out of files. Pixels are uint8 [t H W 3], sRGB; networks see them in −1 … 1."""

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import numpy as np

from fvdm_jax.decode import Media, pictures, probe  # noqa: F401 video.Media and video.probe
from fvdm_jax.program import Refusal

STRIDE = 4
"""Pixel frames that a latent frame after the first stands for."""


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels (uint8) as float32 in −1 … 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def to_pixels(video: np.ndarray) -> np.ndarray:
    """A picture in −1 … 1 as the nearest uint8, clipped. Raises ValueError where it is not finite."""
    video = np.asarray(video, np.float32)
    if not np.isfinite(video).all():
        raise ValueError(
            "the picture has values that are not finite; look for the first layer or step that has"
        )
    return np.clip(np.rint((video + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)


def read(
    path: str | os.PathLike, frames: int, size: tuple[int, int], skip: int = 0, fps: float | None = None
) -> np.ndarray:
    """`frames` frames from frame `skip` on, as uint8 [frames H W 3], scaled to cover `size` (H, W), cropped.

    They are counted at `fps` a second, whatever the file's own rate; None: as they are in the file. Decodes
    no frame after the last one needed. Raises Refusal, named `path`, where the file cannot be used,
    is damaged before the last frame needed, or is shorter.
    """
    with pictures(path, fps) as decoded:
        found = [cover(picture, size) for picture in islice(decoded, skip, skip + frames)]
    if len(found) < frames:
        short = f"{skip + frames} frames needed, {skip + len(found) if found else 'fewer than that'} found"
        raise Refusal(path, short, "give a longer clip or keep fewer frames of it")
    return np.stack(found)


def cover(image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """The pixels [H W 3] of a picture of Pillow's, scaled to cover `size` and cut where `place` (across,
    down), 0 … 1, says."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS, centering=place))


def _check_pixels(pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels):
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}; give uint8 [t H W 3], as of to_pixels")


def write_mp4(path: Path, pixels: Iterable[np.ndarray], fps: float, comment: str = "") -> None:
    """Writes uint8 [t H W 3] (even sides) as H.264, yuv420p in BT.709, crf 16, header first, a comment.

    The pictures may come one by one: none is held longer than the encoder needs it.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    coming = iter(pixels)
    first = next(coming, np.empty(0))
    _check_pixels(first[None])
    rate = Fraction(fps).limit_denominator(1001)
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        # x264's macroblock tree encodes small frames differently from run to run; without it the same pixels
        # are the same file.
        options = {"crf": "16", "preset": "slow", "x264-params": "no-mbtree=1"}
        stream = container.add_stream("libx264", rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = ColorRange.MPEG
        for index, picture in enumerate(chain([first], coming)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=exact,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path: Path, pixels: np.ndarray, fps: float, comment: str = "") -> None:
    """Writes uint8 [t H W 3] as a GIF that repeats, all frames in one palette; fps at most 50."""
    from PIL import Image

    _check_pixels(pixels)
    # One palette for the clip, since one a frame flickers; a sample of its pixels is enough to choose it.
    sample = pixels.reshape(-1, 3)[:: max(1, pixels.size // 3_000_000)]
    palette = Image.fromarray(sample[None]).quantize(256, Image.Quantize.MEDIANCUT)
    frames = [
        Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for p in pixels
    ]
    # GIF counts in hundredths of a second; rounding the sum keeps the clip at its length.
    ends = np.rint(np.arange(len(pixels) + 1) * 100 / fps).astype(int)
    durations = (10 * np.diff(ends)).tolist()
    frames[0].save(
        path,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        comment=comment.encode(),
    )


GROUND, DIM, BRIGHT, KEPT = (24, 24, 27), (146, 146, 152), (214, 214, 218), (245, 178, 66)
CELL, GAP, FOOT = (192, 216), 10, 24


def shown(frames: int) -> list[int]:
    """Which frames of so many a contact sheet shows: at most 64, evenly chosen."""
    return np.unique(np.rint(np.linspace(0, frames - 1, min(64, frames))).astype(int)).tolist()


def contact_sheet(pixels: np.ndarray, columns: int = 8, strength: Sequence[float] = (), frames: int = 0):
    """A PIL image of the frames of uint8 [t H W 3] that `shown` chooses, each above its number.

    With `frames`, pixels are those frames alone, of a clip of so many. A number is bright where a latent
    frame begins. Where the `strength` of the latent frames is given, a line below a frame is full where it
    was kept, dashed where it was kept loosely, absent where it was generated.
    """
    from PIL import Image, ImageDraw

    _check_pixels(pixels)
    numbers = shown(frames or len(pixels))
    chosen = pixels if frames else pixels[numbers]
    rows = -(-len(numbers) // max(1, columns))
    columns = -(-len(numbers) // rows)
    scale = min(CELL[0] / pixels.shape[2], CELL[1] / pixels.shape[1])
    width, height = (max(1, round(side * scale)) for side in (pixels.shape[2], pixels.shape[1]))
    pitch = width + GAP, height + FOOT + GAP
    sheet = Image.new("RGB", (columns * pitch[0] + GAP, rows * pitch[1] + GAP), GROUND)
    draw = ImageDraw.Draw(sheet)
    for place, (frame, picture) in enumerate(zip(numbers, chosen, strict=True)):
        x, y = GAP + place % columns * pitch[0], GAP + place // columns * pitch[1]
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), (x, y))
        _mark(draw, (x, y + height), width, frame, strength)
    return sheet


def _mark(draw, corner: tuple[int, int], width: int, frame: int, strength: Sequence[float]) -> None:
    """The tick and number of a frame and, where it was kept, a line, below the picture with this corner."""
    from PIL import ImageFont

    (x, y), latent = corner, (frame + STRIDE - 1) // STRIDE
    begins = frame == 0 or frame % STRIDE == 1
    colour = BRIGHT if begins else DIM
    draw.line([(x, y + 5), (x, y + (19 if begins else 12))], colour)
    draw.text((x + 5, y + 6), str(frame), colour, ImageFont.load_default(12))
    dash = width if not strength or strength[latent] == 0 else 7
    if strength and strength[latent] < 1:
        for start in range(0, width, 2 * dash):
            end = min(start + dash, width) - 1
            draw.rectangle([(x + start, y + 1), (x + end, y + 3)], KEPT)
