"""A sheet of examples: for each case a few clips beside the true ones, with what the judge says of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fvdm_jax.evaluating.scores import FLAWS
from fvdm_jax.video import BRIGHT, DIM, GAP, GROUND, KEPT, STRIDE, to_pixels

SHOWN, WIDEST = 6, 1960
"""Frames of a clip, and pixels of the sheet."""
LINE, TEXT = 18, 13


class Example(NamedTuple):
    """A clip and the true one, [t H W 3] in −1 … 1; its frames that were given; and what to say of it."""

    pixels: np.ndarray
    true: np.ndarray
    given: set[int]
    caption: str
    verdict: str


def said(scores: dict) -> str:
    """What the judge says of a clip, in words."""
    told = {name: value for name, value in scores.items() if isinstance(value, bool) and name != "all"}
    parts = {
        "yes": [name for name, value in told.items() if value and name not in FLAWS],
        "no": [name for name, value in told.items() if not value and name not in FLAWS],
        "flaws": [name for name in FLAWS if told.get(name)],
    }
    return "; ".join(f"{head}: {', '.join(names)}" for head, names in parts.items() if names)


def sheet(examples: dict[str, Sequence[Example]]) -> Image.Image:
    """The examples of every case, by its name, under one another."""
    rows = [(name, example) for name, several in examples.items() for example in several]
    height, width = rows[0][1].pixels.shape[1:3]
    cell = (WIDEST - 2 * GAP) // (2 * SHOWN) - 4
    tall = max(1, round(cell * height / width))
    pitch = tall + 2 * LINE + 2 * GAP + 4
    image = Image.new("RGB", (WIDEST, pitch * len(rows) + 2 * GAP + LINE), GROUND)
    draw = ImageDraw.Draw(image)
    halves = GAP, WIDEST // 2 + GAP // 2
    for x, title in zip(halves, ("made (a line below: given)", "true"), strict=True):
        _write(draw, (x, GAP), title, DIM)
    for row, (name, example) in enumerate(rows):
        y = 2 * GAP + LINE + row * pitch
        _row(image, (halves, y), (cell, tall), example)
        _write(draw, (GAP, y + tall + 6), f"{name}: {example.caption}", BRIGHT)
        _write(draw, (GAP, y + tall + 6 + LINE), example.verdict, DIM)
    return image


def _row(image: Image.Image, at: tuple, size: tuple[int, int], example: Example) -> None:
    """Frames of both clips, those that were given underlined."""
    draw, (halves, y) = ImageDraw.Draw(image), at
    for x, pixels in zip(halves, (example.pixels, example.true), strict=True):
        for place, frame in enumerate(np.linspace(0, len(pixels) - 1, SHOWN).round().astype(int)):
            left = x + place * (size[0] + 4)
            small = Image.fromarray(to_pixels(pixels[frame])).resize(size, Image.Resampling.LANCZOS)
            image.paste(small, (left, y))
            if pixels is example.pixels and (frame + STRIDE - 1) // STRIDE in example.given:
                draw.rectangle([(left, y + size[1] + 1), (left + size[0] - 1, y + size[1] + 4)], KEPT)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour) -> None:
    draw.text(at, text, colour, ImageFont.load_default(TEXT))
