"""What a request asks of every step: levels, how many calls there are, how strongly to listen; its seed."""

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax import zoo
from fvdm_jax.guidance import Weights
from fvdm_jax.request import Request
from fvdm_jax.schedule import SPACINGS, switch


def rows(request: Request, strength) -> zoo.Matrix:
    """The level of every frame of a window at every step, [s + 1 f], where they take part so much, [f].

    Those that the request has itself may change over the steps; a later window's do not.
    """
    sigmas, strength = SPACINGS[request.spacing](request.steps, request.shift), np.float32(strength)
    own = np.float32(request.sampled[: len(strength)])
    settled = request.settled[: len(strength)] if np.array_equal(strength, own) else None
    return zoo.levels(request.schedule, sigmas, strength, settled)


def calls(request: Request) -> list[int]:
    """Calls of the network for each window of a video; of a queue for the first frame and each later one."""
    if request.rolls:
        ends = [request.steps + i * request.steps // (request.latent_frames - request.overlap)
                for i in range(request.total - request.given)]  # fmt: skip
        return np.diff(ends, prepend=0).tolist()
    first = len(rows(request, request.sampled[: request.latent_frames])) - 1
    if request.length is None:
        return [first]
    kept = request.latent_frames - request.new
    later = rows(request, np.repeat([0.0, 1.0], [kept, request.new]))
    return [first] + [len(later) - 1] * (request.windows - 1)


def weights(request: Request, expert: int) -> Weights:
    """How strongly an expert is made to listen, float32."""
    text = request.guidance[expert] if isinstance(request.guidance, tuple) else request.guidance
    noise = request.context_noise
    context, power = noise if isinstance(noise, tuple) else (noise, 0.0)
    history = request.history, request.history_level
    given = Weights(text, *history, *request.interval, request.rescale, context, power)
    return jax.tree.map(jnp.float32, given)


def key(seed: int):
    """jax.random.key of a seed of 64 bits, of which jax by itself takes 32."""
    return jax.random.wrap_key_data(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def abreast(matrices: list[zoo.Matrix]) -> np.ndarray:
    """Levels [s f] of clips as those of a batch [s b f], the shorter of which wait; of one as they are."""
    if len(matrices) == 1:
        return matrices[0]
    most = max(map(len, matrices))
    return np.stack([np.pad(one, ((0, most - len(one)), (0, 0)), "edge") for one in matrices], axis=1)


def high(request: Request, strength) -> int:
    """How many steps are the first expert's: by the level of what is generated, not of what is kept."""
    return switch(rows(request, np.sign(strength)), request.boundary)
