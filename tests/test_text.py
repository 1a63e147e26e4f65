from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import convert, wan
from fvdm_jax import sharding
from fvdm_jax.models.text import TextConfig, TextEncoder, abstract, relative_buckets
from fvdm_jax.models.tokenizer import VOCABULARY, byte_tokenizer

CONFIG = TextConfig(VOCABULARY, 16, 2, 8, 24, 2, length=12, dtype="float32")


def test_the_published_size_has_its_number_of_parameters():
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(TextConfig()))) == 5_680_910_336


def test_buckets_tell_near_positions_apart_and_the_sides():
    buckets = relative_buckets(300)
    # By hand, T5's rule for 32 buckets up to distance 128.
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets[8, :9].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert buckets[0, 128:].min() == 31 and buckets[128:, 0].min() == 15


GOLDEN = np.load(Path(__file__).parent / "golden" / "umt5.npz")
SMALL = TextConfig(384, 64, 4, 16, 160, 3, dtype="float32")


def test_buckets_are_umt5s():
    golden = GOLDEN["const/bucket_rel_minus511_to_511"]
    buckets = relative_buckets(512)
    assert np.array_equal(buckets[511], golden[:512]) and np.array_equal(buckets[0], golden[511:])


@pytest.fixture(scope="module")
def umt5():
    params = convert(wan.umt5(), {key[2:]: GOLDEN[key] for key in GOLDEN if key.startswith("w/")})
    tokens, mask = jnp.asarray(GOLDEN["in/ids"], jnp.int32), jnp.asarray(GOLDEN["in/mask"], bool)
    return params, tokens, mask


def test_states_are_umt5s(umt5):
    params, tokens, mask = umt5
    states = jax.jit(lambda *x: TextEncoder(SMALL).apply({"params": params}, *x))(tokens, mask)
    for row, length in enumerate((11, 300)):
        np.testing.assert_allclose(states[row, :length], GOLDEN[f"out/valid{row}"], rtol=0, atol=5e-6)
        assert not np.any(states[row, length:])


def test_eight_devices_say_the_same(umt5):
    params, tokens, mask = umt5
    over = sharding.mesh(fsdp=2, tensor=4)
    spread = jax.device_put(params, sharding.shardings(over, abstract(SMALL)))
    kernel = spread["layers"]["attention"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 64 // 2, 64 // 4)
    encode = jax.jit(lambda params, *x: TextEncoder(SMALL).apply({"params": params}, *x))
    alone, together = (np.asarray(encode(p, tokens, mask)) for p in (params, spread))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def encoder():
    tokens, mask = byte_tokenizer(["a"], 12)
    params = jax.jit(TextEncoder(CONFIG).init)(jax.random.key(0), tokens, mask)
    return jax.jit(lambda tokens, mask: TextEncoder(CONFIG).apply(params, tokens, mask))


def test_what_follows_a_prompt_is_not_read_and_its_rows_are_zero(encoder):
    tokens, mask = byte_tokenizer(["cat", "cat"], 12)
    tokens[1, 4:] = 77
    states = encoder(jnp.asarray(tokens), jnp.asarray(mask))
    assert not np.any(states[:, 4:]) and np.all(np.any(states[:, :4], -1))
    np.testing.assert_allclose(states[0], states[1], rtol=0, atol=1e-6)


def test_the_order_of_letters_is_read(encoder):
    tokens, mask = byte_tokenizer(["tac", "cat"], 12)
    states = encoder(jnp.asarray(tokens), jnp.asarray(mask))
    assert np.abs(states[0, 0] - states[1, 2]).max() > 3e-3
