"""What is taken of each clip: spans of its frames, at what rate and size; and what of it cannot be used.

Nothing here imports jax, so that the report of a large corpus starts at once.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvdm_jax import media, video
from fvdm_jax.data.captions import FILE, TEXT
from fvdm_jax.data.corpus import Source
from fvdm_jax.data.folder import digest
from fvdm_jax.decode import pictures
from fvdm_jax.program import Refusal, plain


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is made of a file: windows of one of `lengths` frames, counted at `fps`, at one of `sizes` (H, W).

    `most`: windows of a file, None for all that fit. `crop`: "centre" or "random". `fps_in`: the
    rate of numbered pictures. `images`: whether single pictures are clips.
    """

    lengths: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    fps: float
    most: int | None = 1
    crop: str = "centre"
    fps_in: float | None = None
    images: bool = False


class Clip(NamedTuple):
    """`frames` frames of a source from frame `skip` on, at `size` (H, W).

    `name` is the file's, and of several clips of a file with the span; `content` a hash of the file's bytes.
    """

    source: Source
    name: str
    skip: int
    frames: int
    size: tuple[int, int]
    content: str

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.frames, *self.size


class Row(NamedTuple):
    """What becomes of a source, which has `frames` at the wanted rate, (H, W) in size: clips, or a reason."""

    source: Source
    frames: int = 0
    size: tuple[int, int] = (0, 0)
    clips: tuple[Clip, ...] = ()
    reason: str = ""


def rows(sources: Iterable[Source], cut: Cut) -> Iterator[Row]:
    """What becomes of each source; of two with the same content and caption the second is not used."""
    seen: dict[tuple, Path] = {}
    for source in sources:
        row = _considered(source, cut)
        if row.clips:
            first = seen.setdefault((row.clips[0].content, source.caption), source.path)
            if first is not source.path:
                row = row._replace(clips=(), reason=f"is the same as {plain(first)}, with the same caption")
        yield row


def named(source: Source) -> str:
    """The name of its records, but for the span: its full path, as UTF-8 can hold it."""
    return os.path.abspath(source.path).encode("utf-8", "replace").decode()


def file_of(name: str, files: Set[str]) -> str | None:
    """Of `files` the one from which a record of this name was made, if it is among them."""
    return next((file for file in (name, re.sub("#[0-9]+-[0-9]+$", "", name)) if file in files), None)


def _considered(source: Source, cut: Cut) -> Row:
    try:
        held = _probed(source, cut)
        frames = 1 if held.kind == "image" else held.at(cut.fps)
        row = Row(source, frames, _upright(source))
        if held.kind == "image" and not (cut.images or source.asked):
            return row._replace(reason="is a single picture; --images makes such a clip of one frame")
        if source.caption is None:
            where = f"no text beside it, no table with {FILE[0]} and {TEXT[0]}, no --caption"
            return row._replace(reason=f"has no caption: {where}")
        spans = [(0, 1)] if held.kind == "image" else windows(frames, cut.lengths, cut.most)
        if not spans:
            least = f"{min(cut.lengths)} are the least"
            return row._replace(reason=f"is too short: {frames} frames at {cut.fps:g} a second, {least}")
        content = _content(source)
    except Refusal as refusal:
        return Row(source, reason="; ".join(filter(None, (refusal.what, refusal.right))))
    size, file = nearest(row.size, cut.sizes), named(source)
    names = [file if len(spans) == 1 else f"{file}#{at}-{at + length - 1}" for at, length in spans]
    clips = (Clip(source, name, *span, size, content) for name, span in zip(names, spans, strict=True))
    return row._replace(clips=tuple(clips))


def _probed(source: Source, cut: Cut) -> media.Media:
    """What is known of a source without decoding it. Raises Refusal where it cannot be used."""
    if not source.pictures:
        return video.probe(source.path)
    if cut.fps_in is None:
        what = f"is a folder of {len(source.pictures)} numbered pictures, of which no rate is known"
        raise Refusal(source.path, what, "say it with --fps-in, or --images for single pictures")
    numbers = [int(re.search(r"[0-9]+$", path.stem)[0]) for path in source.pictures]
    for before, number in pairwise(numbers):
        if number != before + 1:
            twice = number == before
            what = f"has two pictures of number {number}" if twice else f"has no picture {before + 1}"
            raise Refusal(source.path, what, "number its pictures without gaps")
    first = video.probe(source.pictures[0])
    count = len(source.pictures)
    return first._replace(kind="video", frames=count, span=(count - 1) / cut.fps_in)


def _upright(source: Source) -> tuple[int, int]:
    """Height and width of the first picture as it is shown; its file may say that it is to be turned."""
    first = _picture((source.pictures or (source.path,))[0])
    return first.height, first.width


def windows(frames: int, lengths: Sequence[int], most: int | None = 1) -> list[tuple[int, int]]:
    """(first frame, length) of up to `most` spans one after the other, each as long as fits into the rest."""
    found: list[tuple[int, int]] = []
    at = 0
    while most is None or len(found) < most:
        length = max((length for length in lengths if length <= frames - at), default=0)
        if not length:
            break
        found.append((at, length))
        at += length
    return found


def nearest(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of `sizes` (H, W) the one whose shape is most like that of `size`."""
    return min(sizes, key=lambda other: abs(math.log(other[0] / other[1] * size[1] / size[0])))


def _content(source: Source) -> str:
    """The SHA-256 of a file, or of those of a folder's pictures. Raises Refusal where it cannot be read."""
    found = []
    for path in source.pictures or (source.path,):
        try:
            found.append(digest(path))
        except OSError as failure:
            raise Refusal(path, f"cannot be read: {failure.strerror}", "make it readable") from failure
    return found[0] if not source.pictures else hashlib.sha256("".join(found).encode()).hexdigest()


def read(clips: Sequence[Clip], cut: Cut) -> Iterator[np.ndarray]:
    """The pixels, uint8 [t H W 3], of clips of one source in the order of their frames, decoded once.

    Each is scaled to cover its size, and cropped. Raises Refusal, named for the file, where it is damaged.
    """
    at = 0
    # A frame is scaled while the next ones are decoded.
    with _pictures(clips[0].source, cut) as decoded, ThreadPoolExecutor() as pool:
        for clip in clips:
            taken = islice(decoded, clip.skip - at, clip.skip - at + clip.frames)
            found = list(pool.map(partial(video.cover, size=clip.size, place=centring(clip, cut)), taken))
            at = clip.skip + clip.frames
            if len(found) < clip.frames:
                short = f"{at} frames promised, {clip.skip + len(found)} found"
                raise Refusal(clip.source.path, short, "give a whole file")
            yield np.stack(found)


def centring(clip: Clip, cut: Cut) -> tuple[float, float]:
    """Where (across, down) the crop lies, 0 … 1; a random one is always the same for the same frames."""
    if cut.crop == "centre":
        return 0.5, 0.5
    drawn = hashlib.sha256(f"{clip.content} {clip.skip}".encode()).digest()
    return int.from_bytes(drawn[:4]) / (2**32 - 1), int.from_bytes(drawn[4:8]) / (2**32 - 1)


@contextlib.contextmanager
def _pictures(source: Source, cut: Cut) -> Iterator[Iterator]:
    if source.pictures:
        timed = ((index / cut.fps_in, _picture(path)) for index, path in enumerate(source.pictures))
        yield media.at_rate(timed, cut.fps)
        return
    with pictures(source.path, cut.fps) as decoded:
        yield decoded


def _picture(path: Path):
    with pictures(path) as decoded:
        return next(decoded)


def key(clip: Clip, cut: Cut, *others: object) -> str:
    """A hash of all that the record of a clip follows from: content, span, settings, caption, `others`."""
    settings = clip.bucket, clip.skip, cut.fps, cut.crop, cut.fps_in if clip.source.pictures else None
    said = json.dumps([clip.content, settings, clip.source.caption, others])
    return hashlib.sha256(said.encode()).hexdigest()


def report(found: Sequence[Row]) -> str:
    """A table with a line for each source: frames, size, what is made of it, or why nothing is."""
    lines = [("file", "frames", "size", "clips", "made of it, or why not")]
    for row in found:
        size = f"{row.size[0]}x{row.size[1]}" if row.frames else "–"
        made = " + ".join(
            f"{count} × {shown(bucket)}" if count > 1 else shown(bucket)
            for bucket, count in Counter(clip.bucket for clip in row.clips).items()
        )
        name = plain(row.source.path, 200)
        lines.append(
            (name, str(row.frames or "–"), size, str(len(row.clips)), plain(row.reason or made, 400))
        )
    wide = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        f"{name:{wide[0]}}  {frames:>{wide[1]}}  {size:>{wide[2]}}  {clips:>{wide[3]}}  {made}"
        for name, frames, size, clips, made in lines
    )


def summary(found: Sequence[Row]) -> str:
    """How many clips there are in each bucket, and how many sources give none."""
    clips = [clip for row in found for clip in row.clips]
    none = sum(not row.clips for row in found)
    head = f"{len(found):,} files: {len(clips):,} clips of {len(found) - none:,}, none of {none:,}"
    buckets = sorted(Counter(clip.bucket for clip in clips).items(), reverse=True)
    return "\n".join([head, *(f"  {shown(bucket):>14}  {count:,}" for bucket, count in buckets)])


def shown(bucket: tuple[int, int, int]) -> str:
    """Frames, height and width of a bucket, such as 81x480x832."""
    return "x".join(map(str, bucket))
