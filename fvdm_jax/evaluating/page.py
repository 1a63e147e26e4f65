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
       max-width: 68rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 0 0 .3rem } p { margin: .2rem 0 }
section { border-top: 1px solid #3f3f46; padding: 1.2rem 0 }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-end }
figure { margin: 0 } figcaption { color: #92929b; font-size: .8rem }
img, video { display: block; image-rendering: pixelated; border-radius: 3px }
.kept { outline: 3px solid #f5b242 } code { color: #f5b242 } .dim { color: #92929b }
"""


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
    body = "\n".join(_section(row, fps) for row in rows)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fvdm_jax: one model, every task</title><style>{STYLE}</style>
<h1>One model, every task: each frame has its own noise level</h1>
<p class="dim">{html.escape(told)}</p>
<p>In a matrix time runs down, over the steps, and latent frames lie across; white is noise, black is clean.
What is given, framed in <code>yellow</code>, is clean from the beginning. The truth is a clip of the world
that the model was trained on, and never saw; without frames that are given, a prompt allows for others.</p>
{body}
</html>
"""


def _section(row: Row, fps: float) -> str:
    stills = [(k, _image(_png(row.true[video.STRIDE * k]), 64, "kept")) for k in row.given]
    shown = "".join(_figure(still, f"frame {k}") for k, still in stills)
    given = shown or '<p class="dim">the prompt alone</p>'
    parts = [
        f'<div class="row">{given}</div>',
        _figure(
            _image(_heat(row.levels), SIDE), f"{len(row.levels) - 1} steps × {row.levels.shape[1]} frames"
        ),
        _figure(_video(row.made, fps), f"made: {row.calls} calls, {row.seconds:.1f} s"),
        _figure(_video(row.true, fps), "truth"),
    ]
    return (
        f"<section><h2>{html.escape(row.name)}</h2><p>{html.escape(row.prompt)}</p>"
        f'<div class="row">{"".join(parts)}</div></section>'
    )


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


def _heat(levels: Matrix) -> bytes:
    return _png(np.rint(255 * levels).astype(np.uint8))


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
