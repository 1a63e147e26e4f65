"""Attention over the mesh that is set: clips, heads and the tokens of a frame each on their devices.

Clips lie over "data" and "fsdp", heads over "tensor", the tokens of every frame over "context". Frames are
never split, so what a frame is modulated with stays where its tokens are. Attention over all tokens then
has to bring queries and keys together, in one of two ways:

- ulysses exchanges tokens for heads (all-to-all), attends to all tokens with some of the heads, and back;
- ring sends keys and values round the devices, and merges what each finds by its log-sum-exp.

Sources: DeepSpeed-Ulysses, arXiv 2309.14509; Ring Attention, arXiv 2310.01889.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from fvdm_jax.kernels.attention import attention, chosen, kernel
from fvdm_jax.kernels.flash import CROSS_ATTENTION, Flash, Heads, LogSumExp, differentiable

FrameHeads = Float[Array, "b f n a k"]

CONTEXT = "context"
"""The axis of the mesh over which the tokens of a frame lie."""

EXCHANGES = ("ulysses", "ring")
"""How tokens on different devices meet."""


class Attending(NamedTuple):
    """How to attend: a name of `attention.IMPLEMENTATIONS` and one of EXCHANGES, or "auto" for each."""

    implementation: str = "auto"
    exchange: str = "auto"


AUTO = Attending()


class Layout(NamedTuple):
    """The axes of the mesh over which clips, the tokens of a frame, and heads lie; none: whole everywhere."""

    clips: tuple[str, ...]
    tokens: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def frames(self) -> PartitionSpec:
        """Of [b f n a k]."""
        return PartitionSpec(self.clips, None, self.tokens, self.heads)

    @property
    def whole(self) -> PartitionSpec:
        """Of [b m a k] with its tokens whole."""
        return PartitionSpec(self.clips, None, self.heads)

    @property
    def lse(self) -> PartitionSpec:
        """Of [b a n], in whatever order the devices have their tokens."""
        return PartitionSpec(self.clips, self.heads, self.tokens)


def exchange_for(heads: int, context: int, exchange: str = "auto") -> str:
    """The exchange for so many heads on each device, and tokens over `context` devices.

    "ulysses" where the heads divide, as it sends the least, else "ring". ValueError where the one named does
    not fit, or is none of EXCHANGES.
    """
    if exchange not in ("auto", *EXCHANGES):
        raise ValueError(f"{exchange!r} is no exchange; take one of auto, {', '.join(EXCHANGES)}")
    if exchange == "ulysses" and heads % context:
        raise ValueError(f"ulysses cannot deal {heads} heads to {context} devices; take ring")
    if exchange == "auto":
        return "ring" if heads % context else "ulysses"
    return exchange


def described(attending: Attending, dtype: DTypeLike, heads: int, width: int, tokens: int) -> str:
    """How attention is computed on the mesh that is set, of so many heads of this width and tokens a frame.

    ValueError where it cannot be as asked for.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    context, tensor = sizes.get(CONTEXT, 1), sizes.get("tensor", 1)
    name = chosen(dtype, width, attending.implementation)
    if context == 1:
        return name
    _check_tokens(tokens, context)
    heads = heads // tensor if heads % tensor == 0 else heads
    return f"{name}, {exchange_for(heads, context, attending.exchange)} over {context} devices"


def self_attention(q: FrameHeads, k: FrameHeads, v: FrameHeads, attending: Attending = AUTO) -> FrameHeads:
    """Attention of all tokens of all frames to each other, over the mesh that is set.

    An axis of the mesh that does not divide clips or heads leaves them whole; ValueError where "context"
    does not divide the tokens of a frame.
    """
    if _alone():
        return _framed(attention(_flat(q), _flat(k), _flat(v), attending.implementation), q)
    layout = _layout(q)
    flash = kernel(q.dtype, q.shape[-1], attending.implementation)
    context = _devices(layout.tokens)
    exchange = exchange_for(q.shape[3] // _devices(layout.heads), context, attending.exchange)
    if context > 1 and exchange == "ulysses":
        return _ulysses(flash, layout, q.shape[1])(q, k, v)
    flash = _of_frames(_ring(flash, context))
    return differentiable(_spread(flash, layout.frames, layout.frames, layout.lse))(q, k, v)


def cross_attention(q: FrameHeads, k: Heads, v: Heads, attending: Attending = AUTO) -> FrameHeads:
    """Attention of all tokens to keys and values [b m a k] that every device of "context" holds whole."""
    if _alone():
        return _framed(attention(_flat(q), k, v, attending.implementation, CROSS_ATTENTION), q)
    layout = _layout(q)
    flash = _of_frames(kernel(q.dtype, q.shape[-1], attending.implementation))
    flash = _summed(flash, layout.tokens) if layout.tokens else flash
    spread = _spread(flash, layout.frames, layout.whole, layout.lse)
    return differentiable(spread, CROSS_ATTENTION)(q, k, v)


def _alone() -> bool:
    """Whether there is nothing to split: no mesh, one device, or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual


def _devices(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def _layout(q: FrameHeads) -> Layout:
    """Where arrays of these sizes lie on the mesh that is set."""
    sizes = jax.sharding.get_abstract_mesh().shape
    clips, _, tokens, heads, _ = q.shape
    context = sizes.get(CONTEXT, 1)
    _check_tokens(tokens, context)
    return Layout(
        clips=_dividing(clips, ("data", "fsdp"), sizes),
        tokens=_dividing(tokens, (CONTEXT,), sizes),
        heads=_dividing(heads, ("tensor",), sizes),
    )


def _check_tokens(tokens: int, context: int) -> None:
    if tokens % context:
        fitting = ", ".join(str(n) for n in range(1, context) if tokens % n == 0)
        raise ValueError(
            f"{context} devices along {CONTEXT!r} cannot share the {tokens} tokens of a frame; {fitting} can"
        )


def _dividing(count: int, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes that split `count` things evenly, one after the other."""
    taken, parts = (), 1
    for axis in axes:
        size = sizes.get(axis, 1)
        if size > 1 and count % (parts * size) == 0:
            taken, parts = (*taken, axis), parts * size
    return taken


def _spread(flash: Flash, queries: PartitionSpec, keys: PartitionSpec, lse: PartitionSpec) -> Flash:
    """`flash`, computed by every device for its part of arrays that lie like this."""
    given = queries, keys, keys
    kept = queries, lse
    return Flash(
        jax.shard_map(flash.forward, in_specs=given, out_specs=kept, check_vma=False),
        jax.shard_map(flash.backward, in_specs=(*given, *kept, queries), out_specs=given, check_vma=False),
    )


def _flat(x: FrameHeads | Heads) -> Heads:
    return rearrange(x, "b f n a k -> b (f n) a k") if x.ndim == 5 else x


def _framed(x: Heads, like: FrameHeads | Heads) -> FrameHeads | Heads:
    return x.reshape(like.shape)


def _of_frames(flash: Flash) -> Flash:
    """`flash` for queries, and keys that may be, [b f n a k]."""

    def forward(q, k, v):
        out, lse = flash.forward(_flat(q), _flat(k), _flat(v))
        return _framed(out, q), lse

    def backward(q, k, v, out, lse, do):
        grads = flash.backward(_flat(q), _flat(k), _flat(v), _flat(out), lse, _flat(do))
        return tuple(_framed(grad, x) for grad, x in zip(grads, (q, k, v), strict=True))

    return Flash(forward, backward)


def _summed(flash: Flash, axes: tuple[str, ...]) -> Flash:
    """`flash` for keys that several devices share: their gradients are added up."""

    def backward(q, k, v, out, lse, do):
        dq, *more = flash.backward(q, k, v, out, lse, do)
        dk, dv = (jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype) for x in more)
        return dq, dk, dv

    return flash._replace(backward=backward)


def _ulysses(flash: Flash, layout: Layout, frames: int) -> Callable[..., FrameHeads]:
    """Attention of all tokens by some of the heads on every device of "context"."""

    def deal(x):
        return jax.lax.all_to_all(_flat(x), CONTEXT, split_axis=2, concat_axis=1, tiled=True)

    def gather(x):
        x = jax.lax.all_to_all(x, CONTEXT, split_axis=1, concat_axis=2, tiled=True)
        return rearrange(x, "b (f n) a k -> b f n a k", f=frames)

    whole = layout._replace(tokens=(), heads=(*layout.heads, *layout.tokens))
    dealt = jax.shard_map(deal, in_specs=layout.frames, out_specs=whole.whole, check_vma=False)
    gathered = jax.shard_map(gather, in_specs=whole.whole, out_specs=layout.frames, check_vma=False)
    to_heads, to_tokens = _undone_by(dealt, gathered), _undone_by(gathered, dealt)
    attend = differentiable(_spread(flash, whole.whole, whole.whole, whole.lse))
    return lambda q, k, v: to_tokens(attend(to_heads(q), to_heads(k), to_heads(v)))


def _undone_by(there: Callable, back: Callable) -> Callable:
    """`there` with `back` for its gradient: left to itself, shard_map adds up what devices hold in common."""
    moved = jax.custom_vjp(there)
    moved.defvjp(lambda x: (there(x), None), lambda _, gradient: (back(gradient),))
    return moved


def _ring(flash: Flash, context: int) -> Flash:
    """`flash` for all keys of a ring of `context` devices; each hop passes them on while it computes.

    Between hops stands a barrier: the compiler would otherwise send all keys round first, and hold them.
    """
    barrier = jax.lax.optimization_barrier

    def forward(q, k, v):
        out = lse = jnp.float32(0)
        for hop in range(context):
            k, v, out, lse = barrier((k, v, out, lse)) if hop else (k, v, out, lse)
            coming = _passed_on((k, v)) if hop + 1 < context else (k, v)
            found = flash.forward(q, k, v)
            out, lse = _merged(out, lse, *found) if hop else found
            k, v = coming
        return out.astype(q.dtype), lse

    def backward(q, k, v, out, lse, do):
        types = q.dtype, k.dtype, v.dtype
        grads = (jnp.float32(0),) * 3
        for hop in range(context):
            k, v, grads = barrier((k, v, grads)) if hop else (k, v, grads)
            coming = _passed_on((k, v)) if hop + 1 < context else (k, v)
            # What was added up for these keys so far comes a hop behind them, and so also while computing.
            sums = _passed_on(grads[1:]) if hop else grads[1:]
            found = flash.backward(q, k, v, out, lse, do)
            grads = tuple(x + y.astype(jnp.float32) for x, y in zip((grads[0], *sums), found, strict=True))
            k, v = coming
        grads = (grads[0], *(_passed_on(grads[1:]) if context > 1 else grads[1:]))
        return tuple(x.astype(dtype) for x, dtype in zip(grads, types, strict=True))

    return Flash(forward, backward)


def _passed_on(tree):
    """Each device's arrays, now at the next device of the ring."""
    devices = jax.lax.axis_size(CONTEXT)
    return jax.lax.ppermute(tree, CONTEXT, [(i, (i + 1) % devices) for i in range(devices)])


def _merged(out: Heads, lse: LogSumExp, more: Heads, more_lse: LogSumExp) -> tuple[Heads, LogSumExp]:
    """Attention over two sets of keys, from that over each; out in float32."""
    total = jnp.logaddexp(lse, more_lse)
    shares = (rearrange(jnp.exp(part - total), "b a n -> b n a 1") for part in (lse, more_lse))
    out, more = (share * x.astype(jnp.float32) for share, x in zip(shares, (out, more), strict=True))
    return out + more, total
