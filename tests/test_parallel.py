"""Attention over meshes of eight virtual devices equals that of one, gradients and all."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fvdm_jax import sharding
from fvdm_jax.kernels import attention, parallel, splash
from fvdm_jax.kernels.parallel import EXCHANGES, Attending, cross_attention, exchange_for, self_attention
from fvdm_jax.models.layers import REMAT

MESHES = [
    (dict(context=4), "ulysses"),
    (dict(context=8), "ulysses"),
    (dict(context=8), "ring"),
    (dict(fsdp=2, context=4), "ring"),
    (dict(data=2, context=2, tensor=2), "ulysses"),
    (dict(data=2, context=2, tensor=2), "ring"),
    (dict(data=2, fsdp=2, tensor=2), "auto"),
]
FRAMES = PartitionSpec(("data", "fsdp"), None, "context")


@functools.cache
def case(clips=2, frames=3, tokens=16, heads=8, width=16, keys=5):
    """q, k, v of frames, k and v of a text, and the gradient of the output."""
    shape, text = (clips, frames, tokens, heads, width), (clips, keys, heads, width)
    shapes = shape, shape, shape, text, text, shape
    seeds = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(seed, shape) for seed, shape in zip(seeds, shapes, strict=True)]


def both(attending):
    """Self- and cross-attention with their gradients."""

    def outputs(q, k, v, text_k, text_v):
        return self_attention(q, k, v, attending) + cross_attention(q, text_k, text_v, attending)

    def function(*arrays):
        out, back = jax.vjp(outputs, *arrays[:-1])
        return out, *back(arrays[-1])

    return jax.jit(function)


def distance(got, want) -> float:
    """The largest of the relative ones."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(got, want, strict=True)]
    return max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs)


@pytest.fixture(scope="module")
def alone():
    """The case on one device."""
    return both(Attending())(*case())


@pytest.mark.parametrize("sizes, exchange", MESHES, ids=str)
def test_a_mesh_of_devices_attends_as_one_does(alone, sizes, exchange):
    arrays = case()
    with jax.set_mesh(sharding.mesh(**sizes)):
        spread = both(Attending(exchange=exchange))(*arrays)
    assert distance(spread, alone) < 1e-5


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_kernel_of_tpus_is_merged_round_the_ring(monkeypatch, exchange):
    arrays = case(clips=1, heads=2)
    want = both(Attending())(*arrays)
    interpreted = splash.flash(interpret=True)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash", lambda platform, dtype, width: interpreted)
    with jax.set_mesh(sharding.mesh(context=2)):
        got = both(Attending("splash", exchange))(*arrays)
    assert distance(got, want) < 1e-5


def test_bfloat16_is_merged_in_float32():
    arrays = [x.astype(jnp.bfloat16) for x in case()]
    with jax.set_mesh(sharding.mesh(context=4)):
        spread = both(Attending(exchange="ring"))(*arrays)
    one = both(Attending())(*arrays)
    assert all(x.dtype == jnp.bfloat16 for x in spread)
    # The inputs' own rounding is 1.7e-3, each of four hops rounds what it found.
    assert distance([x.astype(jnp.float32) for x in spread], [x.astype(jnp.float32) for x in one]) < 5e-3


class Layer(nn.Module):
    """Attention as a network has it: inside a scan, recomputed for the gradient."""

    attending: Attending

    @nn.compact
    def __call__(self, x, _):
        scale = self.param("scale", nn.initializers.ones, (3,))
        q, k, v = (x * s for s in scale)
        return x + self_attention(q, k, v, self.attending), None


def layers(remat: str, attending: Attending = parallel.AUTO):
    scanned = nn.scan(
        nn.remat(Layer, prevent_cse=False, policy=REMAT[remat]), variable_axes={"params": 0},
        split_rngs={"params": True}, in_axes=nn.broadcast, length=2,
    )(attending)  # fmt: skip
    return scanned, lambda params, x: jnp.sum(jnp.square(scanned.apply(params, x, None)[0]))


@pytest.mark.parametrize(
    "remat, exchange", [("full", "ring"), ("attention", "ring"), ("attention", "ulysses")]
)
def test_within_a_scan_with_what_is_kept(remat, exchange):
    x = case()[0]
    scanned, alone = layers("full")
    params = scanned.init(jax.random.key(0), x, None)
    want = jax.jit(jax.grad(alone))(params, x)
    with jax.set_mesh(sharding.mesh(fsdp=2, context=2, tensor=2)):
        got = jax.jit(jax.grad(layers(remat, Attending(exchange=exchange))[1]))(params, x)
    assert distance(jax.tree.leaves(got), jax.tree.leaves(want)) < 1e-5


def collectives(function, sizes: dict, arrays, specs) -> dict[str, int]:
    """How many of each kind stand in the compiled program."""
    over = sharding.mesh(**sizes)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(over, spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]
    with jax.set_mesh(over):
        text = function.lower(*placed).compile().as_text()
    kinds = re.findall(r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)[(-]", text)
    return {kind: kinds.count(kind) for kind in set(kinds)}


@pytest.mark.parametrize("sizes", [dict(context=4), dict(fsdp=2, context=2, tensor=2)], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_only_what_the_exchange_needs_is_sent(exchange, sizes):
    def function(q, k, v, do):
        with_sharding = PartitionSpec(("data", "fsdp"), None, "context", "tensor")
        out, back = jax.vjp(lambda *x: self_attention(*x, Attending(exchange=exchange)), q, k, v)
        return jax.lax.with_sharding_constraint((out, *back(do)), with_sharding)

    q, k, v, _, _, do = case()
    spec = PartitionSpec(("data", "fsdp"), None, "context", "tensor")
    found = collectives(jax.jit(function), sizes, (q, k, v, do), [spec] * 4)
    context = sizes["context"]
    # Forward: q, k, v and the output; backward: its gradient and theirs.
    # Round the ring: k and v, one hop less than there are devices, and their gradients, which come home. The
    # compiler of CPUs sees that k and v go round twice, and sends them once.
    ring = 2 * (context - 1) + 2 * context
    assert found == ({"all-to-all": 8} if exchange == "ulysses" else {"collective-permute": ring})


def test_attending_to_a_text_sends_the_gradients_of_its_keys_alone():
    def function(q, k, v, do):
        out, back = jax.vjp(cross_attention, q, k, v)
        dq, dk, dv = back(do)
        return *jax.lax.with_sharding_constraint((out, dq), FRAMES), dk, dv

    q, _, _, k, v, do = case()
    specs = FRAMES, PartitionSpec(), PartitionSpec(), FRAMES
    assert set(collectives(jax.jit(function), dict(context=4), (q, k, v, do), specs)) == {"all-reduce"}


def test_the_exchange_is_chosen_by_the_heads_of_a_device():
    assert exchange_for(40, 8) == "ulysses"
    assert exchange_for(12, 8) == "ring"
    assert exchange_for(40, 8, "ring") == "ring"
    with pytest.raises(ValueError, match="cannot deal 12 heads to 8 devices; take ring"):
        exchange_for(12, 8, "ulysses")
    with pytest.raises(ValueError, match="take one of auto, ulysses, ring"):
        exchange_for(12, 8, "rings")


def test_tokens_that_do_not_divide_are_refused_and_heads_and_clips_stay_whole():
    q, k, v, *_ = case(clips=3, tokens=15, heads=3)
    with (
        jax.set_mesh(sharding.mesh(context=8)),
        pytest.raises(ValueError, match="15 tokens of a frame; 1, 3, 5"),
    ):
        self_attention(q, k, v)
    with jax.set_mesh(sharding.mesh(data=2, fsdp=2, tensor=2)):
        assert parallel._layout(q) == parallel.Layout((), (), ())
        got = jax.jit(self_attention)(q, k, v)
    assert distance([got], [jax.jit(lambda *x: self_attention(*x))(q, k, v)]) < 1e-5
