"""The kernels of attention against plain formulas: forward, backward, what they hold and what they keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import equations

from fvdm_jax.kernels import cudnn, flash, splash
from fvdm_jax.models.layers import REMAT

NAMES = ("out", "lse", "dq", "dk", "dv")


def case(b, n, m, a, k, dtype="float32"):
    """q, k, v and the gradient of out, all of the order of 1."""
    sizes = n, m, m, n
    keys = jax.random.split(jax.random.key(n + m), 4)
    return [jax.random.normal(key, (b, s, a, k)).astype(dtype) for key, s in zip(keys, sizes, strict=True)]


@partial(jax.jit, static_argnums=0)
def results(kernel, q, k, v, do):
    out, lse = kernel.forward(q, k, v)
    return out, lse, *kernel.backward(q, k, v, out, lse, do)


@jax.jit
def formula(q, k, v, do):
    """The same by jax's own gradient of the plain formula."""

    def forward(q, k, v):
        scores = jnp.einsum("bnak,bmak->banm", q, k, precision="highest") / np.float32(np.sqrt(q.shape[-1]))
        out = jnp.einsum("banm,bmak->bnak", jax.nn.softmax(scores), v, precision="highest")
        return out, jax.nn.logsumexp(scores, axis=-1)

    (out, lse), back = jax.vjp(forward, q, k, v)
    return out, lse, *back((do, jnp.zeros_like(lse)))


def distances(got, want) -> dict[str, float]:
    """Relative; to 1 for the gradients that are zero, as there is one key only."""
    found = {}
    for name, x, y in zip(NAMES, got, want, strict=True):
        x, y = (np.asarray(part, np.float64) for part in (x, y))
        least = 0 if got[3].shape[1] > 1 else np.sqrt(y.size)
        found[name] = float(np.linalg.norm(x - y) / max(np.linalg.norm(y), least))
    return found


SIZES = [(1, 128, 128, 1, 128), (2, 130, 130, 2, 64), (1, 33, 1, 2, 24), (1, 200, 769, 1, 128)]


@pytest.mark.parametrize(
    "sizes, budget", [*((sizes, 10_000) for sizes in SIZES), (SIZES[1], 10**6), ((1, 40, 1100, 2, 24), 10**6)]
)
def test_plain_xla_is_the_formula_in_chunks_of_any_size(monkeypatch, sizes, budget):
    monkeypatch.setattr(flash, "BUDGET", budget)
    arrays = case(*sizes)
    found = distances(jax.jit(lambda *x: results.__wrapped__(flash.xla, *x))(*arrays), formula(*arrays))
    assert max(found.values()) < 1e-5, found


def test_plain_xla_holds_no_more_scores_than_its_budget():
    q, k, v, do = (jax.ShapeDtypeStruct((1, 10_000, 12, 128), "float32") for _ in range(4))
    jaxpr = jax.make_jaxpr(lambda *x: results(flash.xla, *x))(q, k, v, do)
    largest = max(var.aval.size for eqn in equations(jaxpr.jaxpr) for var in eqn.outvars)
    assert largest <= max(flash.BUDGET, q.size)


@pytest.mark.parametrize("remat, passes", [("none", 1), ("full", 2), ("attention", 1)])
def test_what_is_kept_for_the_gradient_is_not_computed_again(remat, passes):
    """The exponentials of the scores: of each forward pass, and one for the gradient."""
    attend = flash.differentiable(flash.xla)

    def layer(x):
        return jnp.sum(attend(2 * x, 3 * x, 4 * x) ** 2)

    x = case(1, 8, 8, 2, 16)[0]
    kept = layer if REMAT[remat] is None else jax.checkpoint(layer, policy=REMAT[remat])
    jaxpr = jax.make_jaxpr(jax.grad(kept))(x)
    assert sum(eqn.primitive.name == "exp" for eqn in equations(jaxpr.jaxpr)) == passes + 1
    np.testing.assert_allclose(jax.grad(kept)(x), jax.grad(layer)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [*SIZES[1:], (1, 1100, 1100, 1, 128)])
def test_splash_is_xla_in_float32(sizes):
    arrays = case(*sizes)
    found = distances(results(splash.flash(interpret=True), *arrays), results(flash.xla, *arrays))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("sizes", SIZES[1:])
def test_splash_is_as_exact_as_xla_in_bfloat16(sizes):
    """Both against float32 on the same numbers.

    A number is rounded by 1.7e-3 on average, and the results, weights and scaled queries are each rounded
    once: 4e-3 is what that adds up to; XLA does not round the queries, whence the half as much again.
    """
    arrays = case(*sizes, dtype="bfloat16")
    exact = formula(*(x.astype(jnp.float32) for x in arrays))
    found = distances(results(splash.flash(interpret=True), *arrays), exact)
    plain = distances(results(flash.xla, *arrays), exact)
    assert max(found.values()) < 4e-3, found
    assert all(found[name] <= 1.5 * plain[name] for name in ("out", "dq", "dk", "dv")), (found, plain)


@pytest.mark.parametrize("dtype, tokens, rows", [
    ("bfloat16", 32_760, 1024), ("bfloat16", 75_600, 1024), ("bfloat16", 9_450, 896), ("bfloat16", 769, 896),
    ("bfloat16", 1, 128), ("float32", 32_760, 512),
])  # fmt: skip
def test_a_block_pads_little(dtype, tokens, rows):
    assert splash.block(tokens, dtype) == rows


def test_splash_declines_what_does_not_fit_a_tpu():
    assert splash.splash("tpu", jnp.dtype("bfloat16"), 128) is splash.flash()
    assert splash.splash("tpu", jnp.dtype("bfloat16"), 384) is None
    assert splash.splash("tpu", jnp.dtype("float16"), 128) is None
    assert splash.splash("cpu", jnp.dtype("bfloat16"), 128) is None


def test_splash_is_kept_for_the_gradient_too():
    attend = flash.differentiable(splash.flash())

    def kernels(remat):
        layer = jax.checkpoint(lambda q, k, v: jnp.sum(attend(2 * q, k, v) ** 2), policy=REMAT[remat])
        jaxpr = jax.make_jaxpr(jax.grad(layer, (0, 1, 2)))(*case(1, 8, 8, 2, 16)[:3]).jaxpr
        return sorted(
            str(eqn.params["name"]) for eqn in equations(jaxpr) if eqn.primitive.name == "pallas_call"
        )

    gradient = ["splash_mha_dkv_segmented_no_residuals", "splash_mha_dq_segmented_no_residuals"]
    forward = "splash_mha_fwd_segmented_residuals"
    assert kernels("attention") == [*gradient, forward]
    assert kernels("full") == [*gradient, forward, forward]


def test_cudnn_is_called_as_jax_calls_it(monkeypatch):
    """No GPU here: the program that is traced is that of the public entry, and its gradient."""
    from jax._src.cudnn import fused_attention_stablehlo as rules

    monkeypatch.setattr(rules, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(rules, "check_compute_capability", lambda capability: True)
    q, k, v, do = case(2, 64, 32, 2, 128, "bfloat16")

    def public(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def calls(function):
        jaxpr = jax.make_jaxpr(lambda *x: jax.vjp(function, *x)[1](do))(q, k, v).jaxpr
        ours = [eqn for eqn in equations(jaxpr) if "dot_product_attention" in eqn.primitive.name]
        return [(e.primitive.name, [x.aval for x in (*e.invars, *e.outvars)], e.params) for e in ours]

    found = calls(flash.differentiable(cudnn.flash))
    assert len(found) == 2
    assert found == calls(public)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("n, m", [(32_760, 32_760), (75_600, 75_600), (32_760, 512), (9_450, 769), (100, 1)])
def test_splash_compiles_for_every_tpu(tpu, n, m, dtype, capsys):
    """5 heads of 128; temporary bytes by the compiler."""
    for name in ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"):
        at = jax.sharding.SingleDeviceSharding(tpu(name)[0])
        q, k = (jax.ShapeDtypeStruct((1, size, 5, 128), dtype, sharding=at) for size in (n, m))
        lse = jax.ShapeDtypeStruct((1, 5, n), "float32", sharding=at)
        kernel = splash.flash()
        with capsys.disabled():
            for part, arrays in ((kernel.forward, (q, k, k)), (kernel.backward, (q, k, k, q, lse, q))):
                sizes = jax.jit(part).lower(*arrays).compile().memory_analysis()
                print(f"\n{name} {n} x {m} {dtype}: {sizes.temp_size_in_bytes / 2**20:.0f} MiB", end="")
                # Copies of what comes and goes, in the kernels' order; the scores would be 20 GB.
                padded = n + m + 1024
                held = 5 * 128 * padded * (4 * jnp.dtype(dtype).itemsize + 3 * 4)
                assert sizes.temp_size_in_bytes < held
