from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from fvdm_jax.models.layers import Dense, halves, layer_norm, rope_table, rotate, sinusoid

GOLDEN = np.load(Path(__file__).parent / "golden" / "rope_sinusoid.npz")


def test_the_sinusoid_is_wans_in_float64():
    ours = jax.jit(sinusoid, static_argnums=1)(jnp.asarray(GOLDEN["t"]), 256)
    np.testing.assert_allclose(ours, GOLDEN["sinusoid_f64"], rtol=0, atol=3e-7)


def test_the_sinusoid_of_any_timestep():
    timesteps = np.random.default_rng(0).uniform(0, 1000, 2000).astype(np.float32)
    angles = timesteps[:, None].astype(np.float64) * 10000.0 ** (-np.arange(128) / 128)
    ours = jax.jit(sinusoid, static_argnums=1)(jnp.asarray(timesteps), 256)
    np.testing.assert_allclose(ours, np.concatenate([np.cos(angles), np.sin(angles)], -1), rtol=0, atol=4e-7)


def test_the_rope_table_is_wans():
    """Each axis by its own positions: a grid that is long in one axis only shows the table of that axis."""
    positions, axes = GOLDEN["pos"][:-1], [(104, 1, 1), (1, 104, 1), (1, 1, 104)]
    for grid, pairs in zip(axes, (slice(0, 22), slice(22, 43), slice(43, 64)), strict=True):
        for ours, golden in zip(rope_table(grid, 128), ("freqs_cos", "freqs_sin"), strict=True):
            ours = ours.reshape(104, 64)
            np.testing.assert_allclose(ours[positions, pairs], GOLDEN[golden][:-1, pairs], rtol=0, atol=1e-7)


def test_rotation_is_wans():
    """Of pairs as halves, since their products do not ask in which order they are."""
    given, golden = (halves(jnp.asarray(GOLDEN[name]), 1) for name in ("rope_in", "rope_out"))
    ours = rotate(rearrange(given, "b (f n) a k -> b f n a k", f=2), rope_table((2, 3, 4), 128))
    np.testing.assert_allclose(rearrange(ours, "b f n a k -> b (f n) a k"), golden, rtol=0, atol=1e-6)


def test_rotation_sees_only_relative_positions():
    """q·k after rotation depends on how far apart two tokens are, along each axis."""
    q, k = jax.random.normal(jax.random.key(0), (2, 128))
    q, k = (jnp.broadcast_to(part, (1, 5, 12, 1, 128)) for part in (q, k))
    table = rope_table((5, 4, 3), 128)
    q, k = (rotate(part, table)[0, :, :, 0] for part in (q, k))
    scores = np.asarray(jnp.einsum("fnk,gmk->fngm", q, k)).reshape(5, 4, 3, 5, 4, 3)
    np.testing.assert_allclose(
        scores[1:, 1:, 1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1, :-1, :-1], atol=1e-4
    )


def test_layer_norm_has_unit_variance():
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (4, 4096))
    y = layer_norm(x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-5)


# Relative L2; bfloat16 has 8 bits of significand.
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_an_adapter_is_the_merged_kernel(dtype, bound):
    x, a, b = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 8), (8, 2), (2, 6)])
    )
    layer = Dense(6, dtype=dtype)
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(3), x))["params"]

    def run(**collections) -> np.ndarray:
        return np.asarray(layer.apply({"params": params} | collections, x), np.float32)

    merged = run(params=params | {"kernel": params["kernel"] + a @ b})
    assert np.linalg.norm(run(lora={"a": a, "b": b}) - merged) < bound * np.linalg.norm(merged)
    assert np.linalg.norm(run() - merged) > 0.5 * np.linalg.norm(merged)
