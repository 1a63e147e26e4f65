"""Long video: windows of one length that go on from each other, and a queue that rolls along frame by frame.

Both are lazy: they yield latents as these become final, and keep no more of the video than they still need.
The VAE's first latent frame stands for one picture and every other for four, so a model may not have met in
training what a later window or a queue begins with.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax.shapes import Latents, Schedule, Sigmas
from fvdm_jax.tasks import Task, text_to_video


def extend(
    generate: Callable[[Task, int], Latents], start: Task, count: int, overlap: int, strength: float = 0.0
) -> Latents:
    """The clip [b n h w c] of `count` windows of f frames, n = f + (count − 1)·(f − overlap).

    All that `windows` yields, in one piece; raises ValueError as it does.
    """
    return jnp.concatenate(list(windows(generate, start, count, Seam(overlap, strength))), axis=1)


class Seam(NamedTuple):
    """What a window is given of those before it; its frames are [anchors | overlap | new].

    `overlap`: how many latent frames at their end, kept with `strength`; above 0 they are redrawn.
    `anchors`: how many at the beginning of the first window, kept as they are, against drift.
    """

    overlap: int
    strength: float = 0.0
    anchors: int = 0


def windows(
    generate: Callable[[Task, int], Latents],
    start: Task,
    count: int,
    seam: Seam,
    past: Latents | None = None,
) -> Iterator[Latents]:
    """Pieces [b k h w c] of a clip of `count` windows, after each window those frames that are now final.

    `generate(task, i)` makes window i, the first of `start`. What windows share stays latents, so that
    nothing is lost in the VAE. Frames that the next window redraws are held back and are as it draws them.

    To resume, give as `past` the clip as it stood after some windows: all that was yielded, and where the
    strength is above 0 also the last `overlap` frames that the last of these windows made, which were held
    back. Where `generate` is deterministic, the pieces are then those of a run that was never interrupted.

    Raises ValueError, before any window is made, unless count ≥ 1, overlap ≥ 1, at least one frame of a later
    window is new, the strength is within 0 … 1, and `past` is the clip after 1 to `count` windows.
    """
    frames = start.canvas.shape[1]
    new, done, given = frames - seam.anchors - seam.overlap, 0, (None, None)
    possible = count >= 1 and seam.overlap >= 1 and seam.anchors >= 0 and new >= 1
    if not (possible and 0 <= seam.strength <= 1):
        right = f"1 window or more, an overlap from 1 to {frames - 1}, anchors from 0 that leave a frame new"
        raise ValueError(f"{count} windows of {frames} frames, {seam}; give {right}, a strength of 0 to 1")
    if past is not None:
        done, rest = divmod(past.shape[1] - frames + new, new)
        if rest or not 1 <= done <= count:
            wanted = f"{frames} frames, and {new} more for every further one of {count} windows"
            raise ValueError(f"the past has {past.shape[1]} frames; give that of whole windows, {wanted}")
        given = past[:, : seam.anchors], past[:, -seam.overlap :]
    return _windows(generate, start, range(done, count), seam, given)


def _windows(generate, start: Task, which: range, seam: Seam, given: tuple) -> Iterator[Latents]:
    """The pieces of these windows; `given` are the anchors and the overlap for the first, unless it is 0."""
    (anchors, end), frames = given, start.canvas.shape[1]
    held = seam.overlap if seam.strength else 0
    for i in which:
        task = start
        if i:
            task = text_to_video(start.canvas.shape).keep(anchors, at=0)
            task = task.keep(end, at=seam.anchors, strength=seam.strength)
        made = generate(task, i)
        anchors, end = anchors if i else made[:, : seam.anchors], made[:, -seam.overlap :]
        first = seam.anchors + seam.overlap - held if i else 0
        yield made[:, first : frames if i == which[-1] else frames - held]


class Rolled(NamedTuple):
    """A queue as it stands: which frame of the video is the next to be clean, and what its solver goes by."""

    next: int
    carry: tuple


class Queue(NamedTuple):
    """A video without end, whose frames [b 1 h w c] come one by one, each as soon as it is clean.

    The network always sees `frames` of them: the last `context` that are clean, and a queue of the other
    q = frames − context at levels evenly apart on `sigmas` [s+1]. When the head of the queue is clean, all
    move up by one, with what the solver remembers of them, and pure noise enters: `noise(i)` [b 1 h w c],
    for frame i of the video. So a frame takes s calls of the network, and the next is clean s/q calls later.

    The first `given` frames are clean from the beginning on, and the queue begins behind them. Frame i after
    them begins after ⌊i·s/q⌋ calls: where q does not divide s, the calls between frames differ by one, and
    where s < q, several frames become clean at once. From the beginning on this is `zoo.rolling`, whose first
    `frames` fill the window: those whose turn has not come wait there as noise, and the first to be clean
    stay until there are `context` of them.

    `begin` and `advance` are those of `samplers` with the process, the solver and the denoiser bound. The one
    is called for a frame at a time, the other for a step at a time, with rows [2 f]: when jitted, one program
    of each serves the whole video, in constant memory.

    Without a context a frame is forgotten as soon as it is clean; the others know it by what it left in them.
    Source: Rolling Diffusion (arXiv 2402.09470) and FIFO-Diffusion (arXiv 2405.11473), which fills the first
    queue with a clip that was made before instead.
    """

    begin: Callable[[Latents, Latents, Schedule], tuple]
    advance: Callable[[tuple, Schedule], tuple]
    noise: Callable[[int], Latents]
    sigmas: Sigmas
    frames: int
    context: int
    given: int = 0

    def start(self, canvas: Latents | None = None) -> Rolled:
        """The queue before its first call; `canvas` [b k h w c] has the frames that are given.

        Raises ValueError unless 0 ≤ context < frames.
        """
        if not 0 <= self.context < self.frames:
            what = f"{self.context} clean frames in a window of {self.frames}"
            raise ValueError(f"{what}; give a context of 0 to {self.frames - 1}")
        first = self._first(self.given)
        fresh = (self._fresh(i, canvas) for i in range(first, first + self.frames))
        return Rolled(self.given, jax.tree.map(_in_order, *fresh))

    def roll(self, rolled: Rolled) -> Iterator[tuple[Latents, Rolled]]:
        """The frames from where the queue stands, each with how it stands then; `itertools.islice` ends it.

        From there the same frames come again, to the bit where all that is called is deterministic.
        """
        sigmas, steps = np.asarray(self.sigmas, np.float32), len(self.sigmas) - 1
        calls, carry = self._calls(rolled.next - 1), rolled.carry
        for i in itertools.count(rolled.next):
            first = self._first(i)
            if i > self.given and first > self._first(i - 1):
                new = self._fresh(first + self.frames - 1)
                carry = jax.tree.map(lambda old, new: _in_order(old[:, 1:], new), carry, new)
            place = np.arange(first, first + self.frames) - self.given
            delay = np.where(place < 0, -steps, place * steps // (self.frames - self.context))
            while calls < self._calls(i):
                carry = self.advance(carry, sigmas[np.clip(calls + np.array([[0], [1]]) - delay, 0, steps)])
                calls += 1
            yield carry[0][:, i - first : i - first + 1], Rolled(i + 1, carry)

    def _first(self, i: int) -> int:
        """The first frame that is in sight when frame i is the next to be clean."""
        return max(i - self.context, 0)

    def _calls(self, i: int) -> int:
        """How many there have been when frame i is clean."""
        steps = len(self.sigmas) - 1
        return steps + (i - self.given) * steps // (self.frames - self.context) if i >= self.given else 0

    def _fresh(self, i: int, canvas: Latents | None = None) -> tuple:
        """(x, memory) of frame i of the video: at the first level, or as it is given."""
        noise, level = self.noise(i), np.float32(self.sigmas[0])
        if i < self.given:
            return self.begin(noise, canvas[:, i : i + 1], np.zeros((1, 1), np.float32))
        return self.begin(noise, jnp.zeros_like(noise), np.full((1, 1), level))


def _in_order(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=1)
