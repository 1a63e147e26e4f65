"""From noise to video: one scan over the rows of a schedule, and the solvers that take its steps.

A solver sees only frames: levels [b f], latents [b f h w c]. What it remembers is per frame, and `sample`
leaves the latents and the memory of a frame as they are while its level does not fall. So a frame in company
takes exactly the path of the frame alone, and no solver knows of conditioning.

Notation: α, σ of the process; λ = ln α − ln σ; a step goes from `now` to `then`. Updates are written with
α and σ, which are finite everywhere, where papers write λ, which is not at σ = 0 and at α = 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fvdm_jax.process import Prediction, Process, expand, mix
from fvdm_jax.shapes import Latents, Levels, Schedule

Denoiser = Callable[[Latents, Levels], Prediction]


class Sampler(NamedTuple):
    """A solver: `init(x)` makes its memory, `step(process, x, predicted, now, then, state)` moves all frames.

    The memory is a tree of arrays [b f …]. For frames that do not move, a step may return anything finite.
    """

    init: Callable[[Latents], Any]
    step: Callable[[Process, Latents, Prediction, Levels, Levels, Any], tuple[Latents, Any]]


def sample(
    process: Process, denoise: Denoiser, sampler: Sampler, noise: Latents, canvas: Latents, schedule: Schedule
) -> Latents:
    """The clip [b f h w c] that `denoise` finds in the noise along the schedule [s f]; deterministic.

    Canvas and noise are mixed at the first row; frames at level 0 there come out bit-equal to the canvas.
    `noise`, `canvas` (float32) and `schedule` may be traced: one program serves every task of a size.
    """
    x, _ = advance(process, denoise, sampler, begin(process, sampler, noise, canvas, schedule), schedule)
    return x


def begin(process: Process, sampler: Sampler, noise: Latents, canvas: Latents, schedule: Schedule) -> tuple:
    """(x, the solver's memory) before the first row of the schedule [s f], as `advance` takes it."""
    x = mix(process, canvas, noise, jnp.broadcast_to(schedule[0], noise.shape[:2]))
    return x, sampler.init(x)


def advance(process: Process, denoise: Denoiser, sampler: Sampler, carry: tuple, schedule: Schedule) -> tuple:
    """(x, the solver's memory) after the steps from the first row of a schedule [s f] to its last.

    A schedule may be taken in pieces, each beginning with the row at which the one before ended. Clips of a
    batch that fall differently have one of their own each, [s b f].
    """
    steps, frames = len(schedule), schedule.shape[-1]
    levels = jnp.broadcast_to(schedule.reshape(steps, -1, frames), (steps, *carry[0].shape[:2]))

    def move(carry: tuple, step: tuple[Levels, Levels]) -> tuple[tuple, None]:
        (x, state), (now, then) = carry, step
        moved = sampler.step(process, x, denoise(x, now), now, then, state)
        return jax.tree.map(lambda new, old: jnp.where(expand(then < now, old), new, old), moved, carry), None

    return jax.lax.scan(move, carry, (levels[:-1], levels[1:]))[0]


def heading(process: Process, before: Latents, after: Latents, step: Schedule) -> Latents:
    """The clean latents that a step of two rows [2 f] was heading for: where its direction leads to level 0.

    Exactly what was predicted, for Euler. Of a frame that did not move, what its level leaves of it.
    """
    now, then = (expand(jnp.broadcast_to(row, before.shape[:2]), before) for row in step)
    (a, s), (b, t) = ((process.alpha(level), process.sigma(level)) for level in (now, then))
    moved = then < now
    ahead = (s * after - t * before) / jnp.where(moved, s * b - t * a, 1.0)
    return jnp.where(moved, ahead, a * before)


def _euler_step(
    process: Process, x: Latents, predicted: Prediction, now: Levels, then: Levels, state: tuple
) -> tuple[Latents, tuple]:
    return mix(process, predicted.clean, predicted.noise, then), state


euler = Sampler(lambda x: (), _euler_step)
"""x' = α(l')·clean + σ(l')·noise: Euler for flow, DDIM for DDPM (arXiv 2010.02502, eq. 12 with η = 0)."""


class Past(NamedTuple):
    """What a multistep solver remembers of each frame: how many steps it took, and where they began.

    Of the pairs, 0 is the last step and 1 the one before; neither means anything until that step is taken.
    """

    steps: jax.Array
    level: tuple[Levels, Levels]
    clean: tuple[Latents, Latents]
    x: Latents


def _no_past(x: Latents) -> Past:
    level, clean = jnp.zeros(x.shape[:2], x.dtype), jnp.zeros_like(x)
    return Past(jnp.zeros(x.shape[:2], jnp.int32), (level, level), (clean, clean), clean)


def _remember(past: Past, level: Levels, clean: Latents, x: Latents) -> Past:
    return Past(past.steps + 1, (level, past.level[0]), (clean, past.clean[0]), x)


def _log_snr(process: Process, level: Levels) -> Levels:
    """λ, and something finite where it is infinite: those who use it choose by level."""
    alpha, sigma = process.alpha(level), process.sigma(level)
    return jnp.log(jnp.where(alpha > 0, alpha, 1.0)) - jnp.log(jnp.where(sigma > 0, sigma, 1.0))


def _ratio(above: Levels, below: Levels, usable: jax.Array) -> Levels:
    """above / below where usable, 0 elsewhere."""
    # The denominator is made safe before the result is masked: gradients pass through both branches.
    return jnp.where(usable, above / jnp.where(usable, below, 1.0), 0.0)


def _carry_over(process: Process, now: Levels, then: Levels) -> tuple[Levels, Levels]:
    """The weights of x and of the clean latents in the exact step for constant clean latents.

    They are σ'/σ and −α'·expm1(λ − λ'), the latter as α' − α·σ'/σ: exact at both ends of the path.
    """
    kept = _ratio(process.sigma(then), process.sigma(now), process.sigma(now) > 0)
    return kept, process.alpha(then) - process.alpha(now) * kept


def _multistep(
    process: Process, x: Latents, clean: Latents, now: Levels, then: Levels, past: Past
) -> Latents:
    """The second-order step of DPM-Solver++ 2M and UniPC; of first order without a past, and to level 0."""
    kept, new = _carry_over(process, now, then)
    before, at, after = (_log_snr(process, level) for level in (past.level[0], now, then))
    usable = (past.steps > 0) & (process.alpha(past.level[0]) > 0) & (then > 0) & (at > before)
    slope = _ratio(after - at, at - before, usable)
    change = expand(slope / 2, x) * (clean - past.clean[0])
    return expand(kept, x) * x + expand(new, x) * (clean + change)


def _dpmpp_step(
    process: Process, x: Latents, predicted: Prediction, now: Levels, then: Levels, past: Past
) -> tuple[Latents, Past]:
    new = _multistep(process, x, predicted.clean, now, then, past)
    return new, _remember(past, now, predicted.clean, x)


dpmpp_2m = Sampler(_no_past, _dpmpp_step)
"""DPM-Solver++ 2M, midpoint (arXiv 2211.01095, algorithm 2), as in Wan's FlowDPMSolverMultistepScheduler.

Where the path started at α = 0 the second step is first order: λ was −∞, and the correction vanishes.
"""


def _corrector_weights(process: Process, now: Levels, past: Past) -> tuple[Levels, Levels]:
    """Weights [b f] of the older and of the newest change of the clean latents in UniPC's corrector (bh2).

    The solution of [[1, 1], [r, 1]]·ρ = [g₁, 2·g₂]/B with 1/r in place of r, which stays finite where the
    path started at α = 0; ½ for the newest alone after a first step.
    """
    older, last, at = (_log_snr(process, level) for level in (past.level[1], past.level[0], now))
    second = (past.steps > 1) & (at > last)
    h = jnp.where(second, at - last, 1.0)
    b = jnp.expm1(-h)
    g1 = -b / h - 1
    g2 = -g1 / h - 0.5
    inverse = _ratio(h, older - last, second & (process.alpha(past.level[1]) > 0) & (last > older))
    rho = inverse * (2 * g2 - g1) / (b * (1 - inverse))
    return inverse * rho, jnp.where(second, g1 / b - rho, 0.5)


def _corrected(process: Process, x: Latents, clean: Latents, now: Levels, past: Past) -> Latents:
    """x as it would be had the step that led to it known the clean latents predicted at its end."""
    kept, new = _carry_over(process, past.level[0], now)
    older, newest = (expand(weight, x) for weight in _corrector_weights(process, now, past))
    change = older * (past.clean[1] - past.clean[0]) + newest * (clean - past.clean[0])
    corrected = expand(kept, x) * past.x + expand(new, x) * (past.clean[0] + change)
    return jnp.where(expand(past.steps, x) > 0, corrected, x)


def _unipc_step(
    process: Process, x: Latents, predicted: Prediction, now: Levels, then: Levels, past: Past
) -> tuple[Latents, Past]:
    x = _corrected(process, x, predicted.clean, now, past)
    new = _multistep(process, x, predicted.clean, now, then, past)
    return new, _remember(past, now, predicted.clean, x)


unipc = Sampler(_no_past, _unipc_step)
"""UniPC of order 2 with its corrector, bh2, on predictions of the clean latents (arXiv 2302.04867).

As in Wan's FlowUniPCMultistepScheduler: the first and the last step are first order, every step but the first
begins with the corrector, and the network is not asked again at the corrected latents.
"""

SAMPLERS = {"euler": euler, "dpm++": dpmpp_2m, "unipc": unipc}
"""The solvers by name."""
