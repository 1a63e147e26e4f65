"""One signature for attention; implementations in order, each of which may decline."""

import jax
from numpy.typing import DTypeLike

from fvdm_jax.kernels.cudnn import cudnn
from fvdm_jax.kernels.flash import ATTENTION, Flash, Heads, differentiable
from fvdm_jax.kernels.flash import xla as plain
from fvdm_jax.kernels.splash import splash


def xla(platform: str, dtype: DTypeLike, width: int) -> Flash:
    """Plain XLA takes everything everywhere."""
    return plain


IMPLEMENTATIONS = {"splash": splash, "cudnn": cudnn, "xla": xla}
"""Name → (platform, dtype, width of a head) → Flash, or None where it does not take these; in the order in
which "auto" tries them."""


def platform() -> str:
    """The platform that is compiled for: of the mesh that is set, whose devices need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def chosen(dtype: DTypeLike, width: int, implementation: str = "auto") -> str:
    """The name of the implementation that takes heads of this width.

    `implementation` is "auto" or a name of IMPLEMENTATIONS; ValueError where the named one
    does not take them.
    """
    names = IMPLEMENTATIONS if implementation == "auto" else (implementation,)
    for name in names:
        if IMPLEMENTATIONS[name](platform(), jax.numpy.dtype(dtype), width) is not None:
            return name
    raise ValueError(
        f"attention {implementation!r} does not take {dtype} heads of {width} on {platform()}; use 'auto'"
    )


def kernel(dtype: DTypeLike, width: int, implementation: str = "auto") -> Flash:
    """The implementation that is `chosen`."""
    name = chosen(dtype, width, implementation)
    return IMPLEMENTATIONS[name](platform(), jax.numpy.dtype(dtype), width)


def _split_by_compiler() -> bool:
    """Whether the compiler divides this call among devices, which it cannot do with a kernel of Pallas."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1
    return mesh.size > 1 and not mesh.are_all_axes_manual


def attention(q: Heads, k: Heads, v: Heads, implementation: str = "auto", name: str = ATTENTION) -> Heads:
    """Softmax attention, bidirectional and unmasked: softmax(q kᵀ/√k) v, the softmax in float32.

    q [b n a k] · k, v [b m a k] → [b n a k] in q's dtype. `implementation` is "auto" or a name of
    IMPLEMENTATIONS; ValueError where the named one does not take these inputs. What is sharded over a mesh
    and goes through here, not through `parallel`, never takes the kernels of Pallas. `name` is that by which
    policies of jax.checkpoint know the result.
    """
    if implementation == "auto" and platform() == "tpu" and _split_by_compiler():
        implementation = "xla"
    return differentiable(kernel(q.dtype, q.shape[-1], implementation), name)(q, k, v)
