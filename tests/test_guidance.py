import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax.guidance import guided
from fvdm_jax.process import ddpm, flow

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
    assert np.array_equal(timestep, np.tile(ddpm.timestep(LEVEL), (2, 1)))


def test_the_scale_may_be_traced():
    run = jax.jit(lambda scale: guided(flow, apply, TEXT, NEGATIVE, scale)(X, LEVEL).clean)
    expected = guided(flow, apply, TEXT, NEGATIVE, 5.0)(X, LEVEL).clean
    np.testing.assert_allclose(run(5.0), expected, rtol=0, atol=1e-5)
