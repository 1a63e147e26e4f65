"""One page of HTML, complete in itself: of each task what was given, its schedule, the video, the truth."""

import base64
import html
import io
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fvdm_jax import video
from fvdm_jax.zoo import Matrix

SIDE = 192
"""Pixels that a side of a video is shown with."""

STYLE = """
body { background: #18181b; color: #d6d6da; font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 62rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 0 } p { margin: .2rem 0 }
section { border-top: 1px solid #3f3f46; margin-top: 1rem; padding: 1rem 0 }
.row { display: grid; gap: 1.2rem; align-items: end;
       grid-template-columns: minmax(9rem, 1fr) repeat(3, 12rem) }
.row > :first-child { align-self: start }
@media (max-width: 50rem) { .row { grid-template-columns: 1fr 1fr } }
.stills { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0 0 3px }
figure { margin: 0 } figcaption { color: #92929b; font-size: .8rem }
img, video { display: block; image-rendering: pixelated; border-radius: 3px }
.kept { outline: 3px solid #f5b242 } code { color: #f5b242 } .dim { color: #92929b }
"""

TOLD = {
    "t2v": "from the prompt alone",
    "i2v": "from a first picture",
    "start-end": "from a first picture to a last",
    "extension": "on from a clip",
    "completion": "around pictures here and there",
    "transition": "from one clip to another",
    "long": "in windows, each on from the one before",
}
"""What a task is, in words."""


class Row(NamedTuple):
    """A task: its name and prompt, its video and the true one [t H W 3] in −1 … 1, which latent frames were
    given, the levels of the first window [s f], the calls of the network, and seconds."""

    name: str
    prompt: str
    made: np.ndarray
    true: np.ndarray
    given: list[int]
    levels: Matrix
    calls: int
    seconds: float


def page(rows: list[Row], fps: float, told: str) -> str:
    """The page of these rows; `told` is a line about model and machine."""
    prompts = dict.fromkeys(row.prompt for row in rows)
    body = "\n".join(_section(row, fps, len(prompts) > 1) for row in rows)
    shared = "" if len(prompts) > 1 else f"<p>The prompt of all: <code>{html.escape(*prompts)}</code></p>"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fvdm_jax: one model, every task</title><style>{STYLE}</style>
<h1>One model, every task: each frame has its own noise level</h1>
<p class="dim">{html.escape(told)}</p>
<p>In a matrix time runs down, over the steps, and latent frames lie across; white is noise, black is clean.
What is given, framed in <code>yellow</code>, is clean from the beginning. The truth is a clip of the world
that the model was trained on, and never saw; without frames that are given, a prompt allows for others.</p>
{shared}
{body}
</html>
"""


def _section(row: Row, fps: float, prompted: bool) -> str:
    stills = [_figure(_image(_png(row.true[video.STRIDE * k]), 64, "kept"), f"frame {k}") for k in row.given]
    told = f"<p>{html.escape(row.prompt)}</p>" if prompted else ""
    head = f'<h2>{html.escape(row.name)}</h2><p class="dim">{TOLD.get(row.name, "")}</p>{told}'
    steps = f"{len(row.levels) - 1} steps × {row.levels.shape[1]} frames"
    made = f"made: {row.calls} calls, {row.seconds:.1f} s"
    parts = [
        f'<div>{head}<div class="stills">{"".join(stills)}</div></div>',
        _figure(heat(row.levels, SIDE), steps + (", then on" if row.name == "long" else "")),
        _figure(_video(row.made, fps), made),
        _figure(_video(row.true, fps), "truth"),
    ]
    return f'<section><div class="row">{"".join(parts)}</div></section>'


def _figure(inside: str, caption: str) -> str:
    return f"<figure>{inside}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _image(png: bytes, side: int, kind: str = "") -> str:
    source = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="" width="{side}" height="{side}" src="data:image/png;base64,{source}">'


def _png(picture: np.ndarray) -> bytes:
    """A picture in −1 … 1, or uint8, as PNG."""
    pixels = picture if picture.dtype == np.uint8 else video.to_pixels(picture)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def heat(levels: Matrix, side: int = SIDE) -> str:
    """Levels [s f] as an image, steps down and frames across, in HTML."""
    return _image(_png(np.rint(255 * levels).astype(np.uint8)), side)


def _video(pixels: np.ndarray, fps: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.write_mp4(path, video.to_pixels(pixels), fps)
        source = base64.b64encode(path.read_bytes()).decode()
    height = round(SIDE * pixels.shape[1] / pixels.shape[2])
    return (
        f'<video autoplay loop muted playsinline width="{SIDE}" height="{height}" '
        f'src="data:video/mp4;base64,{source}"></video>'
    )
