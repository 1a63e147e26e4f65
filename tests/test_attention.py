import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax import sharding
from fvdm_jax.kernels import flash
from fvdm_jax.kernels.attention import IMPLEMENTATIONS, attention, chosen

Q, K, V = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(2, 7, 3, 8), (2, 11, 3, 8), (2, 11, 3, 8)])
)


def exact(q, k, v) -> np.ndarray:
    q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
    scores = np.einsum("bnak,bmak->banm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("banm,bmak->bnak", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_every_implementation_is_softmax_attention(implementation, dtype, atol):
    q, k, v = (part.astype(dtype) for part in (Q, K, V))
    on_gpu = implementation == "cudnn" and jax.default_backend() == "gpu" and dtype == "bfloat16"
    if implementation not in ("auto", "xla") and not on_gpu:
        with pytest.raises(ValueError, match="does not take"):
            attention(q, k, v, implementation)
        return
    out = attention(q, k, v, implementation)
    assert out.dtype == q.dtype
    # bfloat16 has 8 bits of significand; the values are of the order of 1.
    np.testing.assert_allclose(out.astype(jnp.float32), exact(q, k, v), rtol=0, atol=atol)


def test_what_a_kernel_cannot_do_the_next_one_does(monkeypatch):
    """The VAE's one head of 384, in bfloat16 on a GPU, is nothing for cuDNN."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k, v = (jnp.ones((1, 4, 1, 384), jnp.bfloat16) for _ in range(3))
    assert attention(q, k, v).shape == q.shape


def test_rows_of_padding_cost_no_precision():
    """500 equal keys, as Wan's empty text rows are: their sum must not drown the rest."""
    k = jnp.concatenate([K, jnp.broadcast_to(0.1 * K[:, :1], (2, 500, 3, 8))], 1)
    v = jnp.concatenate([V, jnp.broadcast_to(30 + V[:, :1], (2, 500, 3, 8))], 1)
    np.testing.assert_allclose(attention(Q, k, v), exact(Q, k, v), rtol=3e-7, atol=3e-6)


def test_large_scores_stay_finite_with_their_gradients():
    energy = lambda q: jnp.sum(attention(1e3 * q, 1e3 * K, V) ** 2)  # noqa: E731
    assert np.all(np.isfinite(jax.grad(energy)(Q)))


@pytest.mark.parametrize("budget", [1, 40, 77, 100, 10**6])
def test_scores_in_chunks_are_the_scores_at_once(monkeypatch, budget):
    monkeypatch.setattr(flash, "BUDGET", budget)
    np.testing.assert_allclose(attention(Q, K, V), exact(Q, K, V), rtol=0, atol=1e-6)


def test_it_is_compiled_for_the_platform_of_the_mesh(monkeypatch):
    """Programs are compiled here for TPUs that are elsewhere."""
    assert chosen("bfloat16", 128) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert chosen("bfloat16", 128) == "splash"
    assert chosen("bfloat16", 384) == "xla"
    with jax.set_mesh(sharding.mesh(context=2)):
        assert chosen("bfloat16", 128) == "xla"


def test_what_the_compiler_is_to_split_never_goes_to_a_kernel_that_it_cannot(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "splash" not in str(jax.make_jaxpr(lambda: attention(Q, K, V))())
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "splash" in str(jax.make_jaxpr(lambda: attention(Q, K, V))())
