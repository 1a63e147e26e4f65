"""Attention on NVIDIA's GPUs by cuDNN's fused kernel.

The public entry, jax.nn.dot_product_attention, keeps the log-sum-exp to itself, so the rules of its gradient
are called directly: jax calls them private, and tests/test_kernels.py holds them to the public entry.
"""

import math

import jax
import jax.numpy as jnp
from numpy.typing import DTypeLike

from fvdm_jax.kernels.flash import Flash, Heads, LogSumExp

WIDEST = 128
"""Hopper and later take heads of 256, but 128 is the widest in use besides the VAE's one of 384 and more."""


def cudnn(platform: str, dtype: DTypeLike, width: int) -> Flash | None:
    """cuDNN's kernel; declines off NVIDIA's GPUs, in float32, and for heads it does not take."""
    if platform not in ("gpu", "cuda") or dtype not in (jnp.bfloat16, jnp.float16):
        return None
    if width % 8 or width > WIDEST or not _is_nvidia():
        return None
    return flash


def _is_nvidia() -> bool:
    """Whether the default device is an NVIDIA GPU of a generation that cuDNN's kernel runs on."""
    capability = jax.devices()[0].compute_capability
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0


def _settings(q: Heads) -> dict:
    from jax._src.cudnn import fused_attention_stablehlo as rules

    return dict(
        scale=1 / math.sqrt(q.shape[-1]),
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=rules.MaskType.NO_MASK,
        layout=rules.AttentionLayout.BTNH.value,
        sliding_window_length=None,
        return_residual=False,
    )


def _absent(q: Heads) -> tuple[jax.Array, ...]:
    """In place of a bias, lengths, offsets and tables of pages."""
    return (jnp.zeros(0, q.dtype),) * 7


def _forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, LogSumExp]:
    from jax._src.cudnn import fused_attention_stablehlo as rules

    version = rules.check_cudnn_version()
    out, kept = rules._dot_product_attention_fwd_rule(
        q, k, v, *_absent(q), cudnn_version=version, **_settings(q)
    )
    return out, kept[-2]


def _backward(q: Heads, k: Heads, v: Heads, out: Heads, lse: LogSumExp, do: Heads):
    from jax._src.cudnn import fused_attention_stablehlo as rules

    kept = (q, k, v, *_absent(q), lse, out)
    return rules._dot_product_attention_bwd_rule(**_settings(q), is_training=True, res=kept, grad_output=do)[
        :3
    ]


flash = Flash(_forward, _backward)
"""The kernel as a Flash."""
