"""From a network to a denoiser: what it is told, and how strongly it is made to listen."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvdm_jax.lora import Network
from fvdm_jax.process import Prediction, Process
from fvdm_jax.samplers import Denoiser, Sampler, sample
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
    both = text if negative is None else jnp.concatenate([negative, text])

    def denoise(x: Latents, level: Levels) -> Prediction:
        timestep = process.timestep(level)
        if negative is None:
            return process.read(x, apply(x, timestep, text, *others), level)
        without, said = jnp.split(apply(*_twice((x, timestep)), both, *_twice(others)), 2)
        return process.read(x, without + scale * (said - without), level)

    return denoise


class Generation(NamedTuple):
    """How clips are generated, but for what may be traced: process, solver, and whether guidance is used."""

    process: Process
    sampler: Sampler
    guided: bool = True

    def program(self, network: Network, observe: Callable[[], None] | None = None) -> Callable[..., Latents]:
        """(params, (text, negative), scale, noise, canvas, schedule) → latents [b f h w c], to be jitted.

        `params` are as `network` takes them; `observe` is called at every step.
        """

        def program(params, prompts, scale, noise: Latents, canvas: Latents, schedule: Schedule) -> Latents:
            text, negative = prompts
            # What the layers make of the prompts is the same at every step.
            prompt = network.told(params, jnp.concatenate([negative, text]) if self.guided else text)

            def apply(x: Latents, timestep: Levels, _) -> Latents:
                return network.velocity(params, x, timestep, prompt)

            denoise = guided(self.process, apply, text, negative if self.guided else None, scale)

            def observed(x: Latents, level: Levels) -> Prediction:
                jax.debug.callback(observe)
                return denoise(x, level)

            return sample(
                self.process, observed if observe else denoise, self.sampler, noise, canvas, schedule
            )

        return program


def _twice(tree):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), tree)
