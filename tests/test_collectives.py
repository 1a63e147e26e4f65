"""What a compiled program sends and computes, read from its text: counted by hand for small programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fvdm_jax.planning import collectives, hlo

TURNS = 5
ROWS, WIDTH = 64, 256
SENT = {
    "all-gather": 3,
    "all-reduce": 2 * 3 / 4,
    "reduce-scatter": 3 / 4,
    "all-to-all": 3 / 4,
    "collective-permute": 1,
}
"""Of a device's array, what one of four devices in a ring sends."""


def exchanging(x: jax.Array, kind: str) -> jax.Array:
    """One collective of x along the axis "context", with a result of x's shape."""
    if kind == "all-gather":
        return jax.lax.all_gather(x, "context", tiled=True)[:ROWS] + 1
    if kind == "all-reduce":
        return jnp.tanh(jax.lax.psum(x, "context"))
    if kind == "reduce-scatter":
        return jnp.tile(jax.lax.psum_scatter(x, "context", tiled=True), (4, 1)) + 1
    if kind == "all-to-all":
        return jax.lax.all_to_all(x, "context", 0, 1, tiled=True).reshape(ROWS, WIDTH) + 1
    return jax.lax.ppermute(x, "context", [(i, (i + 1) % 4) for i in range(4)]) + 1


def compiled(devices: list, kind: str) -> hlo.Program:
    """A collective, TURNS times three times, in loops within each other, over two groups of four."""
    over = Mesh(np.asarray(devices[:8]).reshape(2, 4), ("data", "context"))
    spec = PartitionSpec(("data", "context"))

    def once(x, _):
        return exchanging(x, kind), None

    def outer(x, _):
        return jax.lax.scan(once, jnp.sin(x), None, length=TURNS)[0], None

    def run(x):
        return jax.lax.scan(outer, x, None, length=3)[0]

    mapped = jax.shard_map(run, mesh=over, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(over, spec))
    return hlo.parse(jax.jit(mapped).lower(x).compile().as_text())


def check(program: hlo.Program, kind: str) -> None:
    """That the program has this collective and no other, as often as its loops turn."""
    every = collectives.found(program)
    assert {each.kind for each in every} == {kind}
    assert {each.times for each in every} == {3 * TURNS}
    members = {frozenset(group) for each in every for group in each.groups}
    if kind != "collective-permute":
        assert members == {frozenset(range(4)), frozenset(range(4, 8))}
    sent = sum(each.wire for each in every)
    assert sent == pytest.approx(3 * TURNS * SENT[kind] * ROWS * WIDTH * 4)
    assert program.uncounted() == 0


@pytest.mark.parametrize("kind", collectives.KINDS)
def test_bytes_that_a_device_sends(kind):
    check(compiled(jax.devices(), kind), kind)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
@pytest.mark.parametrize("kind", collectives.KINDS)
def test_bytes_that_a_chip_sends(tpu, name, kind):
    check(compiled(tpu(name), kind), kind)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_every_notation_of_groups(text, groups):
    assert collectives._groups(f", channel_id=1, {text}", 4) == groups


def test_an_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        collectives._groups("replica_groups=@other", 4)


def network(x, w, inner: int):
    """A product in a loop in a loop, its result used by a scatter of rows."""

    def layer(x, w):
        return jax.lax.fori_loop(0, inner, lambda _, y: jnp.tanh(y @ w), x), None

    return jax.lax.scan(layer, x, w)[0]


def program_of(function, *shapes, over=None) -> hlo.Program:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*inputs).compile().as_text())


def test_products_count_as_often_as_their_loops_turn():
    program = program_of(partial(network, inner=4), (32, 48), (3, 48, 48))
    assert hlo.products(program).operations == 3 * 4 * 2 * 32 * 48 * 48


def test_batched_products_and_convolutions():
    program = program_of(lambda q, k: jnp.einsum("bnak,bmak->banm", q, k), (2, 40, 3, 16), (2, 24, 3, 16))
    assert hlo.products(program).operations == 2 * 2 * 3 * 40 * 24 * 16
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(2,), padding=[(1, 1)])
    program = program_of(convolve, (2, 8, 32), (5, 8, 3))
    # Of 16 places each meets three inputs, but the first, which meets the padding once.
    assert hlo.products(program).operations == 2 * 2 * 5 * 8 * (16 * 3 - 1)


@pytest.mark.tpu_aot
def test_products_of_a_tpu_are_counted_in_passes(tpu):
    one = NamedSharding(Mesh(tpu("v5e:2x2")[:1], "x"), PartitionSpec())
    counted = {}
    for precision in ("default", "highest"):
        with jax.default_matmul_precision(precision):
            program = program_of(lambda x, w: network(x, w, 4), (128, 256), (3, 256, 256), over=one)
            counted[precision] = hlo.products(program)
    operations = 3 * 4 * 2 * 128 * 256 * 256
    assert counted["default"] == (operations, operations)
    assert counted["highest"] == (operations, 6 * operations)


@pytest.mark.tpu_aot
def test_batched_products_of_a_tpu(tpu):
    """Which writes them as convolutions over the batch."""
    one = NamedSharding(Mesh(tpu("v5e:2x2")[:1], "x"), PartitionSpec())
    program = program_of(
        lambda q, k: jnp.einsum("bnak,bmak->banm", q, k), (2, 128, 3, 64), (2, 256, 3, 64), over=one
    )
    assert hlo.products(program).operations == 2 * 2 * 3 * 128 * 256 * 64


def test_traffic_of_a_loop_over_slices():
    """A layer reads its own matrix, not the stack of all."""
    program = program_of(partial(network, inner=1), (32, 256), (64, 256, 256))
    least = 4 * 64 * 256 * 256
    assert least <= hlo.moved(program) < 6 * least


def test_a_loop_whose_turns_nobody_knows_is_told():
    def search(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) > 1, lambda y: y / 2, x)

    assert program_of(search, (8,)).uncounted() == 1
