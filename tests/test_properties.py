"""Twelve properties that hold whatever the values, each tried with 200 of them.

Shapes are few and values many: every program is compiled once. The values are the same at every run.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdm_jax import levels, weights, zoo
from fvdm_jax.models.dit import FREQUENCIES, DiT, abstract
from fvdm_jax.models.layers import sinusoid
from fvdm_jax.process import PROCESSES, Prediction, expand, flow, mix
from fvdm_jax.samplers import SAMPLERS, advance, begin, sample
from fvdm_jax.schedule import SPACINGS, pusa, schedule
from fvdm_jax.schedule import sigmas as wan
from fvdm_jax.steps import key
from fvdm_jax.training import Batch, Objective, noised

pytestmark = pytest.mark.thorough

FRAMES, STEPS = 5, 6
SHAPE = (2, FRAMES, 2, 2, 3)

many = settings(max_examples=200, derandomize=True, deadline=None, database=None)
unit = st.floats(0, 1, width=32, allow_subnormal=False)
shifts = st.floats(0.05, 50, allow_subnormal=False)
parts = st.one_of(st.sampled_from([0.0, 1.0]), unit)
solvers, processes = st.sampled_from(sorted(SAMPLERS)), st.sampled_from(["flow", "ddpm"])
seeds = st.integers(0, 2**64 - 1)
ODD = np.float32([0, -0.0, 1, -1, 1e-30, -8, 3e4, 1e30])


def strengths(frames: int = FRAMES):
    """How much each frame takes part in, [f]."""
    return st.lists(parts, min_size=frames, max_size=frames).map(np.float32)


@st.composite
def named(draw) -> str:
    """A schedule of the zoo with options."""
    name, most = draw(st.sampled_from(sorted(zoo.ZOO))), {"seed": 99, "lag": 7}
    known = {"pyramid": ["lag"], "trapezoid": ["lag"], "autoregressive": ["block", "first"],
             "ad": ["lag", "block"], "chunks": ["chunk", "flight"], "rolling": ["window"],
             "lattice": ["block"], "random": ["seed", "lag"], "budget": ["last"]}.get(name, [])  # fmt: skip
    given = [option for option in known if draw(st.booleans())]
    told = [f"{option}={draw(st.integers(option not in most, most.get(option, 9)))}" for option in given]
    return f"{name}:{','.join(told)}" if told else name


def clips(seed: int) -> np.ndarray:
    """Two clips of normal numbers, [2 b f h w c]."""
    return np.random.default_rng(seed).normal(size=(2, *SHAPE)).astype(np.float32)


def odd(seed: int) -> np.ndarray:
    """The same, with some of the numbers at which rounding and signs go wrong."""
    drawn, rng = clips(seed), np.random.default_rng(seed)
    return np.where(rng.random(drawn.shape) < 0.2, rng.choice(ODD, drawn.shape), drawn)


def social(process, x: jax.Array, level: jax.Array) -> Prediction:
    """A made-up network in which every frame feels the largest value of its clip."""
    seen = x + 0.1 * x.max((1, 2, 3, 4), keepdims=True)
    return process.read(x, jnp.tanh(1.3 * seen) * (0.5 + expand(level, x)), level)


def alone(process, x: jax.Array, level: jax.Array) -> Prediction:
    """One that sees each frame by itself."""
    return process.read(x, x * (0.5 + expand(level, x)) - 0.25, level)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(process: str, solver: str, network, noise, canvas, rows):
    process = PROCESSES[process]
    return sample(process, partial(network, process), SAMPLERS[solver], noise, canvas, rows)


def padded(rows: np.ndarray, length: int = 1 + STEPS + 9) -> np.ndarray:
    """The schedule with idle rows at its end, so that all of them are one program's."""
    return np.asarray(rows)[np.minimum(np.arange(length), len(rows) - 1)]


@st.composite
def schedules(draw) -> np.ndarray:
    """Rows [s f] of any strengths and delays."""
    delay = draw(st.lists(st.integers(0, 9), min_size=FRAMES, max_size=FRAMES))
    table = draw(st.sampled_from(sorted(SPACINGS)))
    rows = SPACINGS[table](STEPS, draw(shifts))[zoo.delayed(delay, STEPS)] * draw(strengths())
    return padded(rows)


@many
@given(named(), st.sampled_from(sorted(SPACINGS)), st.integers(1, 30), shifts, st.integers(1, 9), st.data())
def test_1_levels_lie_in_0_to_1_never_rise_and_end_at_exactly_0(name, table, steps, shift, frames, data):
    strength, settled = data.draw(strengths(frames)), data.draw(st.none() | strengths(frames))
    rows = zoo.levels(name, SPACINGS[table](steps, shift), strength, settled)
    assert rows.min() >= 0 and rows.max() <= 1 and rows.dtype == np.float32
    assert np.all(np.diff(rows, axis=0) <= 0) and np.all(rows[-1] == 0)
    if settled is None and len(rows) > 1:
        zoo.check(rows)


@many
@given(st.sampled_from(["pusa", "ddpm"]), st.sampled_from([1, 2, 40]), shifts, strengths(), named())
def test_2_the_first_level_is_exactly_the_strength(table, steps, shift, strength, name):
    sigmas = SPACINGS[table](steps, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert np.array_equal(schedule(sigmas, strength)[0], strength)
    assert np.array_equal(zoo.levels(name, sigmas, strength)[0], strength)
    assert levels.shifted(lambda *_: np.float32([[0, 1]]), shift)(None, 1, 2).tolist() == [[0, 1]]


CONFIG = dataclasses.replace(small.NETWORKS.dit, layers=1)


@cache
def network():
    """A small transformer of random weights, jitted: (x, timestep, text)."""
    return jax.jit(partial(DiT(CONFIG).apply, {"params": small.drawn(abstract(CONFIG))}))


TEXT = np.random.default_rng(2).normal(size=(2, 3, CONFIG.text_width)).astype(np.float32)
WIDE = (2, 3, 4, 4, CONFIG.channels_in)


@jax.jit
def embedded(timestep):
    return sinusoid(timestep, FREQUENCIES)


@partial(jax.jit, static_argnums=0)
def moved(solver, x, canvas, now, then):
    """One step, and the noising of the canvas."""
    predicted, sampler = social(flow, x, jnp.broadcast_to(now, x.shape[:2])), SAMPLERS[solver]
    return sampler.step(flow, x, predicted, now, then, sampler.init(x))[0], mix(flow, canvas, x, now)


@many
@given(seeds, unit, unit, solvers)
def test_3_equal_levels_are_the_scalar_model_bit_for_bit(seed, one, other, solver):
    noise, canvas = clips(seed)
    low, high = (np.full((2, 1), level, np.float32) for level in sorted((one, other)))
    every = [np.repeat(level, FRAMES, 1) for level in (high, low)]
    for vector, scalar in zip(
        moved(solver, noise, canvas, *every), moved(solver, noise, canvas, high, low), strict=True
    ):
        assert np.array_equal(vector, scalar)
    timestep = 1000 * high
    assert np.array_equal(embedded(every[0] * 1000), np.repeat(embedded(timestep), FRAMES, 1))
    x = np.random.default_rng(seed).normal(size=WIDE).astype(np.float32)
    assert np.array_equal(network()(x, np.repeat(timestep, 3, 1), TEXT), network()(x, timestep, TEXT))


@many
@given(seeds, schedules(), solvers, processes)
def test_4_a_clean_frame_never_changes_bit_for_bit(seed, rows, solver, process):
    noise, canvas = clips(seed)[0], odd(seed)[1]
    kept = rows[0] == 0
    made = np.asarray(run(process, solver, social, noise, canvas, rows))
    assert np.all(np.isfinite(made))
    assert made[:, kept].tobytes() == canvas[:, kept].tobytes()


@many
@given(seeds, schedules(), solvers, processes, st.permutations(range(FRAMES)))
def test_5_the_sampler_commutes_with_the_order_of_frames(seed, rows, solver, process, order):
    straight = run(process, solver, social, *clips(seed), rows)
    turned = run(process, solver, social, *clips(seed)[:, :, order], rows[:, order])
    assert np.array_equal(np.asarray(straight)[:, order], turned)


@partial(jax.jit, static_argnums=(0, 1))
def exactly(process, solver, noise, canvas, rows):
    """How far x is from the marginal after every step, [s], by a network that knows clip and noise."""
    process, sampler = PROCESSES[process], SAMPLERS[solver]

    def denoise(x, level):
        return process.read(x, process.target(canvas, noise, level), level)

    def step(carry, pair):
        carry = advance(process, denoise, sampler, carry, pair)
        right = mix(process, canvas, noise, jnp.broadcast_to(pair[1], SHAPE[:2]))
        return carry, jnp.abs(carry[0] - right).max()

    pairs = jnp.stack([rows[:-1], rows[1:]], 1)
    return jax.lax.scan(step, begin(process, sampler, noise, canvas, rows), pairs)[1]


@many
@given(seeds, schedules(), solvers, processes)
def test_6_the_exact_network_brings_noise_to_data_along_the_marginals(seed, rows, solver, process):
    noise, canvas = clips(seed)
    # DDPM reads the clip by dividing by α, which is 0.0064 at noise: 157 roundings of one.
    assert exactly(process, solver, noise, canvas, rows).max() < (2e-5 if process == "flow" else 2e-3)
    assert not rows[-1].any(), "the last marginal is the clip itself"


@many
@given(st.sampled_from(sorted(SPACINGS)), st.integers(1, 60), shifts, shifts)
def test_7_a_larger_shift_is_never_less_noisy(table, steps, one, other):
    less, more = sorted((one, other))
    assert np.all(SPACINGS[table](steps, more) >= SPACINGS[table](steps, less))
    levels_at = np.linspace(0, 1, 33, dtype=np.float32)[None]
    few, many = (levels.shifted(lambda *_: levels_at, shift)(None, 1, 33) for shift in (less, more))
    assert np.all(many >= few)


@many
@given(seeds, st.sampled_from([1, FRAMES]), st.integers(1, 3), st.sampled_from([wan, pusa]), st.data())
def test_8_one_step_one_frame_and_nothing_to_generate_are_defined(seed, frames, steps, table, data):
    solver, process = data.draw(solvers), data.draw(processes)
    strength = data.draw(st.sampled_from([np.zeros(frames, np.float32)]) | strengths(frames))
    noise, canvas = clips(seed)[:, :, :frames]
    rows = table(1, data.draw(shifts))[:, None] * strength
    made = np.asarray(run(process, solver, social, noise, canvas, rows))
    assert np.all(np.isfinite(made)) and np.array_equal(made[:, strength == 0], canvas[:, strength == 0])
    assert len(zoo.levels("together", table(steps, 5.0), strength)) == 1 + steps * bool(strength.any())


@many
@given(seeds, schedules(), solvers, processes, st.integers(1, FRAMES - 1))
def test_9_padding_changes_nothing_else(seed, rows, solver, process, frames):
    """Frames and clips beside those that matter, whatever is in them and whenever they move."""
    noise, canvas = clips(seed)
    other, beside = clips(seed ^ 1)
    whole = run(process, solver, alone, noise, canvas, rows)
    other[:1, :frames], beside[:1, :frames] = noise[:1, :frames], canvas[:1, :frames]
    fewer = np.array(rows)
    fewer[:, frames:] = 0
    assert np.array_equal(run(process, solver, alone, other, beside, fewer)[:1, :frames], whole[:1, :frames])
    # Within the network frames meet, clips do not.
    x, y = np.random.default_rng(seed).normal(size=(2, *WIDE)).astype(np.float32)
    y[0], level = x[0], 1000 * rows[:2, :3]
    text = np.stack([TEXT[0], 3 * TEXT[1]])
    changed = np.stack([level[0], 1000 - level[1]])
    assert np.array_equal(network()(x, level, TEXT)[0], network()(y, changed, text)[0])


noising = jax.jit(mix, static_argnums=0)


@many
@given(seeds, strengths(), processes)
def test_10_noising_at_0_and_1_is_data_and_noise_exactly(seed, level, process):
    (clean, noise), level = odd(seed), np.stack([level, 1 - level])
    mixed = np.asarray(noising(PROCESSES[process], clean, noise, level))
    assert mixed[level == 0].tobytes() == clean[level == 0].tobytes()
    if process == "flow":
        # DDPM's α is never 0.
        assert np.array_equal(mixed[level == 1], noise[level == 1])
    assert np.all(np.isfinite(mixed))


OBJECTIVE = Objective(flow, levels.constant(levels.ptss), weights.uniform, dropout=0.5)


@partial(jax.jit, static_argnums=1)
def draws(seed_key, clips: int):
    batch = Batch(jnp.zeros((clips, 3, 2, 2, 4)), jnp.ones((clips, 2, 3)), jnp.zeros((2, 3)))
    made = noised(OBJECTIVE, batch, jnp.int32(0), seed_key)
    return made.noise, made.level, made.text


@many
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_11_a_clips_draws_are_its_own_and_every_bit_of_a_seed_counts(low, high):
    few, more = (draws(key(low), clips) for clips in (2, 5))
    assert all(np.array_equal(small, large[:2]) for small, large in zip(few, more, strict=True))
    high = max(high, 1)
    assert not np.array_equal(draws(key(low + (high << 32)), 2)[0], few[0])
    assert not np.array_equal(jax.random.key_data(key(low + (high << 32))), jax.random.key_data(key(low)))


COUNT = 2000
LAWS = {
    "scalar": (levels.scalar, lambda u: u),
    "per frame": (levels.per_frame, lambda u: u),
    "ptss": (levels.ptss, lambda u: u),
    "copula": (partial(levels.copula, correlation=0.5), lambda u: u),
    # The shift's inverse is the shift by its inverse.
    "shifted": (levels.shifted(levels.ptss, 5.0), lambda u: u / (u + (1 - u) * 5)),
}
DRAW = {name: jax.jit(lambda key, draw=draw: draw(key, COUNT, 3)[:, 1]) for name, (draw, _) in LAWS.items()}


@jax.jit
def weighed(level):
    """The weight of these levels by every weight, for every process."""
    return [weight(process)(level) for weight in weights.WEIGHTS.values() for process in PROCESSES.values()]


def distance(samples: np.ndarray, law) -> float:
    """Kolmogorov and Smirnov's: the largest gap between the samples and the law that they should follow."""
    steps = np.arange(len(samples) + 1) / len(samples)
    expected = law(np.sort(samples.astype(np.float64)))
    return max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())


@many
@given(st.sampled_from(sorted(LAWS)), seeds, strengths(9))
def test_12_levels_follow_their_law_and_weights_are_finite(name, seed, level):
    # 2000 draws of the law are farther from it once in 130,000 times; 200 are tried.
    assert distance(np.asarray(DRAW[name](key(seed))), LAWS[name][1]) < 2.5 / COUNT**0.5
    for found in weighed(level[None]):
        assert np.all(np.isfinite(found)) and np.min(found) >= 0
