"""One signature for attention; implementations in order, each of which may decline."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Heads = Float[Array, "b n a k"]


def xla(q: Heads, k: Heads, v: Heads) -> Heads:
    """Plain XLA: runs everywhere, and is the oracle of the others."""
    # The weights sum to one, so values may be taken relative to any of them. Most of Wan's 512 text rows are
    # the same padding: relative to the last row they are 0, while summed up in float32 they cost 9e-6 of the
    # network's output. In bfloat16 the difference would be rounded, for nothing.
    origin = v[:, -1:] if v.dtype == jnp.float32 else jnp.zeros_like(v[:, -1:])
    # jax.nn widens the scores by implicit promotion, which strict mode forbids.
    precision = jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(precision.name.lower()):
        return jax.nn.dot_product_attention(q, k, v - origin, implementation="xla") + origin


def cudnn(q: Heads, k: Heads, v: Heads) -> Heads | None:
    """cuDNN's fused kernel; declines off NVIDIA's GPUs, in float32, and for heads it does not take."""
    width = q.shape[-1]
    if jax.default_backend() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return None
    # Hopper and later take heads of 256, but 128 is the widest in use besides the VAE's one of 384 and more.
    if width % 8 or width > 128 or not _is_nvidia():
        return None
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _is_nvidia() -> bool:
    """Whether the default device is an NVIDIA GPU of a generation that cuDNN's kernel runs on."""
    capability = jax.devices()[0].compute_capability
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0


IMPLEMENTATIONS = {"cudnn": cudnn, "xla": xla}
"""In the order in which "auto" tries them; the last runs everywhere."""


def attention(q: Heads, k: Heads, v: Heads, implementation: str = "auto") -> Heads:
    """Softmax attention, bidirectional and unmasked: softmax(q kᵀ/√k) v, the softmax in float32.

    q [b n a k] · k, v [b m a k] → [b n a k] in q's dtype. `implementation` is "auto" or a name of
    IMPLEMENTATIONS; ValueError where the named one does not take these inputs.
    """
    names = IMPLEMENTATIONS if implementation == "auto" else (implementation,)
    for name in names:
        out = IMPLEMENTATIONS[name](q, k, v)
        if out is not None:
            return out
    raise ValueError(
        f"attention {implementation!r} does not take {q.dtype}{list(q.shape)} on this backend; use 'auto'"
    )
