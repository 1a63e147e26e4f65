"""From a network to a denoiser: what it is told, and how strongly it is made to listen."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvdm_jax.lora import Network
from fvdm_jax.models.dit import Prompt
from fvdm_jax.process import Prediction, Process
from fvdm_jax.samplers import Denoiser, Sampler, advance, begin
from fvdm_jax.shapes import Latents, Levels, Schedule, TextStates

Apply = Callable[..., Latents]
"""A network with its parameters: (x, timestep, text) → output, and `extra` after them where it takes one."""


def guided(
    process: Process,
    apply: Apply,
    text: TextStates,
    negative: TextStates | None = None,
    scale: float | jax.Array = 1.0,
    extra=None,
) -> Denoiser:
    """A denoiser that says what the network says of `text`, taken `scale` times as far from `negative`.

    output = negative + scale·(text − negative), both asked in one batch; without `negative` only `text` is
    asked and `scale` is not used. `text`, `negative` [b l e] and `scale` may be traced; `extra`, whatever the
    network takes beside text, is the same for both. Source: Ho and Salimans 2022 (arXiv 2207.12598), in the
    form of Wan, where scale 1 is no guidance.
    """
    others = () if extra is None else (extra,)
    if negative is None:
        return steered(process, lambda x, timestep: apply(x, timestep, text, *others))
    both, others = jnp.concatenate([negative, text]), _twice(others)
    return steered(process, lambda x, timestep: apply(x, timestep, both, *others), scale)


def steered(
    process: Process, ask: Callable[..., Latents], scale: float | jax.Array | None = None
) -> Denoiser:
    """A denoiser that says what `ask(x, timestep)` says; with a `scale` it is asked of x twice in one batch,
    and what it says of the second is taken `scale` times as far from what it says of the first."""

    def denoise(x: Latents, level: Levels) -> Prediction:
        timestep = process.timestep(level)
        if scale is None:
            return process.read(x, ask(x, timestep), level)
        without, said = jnp.split(ask(*_twice((x, timestep))), 2)
        return process.read(x, without + scale * (said - without), level)

    return denoise


class Generation(NamedTuple):
    """How a network generates clips, but for what may be traced: process, solver, and whether it is guided.

    Parameters are as the network takes them.
    """

    network: Network
    process: Process
    sampler: Sampler
    guided: bool = True

    def told(self, params: dict, prompts: tuple[TextStates, TextStates]) -> Prompt:
        """What every step needs of (text, negative), each [b l e]."""
        text, negative = prompts
        return self.network.told(params, jnp.concatenate([negative, text]) if self.guided else text)

    def begin(self, noise: Latents, canvas: Latents, schedule: Schedule) -> tuple:
        """As `samplers.begin`."""
        return begin(self.process, self.sampler, noise, canvas, schedule)

    def advance(self, params: dict, prompt: Prompt, scale, carry: tuple, schedule: Schedule) -> tuple:
        """As `samplers.advance`, by the network that is told the prompt."""

        def ask(x: Latents, timestep: Levels) -> Latents:
            return self.network.velocity(params, x, timestep, prompt)

        denoise = steered(self.process, ask, scale if self.guided else None)
        return advance(self.process, denoise, self.sampler, carry, schedule)

    def sample(self, params: dict, prompts: tuple, scale, noise, canvas, schedule) -> Latents:
        """The clip [b f h w c]: all of it in one function, to be jitted."""
        carry = self.begin(noise, canvas, schedule)
        return self.advance(params, self.told(params, prompts), scale, carry, schedule)[0]


def _twice(tree):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), tree)
