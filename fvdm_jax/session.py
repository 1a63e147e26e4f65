"""From Python: a model at hand, and the videos that it makes."""

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvdm_jax import samplers, video
from fvdm_jax.defaults import defaults
from fvdm_jax.flags import TINY
from fvdm_jax.process import PROCESSES
from fvdm_jax.program import Refusal, legible, outputs
from fvdm_jax.progress import Stages
from fvdm_jax.projector import Projector
from fvdm_jax.request import Request, validate
from fvdm_jax.shapes import Latents
from fvdm_jax.studio import Studio

Kept = str | os.PathLike | tuple[str | os.PathLike, float]
"""What a frame is kept from: a file, or a file and its strength."""


class Video(NamedTuple):
    """What was made: pixels, uint8 [t H W 3]; latents, float32 [1 f h w c]; of which request, how fast."""

    pixels: np.ndarray
    latents: np.ndarray
    request: Request
    seconds: dict[str, float]

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .mp4, or a .gif, with its settings inside; a file of that name is replaced."""
        path, comment = Path(path), legible(self.request.settings)
        write = video.write_gif if path.suffix.lower() == ".gif" else video.write_mp4
        with outputs(path) as (draft,):
            write(draft, self.pixels, self.request.fps, comment)


class Step(NamedTuple):
    """A step that is done: the how manieth of a video, and the clean latents that it was heading for."""

    count: int
    latents: Callable[[], Latents]


class Session:
    """A model's folder at hand; its weights and programs stay for as long as what is asked for needs them.

    Videos are made one at a time, whatever thread asks. With `stages` its stages are told there.
    """

    def __init__(self, model: str | os.PathLike = TINY, stages: Stages | None = None):
        """Raises Refusal where the folder is no model's; weights are read for the first video."""
        self._model, self._stages = Path(model), stages or Stages()
        self.defaults = defaults(self._model)
        self._projector, self._one_at_a_time = Projector(self._stages), threading.Lock()
        self._studio: tuple[object, Studio] | None = None
        self._look: Callable[[Step], None] | None = None

    def sample(
        self, prompt: str | None = None, keep: Mapping[int | str, Kept] | None = None, **settings
    ) -> Video:
        """A video of the prompt, that keeps of files what `keep` says, by frame as --keep has them.

        `settings` are those of a Request: steps, seed, size, schedule and so on; what is left out is the
        model's. Raises Refusal where one cannot be.
        """
        kept = tuple(_spelled(frame, what) for frame, what in (keep or {}).items())
        return self.make(self.complete(Request(prompt=prompt, keep=kept, **settings)))

    def complete(self, request: Request) -> Request:
        """The request with all that the model has of its own. Raises Refusal where it cannot be."""
        if request.prompts and request.length is None:
            raise Refusal("prompts", "is of many videos, and one is made", "give its lines one by one")
        named = {name: Path(path) for name in ("prompts", "noise_file") if (path := getattr(request, name))}
        return validate(
            dataclasses.replace(request, model=self._model, **named), self.defaults, outputs=False
        )

    def make(self, request: Request, look: Callable[[Step], None] | None = None) -> Video:
        """The video of a complete request; `look` is told of every step, and what it raises ends the work."""
        with self._one_at_a_time:
            self._stages.begin()
            studio, done = self._ready(request), 0

            def told(before: Latents, after: Latents, levels) -> None:
                nonlocal done
                done += 1
                process = PROCESSES[request.process]
                look(Step(done, lambda: samplers.heading(process, before, after, levels)))

            self._look = told if look else None
            if request.length is None:
                made = studio.clip(request)
            else:
                pieces = studio.queue(request) if request.rolls else studio.windows(request, None)
                made = _filled(pieces, request.total)
            return Video(self.pixels(request, made), made, request, self._stages.since)

    def pixels(self, request: Request, latents: Latents) -> np.ndarray:
        """What the latents [1 f h w c] show, uint8 [t H W 3]."""
        return np.stack(list(self._projector.pictures(request, [latents])))

    def _ready(self, request: Request) -> Studio:
        """The studio that has what the request needs: the last one, if its programs and weights serve."""
        r, windows = request, request.history_windows if request.history != 1 else 0
        needed = (
            r.latent_frames,
            r.size,
            r.solver,
            r.process,
            r.guided,
            windows,
            r.mesh,
            r.attention,
            r.lora,
        )
        if self._studio is None or self._studio[0] != needed:
            self._studio = None
            self._studio = needed, Studio([request], self._stages, self._told)
        self._studio[1].welcome(request)
        return self._studio[1]

    def _told(self, *step) -> None:
        if self._look:
            self._look(*step)


def _spelled(frame: int | str, what: Kept) -> str:
    """FRAME=FILE[:STRENGTH], of a frame or range as --keep has it, and a file or a file with a strength."""
    file, *strength = what if isinstance(what, tuple) else (what,)
    return f"{frame}={os.fspath(file)}" + "".join(f":{number}" for number in strength)


def _filled(pieces, total: int) -> np.ndarray:
    """Pieces of latents [1 k h w c] as one of `total` frames."""
    made, frames = [], 0
    while frames < total:
        made.append(next(pieces))
        frames += made[-1].shape[1]
    return np.concatenate(made, axis=1)[:, :total]
