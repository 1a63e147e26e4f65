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


def rolling(
    begin: Callable[[Latents, Latents, Schedule], tuple],
    advance: Callable[[tuple, Schedule], tuple],
    noise: Callable[[int], Latents],
    sigmas: Sigmas,
    frames: int,
    context: int,
) -> Iterator[Latents]:
    """The frames [b 1 h w c] of a video without end, each as soon as it is clean; `itertools.islice` ends it.

    The network always sees `frames` of them: the last `context` that are clean, and a queue of the other
    q = frames − context at levels evenly apart on `sigmas` [s+1]. When the head of the queue is clean, all
    move up by one, with what the solver remembers of them, and pure noise enters: `noise(i)` [b 1 h w c],
    for frame i of the video. So a frame takes s calls of the network, and the next is clean s/q calls later.

    Frame i begins after ⌊i·s/q⌋ calls: where q does not divide s, the calls between frames differ by one, and
    where s < q, several frames become clean at once. From the beginning on this is `zoo.rolling`, whose first
    `frames` fill the window: those whose turn has not come wait there as noise, and the first to be clean
    stay until there are `context` of them.

    `begin` and `advance` are those of `samplers` with the process, the solver and the denoiser bound. The one
    is called for a frame at a time, the other for a step at a time, with rows [2 f]: when jitted, one program
    of each serves the whole video, in constant memory.

    Without a context a frame is forgotten as soon as it is clean; the others know it by what it left in them.
    Raises ValueError unless 0 ≤ context < frames. Source: Rolling Diffusion (arXiv 2402.09470) and
    FIFO-Diffusion (arXiv 2405.11473), which fills the first queue with a clip that was made before instead.
    """
    if not 0 <= context < frames:
        raise ValueError(
            f"{context} clean frames in a window of {frames}; give a context of 0 to {frames - 1}"
        )
    sigmas = np.asarray(sigmas, np.float32)

    def fresh(i: int) -> tuple:
        drawn = noise(i)
        return begin(drawn, jnp.zeros_like(drawn), sigmas[:1, None])

    return _rolling(fresh, advance, sigmas, frames, context)


def _rolling(fresh, advance, sigmas: np.ndarray, frames: int, context: int) -> Iterator[Latents]:
    """The same, where `fresh(i)` is (x, memory) of frame i of the video at the first level."""
    steps, queue, calls = len(sigmas) - 1, frames - context, 0
    carry = jax.tree.map(_in_order, *map(fresh, range(frames)))
    for i in itertools.count():
        first = max(i - context, 0)
        delay = np.arange(first, first + frames) * steps // queue
        while calls < steps + i * steps // queue:
            carry = advance(carry, sigmas[np.clip(calls + np.array([[0], [1]]) - delay, 0, steps)])
            calls += 1
        yield carry[0][:, i - first : i - first + 1]
        if i >= context:
            carry = jax.tree.map(lambda old, new: _in_order(old[:, 1:], new), carry, fresh(first + frames))


def _in_order(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=1)
