"""From a network to a denoiser: what it is told, and how strongly it is made to listen."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fvdm_jax import caching, conditioning, sharding
from fvdm_jax.lora import Network
from fvdm_jax.models.dit import NO_EXTRA, Extra, Prompt
from fvdm_jax.process import Prediction, Process, expand, mix
from fvdm_jax.samplers import Denoiser, Sampler, advance, begin
from fvdm_jax.shapes import Latents, Levels, Schedule, TextStates

Apply = Callable[..., Latents]
"""A network with its parameters: (x, timestep, text) → output, and `extra` after them where it takes one."""


class Weights(NamedTuple):
    """How strongly a network is made to listen: numbers, which may be traced.

    `text`: how far past the negative prompt, at levels from `low` to `high`; elsewhere 1, which is no
    guidance. `history`: how far past not knowing the clean frames, of which it is told at level `shown`; 1 is
    no guidance. `rescale`: how much of the contrast that guidance by text adds is taken back, 0 … 1.
    `context`: the noise level at which it is shown, and told of, frames that are clean and stay so, times the
    largest level of any frame to the `power`; 0 shows them as they are.
    Sources: Ho and Salimans 2022 (arXiv 2207.12598), in the form of Wan, where 1 is no guidance; Kynkäänniemi
    et al. 2024 (arXiv 2404.07724) for the interval; Lin et al. 2023 (arXiv 2305.08891), eq. 15 and 16, for
    `rescale`, here on the network's output; Song et al. 2025 (arXiv 2502.06764) for history. For `context`
    Diffusion Forcing (arXiv 2407.01392), whose stabilisation is 0.01 to 0.015, and SkyReels-V2 (arXiv
    2504.13074), 0.02 for what is given only, with new noise at every step; LTX-Video (arXiv 2501.00103) has a
    power of 2, adds the noise to clean latents that stay whole, and does not tell of it.
    """

    text: float | jax.Array = 1.0
    history: float | jax.Array = 1.0
    shown: float | jax.Array = 0.0
    low: float | jax.Array = 0.0
    high: float | jax.Array = 1.0
    rescale: float | jax.Array = 0.0
    context: float | jax.Array = 0.0
    power: float | jax.Array = 0.0

    def seen(self, level: Levels) -> Levels:
        """The level at which clean frames are shown beside these: [b 1]."""
        largest = level.max(axis=1, keepdims=True)
        # A power of 0 has no slope at 0.
        return self.context * jnp.where(largest > 0, largest, 1.0) ** self.power


Scale = float | jax.Array | Weights
"""Weights, or the number that is their `text`."""


class Looks(NamedTuple):
    """What a network is asked at a step beside the clip itself: with the prompt, and of its history.

    History are the frames that are clean at that step, in `windows` parts of equal length; 0 for no guidance
    by it. The rows of a clip lie one after the other, so that they are where the clip is on a mesh.
    """

    text: bool = True
    windows: int = 0

    @property
    def count(self) -> int:
        """How many rows there are."""
        return 1 + self.text + (self.windows + 1 if self.windows else 0)

    def told(self, text: TextStates, negative: TextStates) -> TextStates:
        """What each row is told: the prompt in the one that is there for it, or everywhere."""
        if not self.text:
            return _abreast([text] * self.count)
        return _abreast([negative, text, *[negative] * (self.count - 2)])

    def repeated(self, tree):
        """What is the same in all rows, [b …], for each of them."""
        return jax.tree.map(lambda leaf: _abreast([leaf] * self.count), tree)

    def rows(
        self, process: Process, x: Latents, level: Levels, shown, context=0.0
    ) -> list[tuple[Latents, Levels]]:
        """(x, level) of each row; history that is told of is at level `shown`, what is hidden is noise.

        Elsewhere, and where that is more, clean frames are at level `context`. Noise is that of the place in
        the clip, the same at all steps.
        """
        clean = level == 0

        def at(levels, key: jax.Array) -> tuple[Latents, Levels]:
            levels = jnp.where(clean, levels, level)
            noise = jnp.broadcast_to(jax.random.normal(key, x.shape[1:]), x.shape)
            return jnp.where(expand(clean, x), mix(process, x, noise, levels), x), levels

        # No seed's: a frame that has become clean would be shown in the noise that it came from.
        own = jax.random.fold_in(jax.random.key(0), 2**31)
        plain = [at(context, own)] * (1 + self.text)
        if not self.windows:
            return plain
        place = jnp.cumsum(clean, axis=1) - 1
        part = place * self.windows // jnp.maximum(clean.sum(1, keepdims=True), 1)
        known, key = jnp.maximum(shown, context), jax.random.key(0)
        windows = (at(jnp.where(part == i, known, 1.0), key) for i in range(self.windows))
        return [*plain, at(1.0, key), *windows]


def _abreast(parts: Sequence[jax.Array]) -> jax.Array:
    """Rows [b·n …] of n parts [b …]: all of the first clip, then all of the second."""
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def guided(
    process: Process,
    apply: Apply,
    text: TextStates,
    negative: TextStates | None = None,
    scale: Scale = 1.0,
    extra=None,
) -> Denoiser:
    """A denoiser that says what the network says of `text`, taken `scale` times as far from `negative`.

    output = negative + scale·(text − negative), both asked in one batch; without `negative` only `text` is
    asked and `scale` is not used. `text`, `negative` [b l e] and `scale` may be traced; `extra`, whatever the
    network takes beside text, is the same for both.
    """
    others = () if extra is None else (extra,)
    if negative is None:
        return steered(process, lambda x, timestep: apply(x, timestep, text, *others))
    both, others = _abreast([negative, text]), Looks().repeated(others)
    return steered(process, lambda x, timestep: apply(x, timestep, both, *others), scale)


def steered(
    process: Process, ask: Callable[..., Latents], scale: Scale | None = None, looks: Looks | None = None
) -> Denoiser:
    """A denoiser that says what `ask(x, timestep)` says of a batch of rows, put together by `scale`.

    The rows are those of `looks`, each as many clips as x has: x itself, a second time with guidance by text,
    and for guidance by history x with all clean frames hidden in noise, and with each window of them shown.
    """
    output = heard(process, ask, scale, looks)

    def denoise(x: Latents, level: Levels) -> Prediction:
        return process.read(x, output(x, level), level)

    return denoise


def heard(
    process: Process, ask: Callable[..., Latents], scale: Scale | None = None, looks: Looks | None = None
) -> Callable[[Latents, Levels], Latents]:
    """What `steered` reads: the output for x at a level that is put together of those for all rows."""
    looks = looks or Looks(scale is not None)
    weights = scale if isinstance(scale, Weights) else Weights(1.0 if scale is None else scale)

    def output(x: Latents, level: Levels) -> Latents:
        seen = looks.rows(process, x, level, weights.shown, weights.seen(level))
        xs, levels = (_abreast(part) for part in zip(*seen, strict=True))
        told = ask(xs, process.timestep(levels))
        said = jnp.unstack(told.reshape(-1, len(seen), *told.shape[1:]), axis=1)
        made = said[0]
        if looks.text:
            inside = (level >= weights.low) & (level <= weights.high)
            made = said[0] + expand(jnp.where(inside, weights.text, 1.0), x) * (said[1] - said[0])
            made = made * _contrast(said[1], made, level, weights.rescale)
        if looks.windows:
            nothing, *windows = said[1 + looks.text :]
            # Of fewer clean frames than windows some show nothing, which is no history.
            shown = jnp.clip(jnp.sum(level == 0, axis=1, keepdims=True, dtype=x.dtype), 1, looks.windows)
            more = sum(window - nothing for window in windows) / expand(shown, x)
            made = made + (weights.history - 1) * more
        return made

    return output


def _contrast(like: Latents, output: Latents, level: Levels, rescale) -> Float[Array, "b 1 1 1 1"]:
    """What to multiply `output` by, so that it spreads more as `like` does over frames that are not clean."""
    moving = expand(level > 0, output)

    def spread(y: Latents) -> Array:
        return jnp.std(y, axis=(1, 2, 3, 4), where=jnp.broadcast_to(moving, y.shape), keepdims=True)

    wide, wanted = spread(output), spread(like)
    # Where every frame is clean there is nothing to spread, and no number is greater than 0.
    ratio = jnp.where(wide > 0, wanted / jnp.where(wide > 0, wide, 1.0), 1.0)
    return rescale * ratio + (1 - rescale)


class Told(NamedTuple):
    """What the steps of a sampler share: the Prompt of every row, and the channels that join x's, if any."""

    prompt: Prompt
    channels: Latents | None = None


class Generation(NamedTuple):
    """How a network generates clips, but for what may be traced: process, solver, and what it is asked.

    Parameters are as the network takes them.
    """

    network: Network
    process: Process
    sampler: Sampler
    looks: Looks = Looks()

    def told(self, params: dict, prompts: tuple[TextStates, TextStates], extra: Extra = NO_EXTRA) -> Told:
        """What every step needs of (text, negative), each [b l e], and of `extra`, which all rows are given.

        Raises ValueError where `extra` is not what the network takes.
        """
        conditioning.check(self.network.config, extra)
        extra = self.looks.repeated(extra)
        channels = extra.channels
        if channels is not None:
            channels = sharding.constrained(channels, sharding.CLIPS)
        return Told(self.network.told(params, self.looks.told(*prompts), extra), channels)

    def begin(self, noise: Latents, canvas: Latents, schedule: Schedule) -> tuple:
        """As `samplers.begin`."""
        return begin(self.process, self.sampler, noise, canvas, schedule)

    def advance(self, params: dict, told: Told, scale: Scale, carry: tuple, schedule: Schedule) -> tuple:
        """As `samplers.advance`, by the network that is told so much."""
        denoise = steered(self.process, self._asking(params, told), scale, self.looks)
        return advance(self.process, denoise, self.sampler, carry, schedule)

    def cached(
        self, params: dict, told: Told, scale: Scale, carry: tuple, schedule: Schedule, call: jax.Array
    ) -> tuple:
        """As `advance` for one step, from row to row of a schedule [2 f], at which the network may be spared.

        Third in the carry is the output that was last read, [b f h w c], anything before the first step; it
        is read again unless `call`, a bool, which may be traced.
        """
        x, state, last = carry
        now = jnp.broadcast_to(schedule[0], x.shape[:2])
        ask = heard(self.process, self._asking(params, told), scale, self.looks)
        output = jax.lax.cond(call, lambda: ask(x, now), lambda: last)

        def denoise(x: Latents, level: Levels) -> Prediction:
            return self.process.read(x, output, level)

        return *advance(self.process, denoise, self.sampler, (x, state), schedule), output

    def changes(self, params: dict, rows: Schedule) -> Float[Array, "s f"]:
        """As `caching.changes`, by which it is planned at which steps the network is called."""
        return caching.changes(self.network, self.process, params, rows)

    def _asking(self, params: dict, told: Told) -> Callable[[Latents, Levels], Latents]:
        def ask(x: Latents, timestep: Levels) -> Latents:
            return self.network.velocity(params, x, timestep, told.prompt, Extra(told.channels))

        return ask

    def sample(self, params: dict, prompts: tuple, scale: Scale, noise, canvas, schedule) -> Latents:
        """The clip [b f h w c]: all of it in one function, to be jitted."""
        carry = self.begin(noise, canvas, schedule)
        return self.advance(params, self.told(params, prompts), scale, carry, schedule)[0]
