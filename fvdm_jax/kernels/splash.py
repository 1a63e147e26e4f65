"""Attention on TPUs by jax's splash kernels (Pallas).

The public entry of those kernels keeps the log-sum-exp to itself, so their functions are called directly:
jax calls them private, and tests/test_kernels.py holds them. The gradient is their two separate kernels: the
fused one keeps a partial dq for every block of keys, at 32,760 tokens five times the memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from fvdm_jax.kernels.flash import Flash, Heads, LogSumExp, share

Rows = Float[Array, "g n k"]

LANES = 128
"""Tokens come in multiples of this."""

BLOCKS = {2: (1024, 896, 768), 4: (512, 384)}
"""Rows of a block, multiples of LANES, by the bytes of a number; the better first.

A block of queries reads all keys once, and below about 600 rows of bfloat16 a v6e would wait for its memory
(918 TFLOP/s over 1.6 TB/s). Above 1,024, in float32 above 512, a v5p's vector memory is too small. Which is
fastest only a TPU can tell.
"""

WIDEST = 256
"""The widest head whose blocks fit a TPU's vector memory."""

ALL = masks.MaskInfo(*[None] * len(masks.MaskInfo._fields))
"""Every query sees every key."""


def splash(platform: str, dtype: DTypeLike, width: int) -> Flash | None:
    """The kernels for TPUs; declines elsewhere, and heads wider than WIDEST."""
    if platform != "tpu" or width > WIDEST or dtype not in (jnp.bfloat16, jnp.float32):
        return None
    return flash()


@functools.cache
def flash(interpret: bool = False) -> Flash:
    """The kernels as a Flash; `interpret` runs them step by step anywhere, for tests."""
    # A call of Pallas is never dropped from a traced program, used or not, but a jitted function is: so a
    # forward pass whose results are kept is not repeated for the gradient.
    return Flash(*(jax.jit(functools.partial(part, interpret)) for part in (_forward, _backward)))


def _forward(interpret: bool, q: Heads, k: Heads, v: Heads) -> tuple[Heads, LogSumExp]:
    clips, n, heads, width = q.shape
    rows, columns = block(n, q.dtype), block(k.shape[1], q.dtype)
    sizes = kernels.BlockSizes(block_q=rows, block_kv=columns)
    with _precision(q.dtype):
        out, (lse,) = kernels._splash_attention_forward(
            ALL,
            _rows(_scaled(q), rows),
            _rows(k, columns),
            _rows(v, columns),
            _segments(n, k.shape[1], rows, columns),
            None,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            is_mqa=False,
            block_sizes=sizes,
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=None,
            interpret=interpret,
        )
    return _heads(out, clips, n), lse[:, :n].reshape(clips, heads, n)


def _backward(interpret: bool, q: Heads, k: Heads, v: Heads, *given):
    """`given`: out, lse and do, of the queries."""
    out, lse, do = given
    (clips, n, heads, _), m = q.shape, k.shape[1]
    rows, columns = block(n, q.dtype), block(m, q.dtype)
    # Rows of padding have do = di = 0, and so no part in any gradient.
    lse, di = (_padded(x.reshape(clips * heads, n), rows) for x in (lse, share(out, do)))
    arrays = _rows(_scaled(q), rows), _rows(k, columns), _rows(v, columns)
    shared = dict(
        bq=rows,
        bkv=columns,
        is_mqa=False,
        mask_info=ALL,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        q_layout=kernels.QKVLayout.HEAD_DIM_MINOR,
        k_layout=kernels.QKVLayout.HEAD_DIM_MINOR,
        v_layout=kernels.QKVLayout.HEAD_DIM_MINOR,
        mask_function=None,
        interpret=interpret,
    )
    inputs = (*arrays, _segments(n, m, rows, columns), None, lse, _rows(do, rows), di)
    with _precision(q.dtype):
        dq = kernels._splash_attention_bwd_dq(*inputs, **shared)
        _, dk, dv = kernels._splash_attention_bwd_dkv(
            *inputs, bkv_compute=columns, use_fused_bwd_kernel=False, **shared
        )
    return _scaled(_heads(dq, clips, n)), _heads(dk, clips, m), _heads(dv, clips, m)


def block(tokens: int, dtype: DTypeLike) -> int:
    """Rows of a block for so many tokens: of BLOCKS the one that pads least, or all tokens in one."""
    blocks = BLOCKS[jnp.dtype(dtype).itemsize]
    if tokens <= blocks[0]:
        return _up(tokens, LANES)
    return min(blocks, key=lambda rows: _up(tokens, rows))


def _up(number: int, to: int) -> int:
    return -(-number // to) * to


def _padded(x: Float[Array, "g n ..."], rows: int) -> Float[Array, "g n ..."]:
    missing = _up(x.shape[1], rows) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _rows(x: Heads, rows: int) -> Rows:
    """Clips and heads on one axis, as the kernels have them, tokens filled up to whole blocks."""
    x = jnp.swapaxes(x, 1, 2)
    return _padded(x.reshape(-1, *x.shape[2:]), rows)


def _heads(x: Rows, clips: int, tokens: int) -> Heads:
    """`_rows` undone."""
    x = x[:, :tokens]
    return jnp.swapaxes(x.reshape(clips, -1, *x.shape[1:]), 1, 2)


def _scaled(x: Heads) -> Heads:
    """x/√k, which the kernels leave to their caller; rounded once."""
    return (x.astype(jnp.float32) * np.float32(x.shape[-1] ** -0.5)).astype(x.dtype)


def _segments(n: int, m: int, rows: int, columns: int) -> kernels.SegmentIds | None:
    """Which keys the queries see: those that are no padding; None where there is none."""
    if m % columns == 0:
        return None
    queries, keys = np.zeros(_up(n, rows), np.int32), np.arange(_up(m, columns)) >= m
    return kernels.SegmentIds(jnp.asarray(queries), jnp.asarray(keys, jnp.int32))


def _precision(dtype: DTypeLike):
    """float32 means float32, where a TPU would round the factors to bfloat16."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
