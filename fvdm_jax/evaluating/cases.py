"""The tasks that are evaluated, as data: which frames of the true clip are given, how long the video is."""

from collections.abc import Callable
from typing import NamedTuple

from fvdm_jax.defaults import Defaults
from fvdm_jax.program import Refusal
from fvdm_jax.request import Request
from fvdm_jax.video import STRIDE

LONGER = 4
"""How many times longer than a window the long video is, at least."""


class Kept(NamedTuple):
    """`count` latent frames from `first` on that are given: one as an image, more as a clip."""

    first: int
    count: int = 1

    @property
    def pixels(self) -> slice:
        """The pixel frames that are encoded, by themselves; of the four of a latent frame the last."""
        return slice(STRIDE * self.first, STRIDE * (self.first + self.count - 1) + 1)

    @property
    def latents(self) -> range:
        """The latent frames."""
        return range(self.first, self.first + self.count)


class Case(NamedTuple):
    """A task for clips of `window` latent frames: what is given, and the windows, which overlap."""

    window: int
    kept: tuple[Kept, ...] = ()
    windows: int = 1

    @property
    def overlap(self) -> int:
        """Latent frames of a window that the next one is given."""
        return max(1, self.window // 2)

    @property
    def latents(self) -> int:
        """Latent frames of the whole video."""
        return self.window + (self.windows - 1) * (self.window - self.overlap)

    @property
    def frames(self) -> int:
        """Pixel frames of the whole video."""
        return 1 + STRIDE * (self.latents - 1)

    @property
    def seams(self) -> list[int]:
        """The pixel frames at which what is given and what is made, or two windows, meet."""
        edges = {edge for kept in self.kept for edge in (kept.first, kept.first + kept.count)}
        edges |= {self.window + i * (self.window - self.overlap) for i in range(self.windows - 1)}
        return [STRIDE * edge - STRIDE + 1 for edge in sorted(edges) if 0 < edge < self.latents]

    @property
    def given(self) -> set[int]:
        """All latent frames that are given."""
        return {frame for kept in self.kept for frame in kept.latents}


def _long(window: int) -> Case:
    new = window - Case(window).overlap
    return Case(window, windows=1 + -(-(LONGER - 1) * window // new))


TASKS: dict[str, Callable[[int], Case]] = {
    "t2v": Case,
    "i2v": lambda f: Case(f, (Kept(0),)),
    "start-end": lambda f: Case(f, (Kept(0), Kept(f - 1))),
    "extension": lambda f: Case(f, (Kept(0, (f - 1) // 2),)),
    "completion": lambda f: Case(f, tuple(map(Kept, range(0, f, 4)))),
    "transition": lambda f: Case(f, (Kept(0, 2), Kept(f - 2, 2))),
    "long": _long,
}
"""The Case of each task, by the latent frames of a window, of which there are 5 or more.

Extension is given the first 4 of 9, which are 13 pixel frames; completion every fourth, as images.
"""
LEAST = 5


def check(request: Request, model: Defaults) -> None:
    """Raises Refusal unless tasks can be made of the request.

    The model must have one transformer, which is told by levels alone what is given, and clips of LEAST
    latent frames; seeds are jax's own.
    """
    folder, right = model.config.parent, "give a text-to-video model of one transformer"
    if request.seed >= 2**31:
        raise Refusal("--seed", f"{request.seed} is not below 2^31", "give a smaller one")
    if len(model.transformers) > 1:
        raise Refusal("--model", f"{folder} has two experts, and is only sampled", right)
    if model.pictures:
        raise Refusal("--model", f"{folder} needs pictures beside the video, and is only sampled", right)
    if request.latent_frames < LEAST:
        what = f"{folder} makes {request.latent_frames} latent frames, and tasks need {LEAST}"
        raise Refusal("--model", what, "give a model of longer clips")
