"""What a container of video holds, and its frames one by one with their times."""

import contextlib
import os
from collections.abc import Iterator

import numpy as np

from fvdm_jax.media import LONGEST, Media, check_size
from fvdm_jax.program import Refusal


@contextlib.contextmanager
def _demuxed(path, form: str):
    """The container and its stream of pictures; protocol and format are fixed, so no file names another."""
    import av

    name = "file:" + os.path.abspath(path)
    options = (
        {"protocol_whitelist": "file", "enable_drefs": "0"}
        if form == "mov"
        else {"protocol_whitelist": "file"}
    )
    try:
        with av.open(name, format=form, options=options) as container:
            if not container.streams.video:
                raise Refusal(path, "has no pictures, only sound or text", "give a clip")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise Refusal(path, "has pictures in a code that is not known", "save it as H.264 or VP9")
            check_size(path, stream.codec_context.width, stream.codec_context.height)
            yield container, stream
    except av.FFmpegError as broken:
        raise Refusal(path, f"is damaged or cut short ({broken.strerror})", "give a whole file") from broken


def probe_clip(path, form: str) -> Media:
    """What is known of a clip without decoding it. Raises Refusal where it is damaged, empty or too long."""
    with _demuxed(path, form) as (container, stream):
        ends = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if form == "mov" and ends > os.path.getsize(path):
            raise Refusal(path, "is cut short: its index names frames beyond its end", "give a whole file")
        # Trimmed clips hold frames that are not to be shown; containers other than mov have no whole index.
        shown = sum(not entry.is_discard for entry in stream.index_entries) if form == "mov" else 0
        times = [p.pts for p in container.demux(stream) if p.size > 0 and not p.is_discard]
        frames = shown or len(times)
        if not frames:
            raise Refusal(path, "has no frames", "give a clip")
        if not _timed(form) or None in times:
            span = (frames - 1) / _rate(stream)
        else:
            span = float((max(times) - min(times)) * stream.time_base)
        if span > LONGEST:
            raise Refusal(path, f"lasts {span / 3600:.0f} hours by its own account", "cut out what is needed")
        return Media("video", form, *_shown(stream), frames, round(span, 6))


def _timed(form: str) -> bool:
    """Whether files of this form say when a frame is shown; an AVI says only when it is decoded."""
    return form != "avi"


def _rate(stream) -> float:
    """Frames a second, for clips that do not say when each is shown."""
    return float(stream.average_rate or 25)


def _shown(stream) -> tuple[int, int]:
    """Width and height with square pixels, before any rotation."""
    width, height = stream.codec_context.width, stream.codec_context.height
    return max(1, round(width * (stream.sample_aspect_ratio or 1))), height


def clip_frames(path, form: str) -> Iterator:
    """The second at which each picture of a clip is shown, and the picture, upright. Raises Refusal."""
    from PIL import Image

    with _demuxed(path, form) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        for index, frame in enumerate(_decoded(path, container, stream)):
            if frame.is_corrupt:
                raise Refusal(path, f"frame {index} is damaged", "give a whole file, or keep fewer frames")
            picture = Image.fromarray(_rgb(frame, *_shown(stream)))
            time = frame.time if _timed(form) and frame.time is not None else index / _rate(stream)
            yield time, picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _decoded(path, container, stream) -> Iterator:
    import av

    index, frames = 0, container.decode(stream)
    while True:
        try:
            frame = next(frames, None)
        except av.FFmpegError as broken:
            reason = f"cannot be decoded after frame {index} ({broken.strerror})"
            raise Refusal(path, reason, "give a whole file, or keep fewer frames") from broken
        if frame is None:
            return
        yield frame
        index += 1


def _rgb(frame, width: int, height: int) -> np.ndarray:
    from av.video.reformatter import Colorspace, Interpolation

    unstated = frame.colorspace not in (1, 4, 5, 6, 7, 9)
    # Players take an unstated matrix for BT.709 in high definition and for BT.601 below, and so do we.
    matrix = (Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601) if unstated else None
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    return frame.reformat(width, height, "rgb24", src_colorspace=matrix, interpolation=exact).to_ndarray()
