"""Attention as a pair of functions with its log-sum-exp between them, and the pair in plain XLA.

The log-sum-exp of the scores is all that the gradient needs of a softmax, and all that two attentions over
different keys need to be merged. So a kernel is a `Flash`; `differentiable` makes it a function.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Heads = Float[Array, "b n a k"]
LogSumExp = Float[Array, "b a n"]

ATTENTION = "attention"
"""The name under which what attention gives, output and log-sum-exp, is kept for the gradient."""

CROSS_ATTENTION = "cross_attention"
"""The same of attention to few keys, which is cheap to compute again, and as large to keep."""

BUDGET = 2**22
"""Scores that plain XLA holds at once: 16 MiB of float32, what a CPU keeps near; more is slower there."""


ONES = 16
"""Columns of ones beside the values: as many as a CPU multiplies at once."""

MANY = 1024
"""Keys from which on there are such columns."""


class Flash(NamedTuple):
    """softmax(q kᵀ/√k) v of q [b n a k] and k, v [b m a k], and its gradient.

    forward(q, k, v) → (out, lse): out like q; lse [b a n], float32, the log-sum-exp of the scaled scores.
    backward(q, k, v, out, lse, do) → (dq, dk, dv). `out` and `lse` may be those of attention over more keys
    than are given: then dq is their share of it.
    """

    forward: Callable[[Heads, Heads, Heads], tuple[Heads, LogSumExp]]
    backward: Callable[[Heads, Heads, Heads, Heads, LogSumExp, Heads], tuple[Heads, Heads, Heads]]


@functools.lru_cache
def differentiable(flash: Flash, name: str = ATTENTION) -> Callable[[Heads, Heads, Heads], Heads]:
    """`flash` as a function (q, k, v) → out with its gradient (reverse mode, once).

    A policy of jax.checkpoint that keeps `name` keeps out and lse, and then the gradient does not run the
    forward kernel again.
    """

    @jax.custom_vjp
    def attend(q, k, v):
        return flash.forward(q, k, v)[0]

    def forward(q, k, v):
        out, lse = (checkpoint_name(kept, name) for kept in flash.forward(q, k, v))
        return out, (q, k, v, out, lse)

    def backward(kept, do):
        return flash.backward(*kept, do)

    attend.defvjp(forward, backward)
    return attend


def share(out: Float[Array, "b ... a k"], do: Float[Array, "b ... a k"]) -> Float[Array, "b a ..."]:
    """Σ out·do over a head, float32: what the normalisation of the softmax takes from its gradient."""
    both = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    return jnp.moveaxis(both, -1, 1)


def _forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, LogSumExp]:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    # The weights sum to one, so values may be taken relative to any of them. Most of Wan's 512 text rows are
    # the same padding: relative to the last row they are 0, while summed up in float32 they cost 9e-6 of the
    # network's output. In bfloat16 the difference would be rounded, for nothing; so it would among the many
    # keys of a clip, of which a single one is far from their mean.
    relative = v.dtype == jnp.float32 and v.shape[-2] < MANY
    origin = v[..., -1:, :] if relative else jnp.zeros_like(v[..., -1:, :])
    out, lse = _by_heads(_forward_of_heads, BUDGET, q, k, v - origin)
    return jnp.swapaxes((out + origin.astype(jnp.float32)).astype(q.dtype), 1, 2), lse


def _backward(q: Heads, k: Heads, v: Heads, out: Heads, lse: LogSumExp, do: Heads):
    types = q.dtype, k.dtype, v.dtype
    di = share(out, do)
    q, k, v, do = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, do))
    # Two arrays of scores live at once here, where the forward pass has one.
    grads = _by_heads(_backward_of_heads, BUDGET // 2, q, k, v, lse, di, do)
    return tuple(jnp.swapaxes(x, 1, 2).astype(dtype) for x, dtype in zip(grads, types, strict=True))


xla = Flash(_forward, _backward)
"""Plain XLA: runs everywhere, and is the oracle of the others. Never holds more than BUDGET scores."""


def _by_heads(function: Callable, budget: int, q, k, *rest):
    """function of arrays [b a …], for as many clips and heads at once as their scores fit in `budget`."""
    clips, heads, n, _ = q.shape
    arrays, scores = (q, k, *rest), n * k.shape[2]
    if clips * heads * scores <= budget:
        return function(budget, *arrays)
    at_once = max(
        i for i in range(1, clips * heads + 1) if clips * heads % i == 0 and i * scores <= max(budget, scores)
    )
    grouped = [x.reshape(-1, at_once, *x.shape[2:]) for x in arrays]
    results = jax.lax.map(lambda group: function(budget, *group), grouped)
    return jax.tree.map(lambda x: x.reshape(clips, heads, *x.shape[2:]), results)


def _forward_of_heads(budget: int, q, k, v):
    chunks = _chunks(q, k, budget)
    if chunks == 1:
        return _softmax(q, k, v)
    n = q.shape[-2]
    parts = jax.lax.map(lambda q: _softmax(q, k, v), _split(q, chunks, q.ndim - 2))
    return tuple(_join(x, n, q.ndim - 2) for x in parts)


def _backward_of_heads(budget: int, q, k, v, *given):
    """`given`: lse, di and do of the queries."""
    chunks = _chunks(q, k, budget)
    if chunks == 1:
        return _gradients(q, k, v, *given)

    def step(sums, part):
        q, *given = part
        dq, *more = _gradients(q, k, v, *given)
        return jax.tree.map(jnp.add, sums, more), dq

    n, axis = q.shape[-2], q.ndim - 2
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
    (dk, dv), dq = jax.lax.scan(step, zeros, [_split(x, chunks, axis) for x in (q, *given)])
    return _join(dq, n, axis), dk, dv


def _product(pattern: str, x: Array, y: Array) -> Array:
    """The product in the type of y, added up in float32; float32 means float32 also where TPUs round."""
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return jnp.einsum(pattern, x.astype(y.dtype), y, precision=precision, preferred_element_type=jnp.float32)


def _scores(q, k) -> Float[Array, "... n m"]:
    scale = np.float32(q.shape[-1] ** -0.5)
    # Of n·k numbers, not of n·m; in bfloat16 they would be rounded once more.
    if q.dtype == jnp.float32:
        return _product("...nk,...mk->...nm", q * scale, k)
    return _product("...nk,...mk->...nm", q, k) * scale


def _softmax(q, k, v) -> tuple[Float[Array, "... n k"], Float[Array, "... n"]]:
    scores = _scores(q, k)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    if v.dtype == jnp.float32 and v.shape[-2] >= MANY:
        # The sum is a column of the product, which on a CPU saves a pass over the weights. Of a prompt's
        # keys, most of which are alike, roundings would add up: 8e-6 of the network's output.
        both = _product("...nm,...mk->...nk", weights, jnp.concatenate([v, jnp.ones_like(v[..., :ONES])], -1))
        out, total = both[..., : v.shape[-1]], both[..., v.shape[-1] : v.shape[-1] + 1]
    else:
        out = _product("...nm,...mk->...nk", weights, v)
        total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided after the product: of n·k numbers, not of n·m.
    return out / total, jnp.squeeze(highest + jnp.log(total), -1)


def _gradients(q, k, v, lse, di, do):
    weights = jnp.exp(_scores(q, k) - lse[..., None])
    dv = _product("...nm,...nk->...mk", weights, do)
    ds = weights * (_product("...nk,...mk->...nm", do, v) - di[..., None])
    ds = (ds * np.float32(q.shape[-1] ** -0.5)).astype(q.dtype)
    return _product("...nm,...mk->...nk", ds, k), _product("...nm,...nk->...mk", ds, q), dv


def _chunks(q, k, budget: int) -> int:
    """Into how many chunks of queries the scores fit; a divisor of the queries where one is near."""
    n = q.shape[-2]
    least = math.ceil(math.prod(q.shape[:-1]) * k.shape[-2] / budget)
    return next((i for i in range(least, min(2 * least, n)) if n % i == 0), min(least, n))


def _split(x, chunks: int, axis: int):
    """x [… n …] as [chunks … rows …], n filled up with zeros.

    A chunk takes every chunks-th row: where the queries are sharded, each device has its part of every one.
    """
    missing = -x.shape[axis] % chunks
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
    x = x.reshape(*x.shape[:axis], -1, chunks, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)


def _join(x, n: int, axis: int):
    """`_split` undone."""
    x = jnp.moveaxis(x, 0, axis + 1)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, n, axis=axis)
