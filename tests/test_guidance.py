import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gaussian import CANVAS, COVARIANCE, FRAMES, NOISE, distance, exact, strengths

from fvdm_jax import zoo
from fvdm_jax.guidance import Looks, Weights, guided, heard, steered
from fvdm_jax.process import ddpm, flow
from fvdm_jax.samplers import euler, sample, unipc
from fvdm_jax.schedule import pusa, schedule

X, TEXT, NEGATIVE = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(2, 3, 4, 4, 2), (2, 5, 6), (2, 5, 6)])
)
LEVEL = jnp.array([[0.0, 0.5, 1.0], [0.2, 0.2, 0.9]])


def apply(x, timestep, text, extra=0.0):
    """A network that uses all it is given."""
    told = jnp.tanh(text.mean((1, 2)))[:, None, None, None, None]
    return x * told + timestep[:, :, None, None, None] / 1000 + extra


def test_guidance_goes_from_the_negative_prompt_past_the_prompt():
    timestep = flow.timestep(LEVEL)
    said, without = apply(X, timestep, TEXT), apply(X, timestep, NEGATIVE)
    golden = flow.read(X, without + 3.0 * (said - without), LEVEL)
    ours = guided(flow, apply, TEXT, NEGATIVE, 3.0)(X, LEVEL)
    for part, expected in zip(ours, golden, strict=True):
        np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5)


def test_scale_1_and_no_negative_are_no_guidance():
    alone = guided(flow, apply, TEXT)(X, LEVEL)
    for part, expected in zip(guided(flow, apply, TEXT, NEGATIVE, 1.0)(X, LEVEL), alone, strict=True):
        np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5)


def test_the_network_is_asked_once_a_step_at_its_own_timesteps():
    asked = []

    def watching(x, timestep, text, extra):
        asked.append((x.shape, timestep, text.shape, extra.shape))
        return apply(x, timestep, text, extra)

    guided(ddpm, watching, TEXT, NEGATIVE, 2.0, extra=jnp.zeros_like(X))(X, LEVEL)
    ((x, timestep, text, extra),) = asked
    assert x == (4, 3, 4, 4, 2) == extra and text == (4, 5, 6)
    assert np.array_equal(timestep, np.repeat(ddpm.timestep(LEVEL), 2, 0))


def test_the_scale_may_be_traced():
    run = jax.jit(lambda scale: guided(flow, apply, TEXT, NEGATIVE, scale)(X, LEVEL).clean)
    expected = guided(flow, apply, TEXT, NEGATIVE, 5.0)(X, LEVEL).clean
    np.testing.assert_allclose(run(5.0), expected, rtol=0, atol=1e-5)


def test_outside_of_its_interval_there_is_no_guidance():
    weights = Weights(3.0, low=0.4, high=0.95)
    made, full, none = (
        guided(flow, apply, TEXT, NEGATIVE, scale)(X, LEVEL).clean for scale in (weights, 3.0, 1.0)
    )
    inside = (np.asarray(LEVEL) >= 0.4) & (np.asarray(LEVEL) <= 0.95)
    assert 0 < inside.sum() < inside.size
    assert np.array_equal(made[inside], full[inside]) and np.array_equal(made[~inside], none[~inside])


def test_rescaling_gives_the_output_the_spread_of_the_prompts():
    def output(x, timestep, text):
        return x * text.mean((1, 2))[:, None, None, None, None]

    level = jnp.full((2, 3), 0.5)
    said, plain, half, whole = (
        np.asarray(guided(flow, output, TEXT, NEGATIVE, scale)(X, level).clean - X)
        for scale in (1.0, 4.0, Weights(4.0, rescale=0.5), Weights(4.0, rescale=1.0))
    )
    spread = said.std((1, 2, 3, 4))
    np.testing.assert_allclose(whole.std((1, 2, 3, 4)), spread, rtol=1e-4)
    np.testing.assert_allclose(half, (plain + whole) / 2, rtol=0, atol=1e-4)
    # Where nothing moves nothing is divided by 0.
    still = guided(flow, output, TEXT, NEGATIVE, Weights(4.0, rescale=1.0))(X, 0 * level)
    assert np.all(np.isfinite(still.clean))


CORRELATION = 0.8


def known(x, timestep):
    """The exact velocity for two frames of one number each: unit Gaussians that correlate."""
    level = timestep / 1000
    alpha = 1 - level
    truth = jnp.array([[1, CORRELATION], [CORRELATION, 1]])
    noisy = alpha[:, :, None] * truth * alpha[:, None] + jax.vmap(jnp.diag)(level**2)
    rest = jnp.linalg.solve(noisy, x[..., 0, 0])
    clean = jnp.einsum("nm,bm,bmc->bnc", truth, alpha, rest)
    return (level[..., None] * rest - clean)[..., None, None]


def led(weight: float, windows: int = 1, steps: int = 400, shown: float = 0.0) -> tuple[float, float]:
    """Of the second frame, the first being given: how much of it and of its own noise is in what is made."""
    units = jnp.eye(2)[:, :, None, None, None]
    canvas, noise = units[:1] * jnp.array([[1.0], [0.0]])[..., None, None, None], units[1:]
    canvas, noise = jnp.concatenate([canvas[:1], 0 * canvas[:1]]), jnp.concatenate([0 * noise, noise])
    denoise = steered(flow, known, Weights(history=weight, shown=shown), Looks(False, windows))
    rows = schedule(pusa(steps, 1.0), jnp.array([0.0, 1.0]))
    made = jax.jit(lambda: sample(flow, denoise, euler, noise, canvas, rows))()
    return float(made[0, 1, 0, 0, 0]), float(made[1, 1, 0, 0, 0])


def theory(weight: float, steps: int = 20_000) -> tuple[float, float]:
    """The same by integrating v = v₀ + w·(v₁ − v₀) for one number, v₀ of a unit Gaussian, v₁ given the other.

    E[clean | x] is (1−l)·x / ((1−l)² + l²) for the first and the like about ρ·h for the second; velocities
    are (x − E)/l. Source: arXiv 2502.06764, eq. 7, whose scores are linear here.
    """
    remaining = 1 - CORRELATION**2
    found = []
    for h, x in ((1.0, 0.0), (0.0, 1.0)):
        for k in range(steps):
            level = 1 - k / steps
            a = 1 - level
            free = a * x / (a * a + level * level)
            mean = CORRELATION * h
            given = mean + a * remaining * (x - a * mean) / (a * a * remaining + level * level)
            velocity = (x - (free + weight * (given - free))) / level
            x -= velocity / steps
        found.append(x)
    return tuple(found)


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
def test_history_guidance_leads_as_the_theory_says(weight):
    np.testing.assert_allclose(led(weight), theory(weight), atol=6e-3)


def test_history_guidance_sharpens():
    pulls, spreads = zip(*(led(weight, steps=50) for weight in (1.0, 2.0, 4.0)), strict=True)
    assert pulls[0] < pulls[1] < pulls[2] and spreads[0] > spreads[1] > spreads[2] > 0


def test_history_guidance_at_weight_1_changes_nothing():
    def ask(x, timestep):
        return x + jnp.cumsum(x, axis=1) * timestep[:, :, None, None, None] / 1000

    plain = steered(flow, ask)(X, LEVEL)
    for windows in (1, 2):
        same = steered(flow, ask, Weights(history=1.0, shown=0.3), Looks(False, windows))(X, LEVEL)
        assert all(map(np.array_equal, same, plain))


def test_windows_of_history_are_shown_by_turns_and_the_rest_is_noise():
    level = jnp.array([[0.0, 0.0, 0.7, 0.0, 0.0, 0.7]])
    x = jnp.ones((1, 6, 1, 1, 1))
    rows = Looks(True, 2).rows(flow, x, level, 0.2)
    assert Looks(True, 2).count == len(rows) == 5
    levels = np.concatenate([row for _, row in rows])
    np.testing.assert_allclose(levels[0], level[0])
    np.testing.assert_allclose(levels[2], [1, 1, 0.7, 1, 1, 0.7])
    np.testing.assert_allclose(levels[3], [0.2, 0.2, 0.7, 1, 1, 0.7])
    np.testing.assert_allclose(levels[4], [1, 1, 0.7, 0.2, 0.2, 0.7])
    hidden = np.asarray(rows[2][0])[0, :, 0, 0, 0]
    assert np.all(hidden[[0, 1, 3, 4]] != 1) and np.all(hidden[[2, 5]] == 1)
    told = Looks(True, 2).told(TEXT, NEGATIVE)
    assert [bool(np.array_equal(told[i::5], TEXT)) for i in range(5)] == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_windows_that_show_nothing_do_not_weaken_history(windows):
    """Of one clean frame there is one window, whatever was asked for, and its weight is the whole one."""
    level = jnp.array([[0.0, 0.6, 0.6]])

    def ask(x, timestep):
        return jnp.broadcast_to(timestep[:, :1, None, None, None], x.shape)

    x = jnp.ones((1, 3, 1, 1, 1))
    said = heard(flow, ask, Weights(history=3.0), Looks(False, windows))(x, level)
    # Told at timestep 0, hidden at 1000.
    np.testing.assert_allclose(said, 0.0 + 2.0 * (0.0 - 1000.0))


def test_without_context_noise_the_network_sees_the_clip_itself():
    x = X.at[0, 0].set(-0.0)
    weights = jax.tree.map(jnp.float32, Weights(3.0, history=2.0, power=2.0))

    @jax.jit
    def rows(weights):
        return Looks(True, 2).rows(flow, x, LEVEL, weights.shown, weights.seen(LEVEL))

    for seen, level in rows(weights)[:2]:
        assert np.asarray(seen).tobytes() == np.asarray(x).tobytes() and np.array_equal(level, LEVEL)
    asked = []
    steered(flow, lambda x, timestep: asked.append((x, timestep)) or x, 3.0)(X, LEVEL)
    assert np.array_equal(asked[0][0], np.repeat(X, 2, 0))


LOW = jnp.array([[0.0, 0.5, 0.0], [0.2, 0.2, 0.9]])


@pytest.mark.parametrize("process", [flow, ddpm])
@pytest.mark.parametrize("power", [0.0, 2.0])
def test_clean_frames_are_seen_in_noise_and_stay_clean(process, power):
    for level in (LOW, LOW / 2):
        asked = []
        weights = Weights(3.0, context=0.1, power=power)
        denoise = steered(process, lambda x, timestep, to=asked: to.append((x, timestep)) or 0 * x, weights)
        made = denoise(X, level)
        denoise(X + 1, level)
        (x, timestep), (other, _) = asked
        kappa = 0.1 * float(level[0].max()) ** power
        told = jnp.where(level == 0, kappa, level)
        np.testing.assert_allclose(timestep, np.repeat(process.timestep(told), 2, 0), rtol=1e-6)
        clean = np.repeat(level == 0, 2, 0)
        assert np.array_equal(x[~clean], np.repeat(X, 2, 0)[~clean])
        alpha, sigma = (float(part(jnp.float32(kappa))) for part in (process.alpha, process.sigma))
        noise = (x[clean] - alpha * np.repeat(X, 2, 0)[clean]) / sigma
        assert 0.7 < np.std(noise) < 1.3 and abs(np.mean(noise)) < 0.4
        # At another step, of other latents, it is the same noise, and for text and negative prompt too.
        again = (other[clean] - alpha * np.repeat(X + 1, 2, 0)[clean]) / sigma
        np.testing.assert_allclose(again, noise, atol=1e-3 if sigma > 0.02 else 2e-2)
        np.testing.assert_array_equal(x[::2], x[1::2])
        assert np.array_equal(made.clean[level == 0], X[level == 0])


def test_history_is_shown_no_clearer_than_its_context_noise():
    level, x = jnp.array([[0.0, 0.0, 0.7]]), jnp.ones((1, 3, 1, 1, 1))
    for shown, seen in ((0.0, 0.1), (0.2, 0.2)):
        levels = [row.tolist() for _, row in Looks(False, 2).rows(flow, x, level, shown, jnp.array([[0.1]]))]
        expected = [[0.1, 0.1, 0.7], [1, 1, 0.7], [seen, 1, 0.7], [1, seen, 0.7]]
        np.testing.assert_allclose(np.concatenate(levels), expected, rtol=1e-6)


def rows(name: str, given: list[int]) -> np.ndarray:
    """Of 50 steps; then nothing moves, so that one program serves all schedules."""
    levels = zoo.levels(name, pusa(50), strengths(given))
    return levels[np.minimum(np.arange(351), len(levels) - 1)]


@jax.jit
def in_noise(weights: Weights, rows) -> jax.Array:
    def ask(x, timestep):
        level = timestep / 1000
        return flow.target(*exact(flow, x, level), level)

    noise, canvas = (np.concatenate([part, 0 * part[:1]]) for part in (NOISE, CANVAS))
    return sample(flow, steered(flow, ask, weights, Looks(False)), unipc, noise, canvas, rows)


def gaussian(context: float, given: list[int], name: str = "together", power: float = 0.0) -> tuple:
    """How the frames of the known video depend on noise and on canvas, each [f f]: as `transport` of there.

    The noise of the context only adds to them, the same for all: the last row has nothing else.
    """
    made = np.asarray(in_noise(Weights(context=context, power=power), rows(name, given)), np.float64)
    kept = made[FRAMES:-1, given] - CANVAS[FRAMES:, given]
    assert not np.any(kept) and not np.any(made[:FRAMES, given])
    from_noise, from_canvas = (made[:-1] - made[-1]).reshape(2, FRAMES, FRAMES)
    return from_noise.T, from_canvas.T


@pytest.mark.parametrize("given", [[0], [0, 7], [2, 5, 6]], ids=str)
def test_context_noise_gives_the_law_of_what_is_seen_in_noise(given):
    """The law given (1 − κ)·h + κ·e in place of h, which a κ of 0.02 hardly changes."""
    free = [f for f in range(FRAMES) if f not in given]
    for kappa in (0.02, 0.3):
        noise, canvas = gaussian(kappa, given)
        cross = (1 - kappa) * COVARIANCE[np.ix_(free, given)]
        seen = (1 - kappa) ** 2 * COVARIANCE[np.ix_(given, given)] + kappa**2 * np.eye(len(given))
        pull = cross @ np.linalg.inv(seen)
        np.testing.assert_allclose(canvas[np.ix_(free, given)], (1 - kappa) * pull, atol=2e-2)
        spread = COVARIANCE[np.ix_(free, free)] - pull @ cross.T
        np.testing.assert_allclose(noise[free] @ noise[free].T, spread, atol=2e-2)
    assert distance(gaussian(0.02, given), given) < 0.003 < distance(gaussian(0.3, given), given)


@pytest.mark.parametrize("name", ["pyramid:lag=6", "autoregressive"])
def test_context_noise_of_what_has_become_clean_hardly_changes_the_law(name):
    for power in (0.0, 2.0):
        far = distance(gaussian(0.02, [0], name, power), [0])
        # Measured at most 0.0002, as without.
        assert far < 0.001
