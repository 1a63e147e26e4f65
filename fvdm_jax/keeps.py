"""What is kept of a video: which latent frames, from which file, how loosely."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fvdm_jax import video
from fvdm_jax.program import Refusal, numbered
from fvdm_jax.video import STRIDE

GRAMMAR = """\
what --keep takes
  FRAME=FILE[:STRENGTH]   FRAME counts latent frames from 0, `last` is the last. The first is one frame of the
                          video and every later one is four, so 81 frames of video are 0 to 20.
  0=cat.png               begins with this image       0=cat.png:0.3   begins near it
  last=cat.png            ends with it; an image kept after frame 0 stands still for its four frames
  0=clip.mp4              goes on from the clip: begins with its last frames
  last=clip.mp4           leads to the clip: ends with its first frames
  0-4=clip.mp4            the beginning of the clip, as exactly these latent frames (17 frames of it)
  p37=cat.png             an image at frame 37 of the video: at latent frame 10, which is 37 to 40
  STRENGTH                0 (default, but for presets) keeps bit for bit, 1 ignores the file, between loosens;
                          it is what follows the last colon, if a number. 0.6-0.1 changes over the steps.
A clip given without a range keeps as many frames as it has and as there is room for, all such clips together
about half of the video. Pictures are scaled to cover the video and cropped to its middle; of a clip those
frames are taken that a player shows at the video's rate (--fps), whatever its own. What is kept is kept in
the space of the VAE, whose decoder shows a frame in the light of those before it; after frame 0 a clip begins
with one that stands for four. An animated GIF is a clip.
"""


@dataclasses.dataclass(frozen=True)
class Keep:
    """`count` latent frames from `first` on, given by the file; of a clip's `total` those from `skip`.

    Their strength goes from `strength` at the first step to `settled` at the last. `fps` is the clip's own
    rate where that is less than the video's, else 0.
    """

    first: int
    count: int
    path: Path
    kind: str
    strength: float = 0.0
    settled: float = 0.0
    skip: int = 0
    total: int = 1
    fps: float = 0.0

    @property
    def note(self) -> str:
        """Which frames of a clip are used, and its rate where that is less than the video's; else empty."""
        if self.kind == "image":
            return ""
        told = []
        if self.frames != self.total:
            told.append(f"frames {self.skip} to {self.skip + self.frames - 1} of {self.total} are used")
        if self.fps:
            told.append(
                f"some frames are shown twice, as it has {self.fps:.3g} a second (--fps sets the rate)"
            )
        return f"note: of {self.path} {'; '.join(told)}" if told else ""

    @property
    def frames(self) -> int:
        """Frames of the file that it takes; for an image 1."""
        return 1 if self.kind == "image" else STRIDE * self.count - STRIDE + 1


def latent(frames: int) -> int:
    """How many latent frames the first `frames` frames of a clip fill."""
    return 1 + (frames - 1) // STRIDE


def total(frames: int, length: float | None, fps: float) -> int:
    """Latent frames of a video of so many frames, or of `length` seconds, rounded up."""
    return latent(frames) if length is None else 1 + max(0, math.ceil((length * fps - 1) / STRIDE))


class _Asked(NamedTuple):
    """One --keep as written: a range, or a single frame with which a clip begins or, at `last`, ends."""

    flag: str
    first: int
    last: int
    form: str
    path: Path
    strength: float
    settled: float


def _asked(text: str, frames: int, otherwise: float) -> _Asked:
    flag, (place, equals, file) = f"--keep {text}", text.partition("=")
    match = re.fullmatch(r"(p\d{1,9}(?!-)|\d{1,9}|last)(-(\d{1,9}|last))?", place, re.ASCII)
    valid = f"give 0 to {frames - 1}, last, or a range such as 0-{frames - 1}, then =FILE"
    if not match or not equals:
        raise Refusal(flag, f"{place!r} is no latent frame" if equals else "has no =FILE", valid)
    first, last = (_place(at, frames) for at in (match[1], match[3] or match[1]))
    if last < first < frames:
        raise Refusal(flag, f"{place} runs backwards", valid)
    if not file or not file.rpartition(":")[0] and file.startswith(":"):
        raise Refusal(flag, "names no file", valid)
    if max(first, last) >= frames:
        raise Refusal(flag, f"{place} is outside the video's {frames} latent frames", valid)
    form = "range" if match[2] else "end" if place == "last" else "start"
    path, *strengths = _loosened(file, otherwise)
    if strengths[0] == 0 < strengths[1]:
        what = "begins at a strength of 0, which is kept and does not change"
        raise Refusal(flag, what, "begin above 0, such as 0.1-0.5")
    if not all(0 <= strength <= 1 for strength in strengths):
        what = f"the strength {file.rpartition(':')[2]} is outside 0 to 1"
        raise Refusal(flag, what, "0 keeps, 1 ignores, 0.3 loosens")
    return _Asked(flag, first, last, form, Path(path), *strengths)


def _place(at: str, frames: int) -> int:
    """The latent frame that is meant: a number, that in which a frame of the video lies, or the last."""
    if at.startswith("p"):
        return latent(int(at[1:]))
    return frames - 1 if at == "last" else int(at)


def _loosened(file: str, otherwise: float) -> tuple[str, float, float]:
    """The file, and its strength at the first step and at the last."""
    name, colon, tail = file.rpartition(":")
    if colon and (both := re.fullmatch(r"(\d*\.?\d+)-(\d*\.?\d+)", tail, re.ASCII)):
        return name, float(both[1]), float(both[2])
    name, strength = numbered(file, otherwise)
    return name, strength, strength


def placed(texts: Sequence[str], frames: int, fps: float, otherwise: float = 0.0) -> tuple[Keep, ...]:
    """What each FRAME=FILE[:STRENGTH] keeps of a video of `frames` latent frames, in the order of the frames.

    Where no strength is given it is `otherwise`. Frames of clips are counted at `fps` a second. Raises
    Refusal, named --keep, for a bad frame, strength or file, and for a frame that is given twice.
    """
    asked = [_asked(text, frames, otherwise) for text in texts]
    media = [_probed(one) for one in asked]
    free = sum(m.kind != "image" and one.form != "range" for one, m in zip(asked, media, strict=True))
    share = max(1, frames // max(1, 2 * free))
    keeps = []
    for one, held in zip(asked, media, strict=True):
        others, slow = [other for other in asked if other is not one], 0.0
        if held.kind != "image":
            # One that is hardly slower, as film on television, is as fast.
            slow = held.rate if held.rate < 0.95 * fps else 0.0
            held = held._replace(frames=held.at(fps))
        count = _count(one, held, min(share, _room(one, others, frames)))
        at = one.last + 1 - count if one.form == "end" else one.first
        keep = Keep(at, count, one.path, held.kind, one.strength, one.settled)
        if held.kind != "image":
            # The video goes on from a clip at its start, so from the end of that clip.
            goes_on = one.form == "start" and one.first == 0
            skip = held.frames - keep.frames if goes_on else 0
            keep = dataclasses.replace(keep, skip=skip, total=held.frames, fps=slow)
        keeps.append((keep, one.flag))
    keeps.sort(key=lambda pair: pair[0].first)
    for (one, flag), (other, its) in itertools.pairwise(keeps):
        if one.first + one.count > other.first:
            raise Refusal(
                its, f"latent frame {other.first} is already given by {flag}", "give each frame once"
            )
    return tuple(keep for keep, _ in keeps)


def _probed(one: _Asked) -> video.Media:
    try:
        return video.probe(one.path)
    except Refusal as refusal:
        raise Refusal(one.flag, f"the file {refusal.what}", refusal.right) from refusal


def _room(one: _Asked, others: list[_Asked], frames: int) -> int:
    """Latent frames between the frame asked for and the next one that another file is asked for."""
    if one.form == "end":
        return frames - 1 - max((other.last for other in others if other.last < one.last), default=-1)
    return min((other.first for other in others if other.first > one.first), default=frames) - one.first


def _count(one: _Asked, held: video.Media, room: int) -> int:
    count = one.last + 1 - one.first
    if held.kind == "image":
        if count > 1:
            raise Refusal(one.flag, "an image stands for one latent frame", f"give {one.first}=FILE")
        return 1
    if one.form != "range":
        return max(1, min(room, latent(held.frames)))
    needed = STRIDE * count - STRIDE + 1
    if held.frames < needed:
        right = f"{one.first}-{one.first + latent(held.frames) - 1} is the most it fills"
        raise Refusal(one.flag, f"{needed} frames needed at the video's rate, {held.frames} found", right)
    return count
