from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvdm_jax.models.text import TextConfig, TextEncoder, abstract, relative_buckets
from fvdm_jax.models.tokenizer import END, OFFSET, PAD, VOCABULARY, byte_length, byte_tokens

CONFIG = TextConfig(VOCABULARY, 16, 2, 8, 24, 2, length=12, dtype="float32")


def test_bytes_an_end_and_padding():
    tokens, mask = byte_tokens(["ab", "", "é"], 5)
    a, b = ord("a") + OFFSET, ord("b") + OFFSET
    assert tokens.tolist()[:2] == [[a, b, END, PAD, PAD], [END, PAD, PAD, PAD, PAD]]
    assert tokens[2].tolist() == [0xC3 + OFFSET, 0xA9 + OFFSET, END, PAD, PAD]
    assert mask.sum(1).tolist() == [3, 1, 3] == [byte_length(p) for p in ("ab", "", "é")]
    assert tokens.max() < VOCABULARY


def test_a_long_prompt_is_cut_and_still_ends():
    tokens, mask = byte_tokens(["abcdefgh"], 5)
    assert tokens[0, -1] == END and mask.all() and byte_length("abcdefgh") == 9


def test_the_published_size_has_its_number_of_parameters():
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(TextConfig()))) == 5_680_910_336


def test_buckets_tell_near_positions_apart_and_the_sides():
    buckets = relative_buckets(300)
    # By hand, T5's rule for 32 buckets up to distance 128.
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets[8, :9].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert buckets[0, 128:].min() == 31 and buckets[128:, 0].min() == 15


def test_buckets_are_umt5s():
    golden = np.load(Path(__file__).parent / "golden" / "vae22_umt5.npz")["umt5/buckets"]
    buckets = relative_buckets(512)
    assert np.array_equal(buckets[511], golden[:512]) and np.array_equal(buckets[0], golden[511:])


@pytest.fixture(scope="module")
def encoder():
    tokens, mask = byte_tokens(["a"], 12)
    params = jax.jit(TextEncoder(CONFIG).init)(jax.random.key(0), tokens, mask)
    return jax.jit(lambda tokens, mask: TextEncoder(CONFIG).apply(params, tokens, mask))


def test_what_follows_a_prompt_is_not_read_and_its_rows_are_zero(encoder):
    tokens, mask = byte_tokens(["cat", "cat"], 12)
    tokens[1, 4:] = 77
    states = encoder(jnp.asarray(tokens), jnp.asarray(mask))
    assert not np.any(states[:, 4:]) and np.all(np.any(states[:, :4], -1))
    np.testing.assert_allclose(states[0], states[1], rtol=0, atol=1e-6)


def test_the_order_of_letters_is_read(encoder):
    tokens, mask = byte_tokens(["tac", "cat"], 12)
    states = encoder(jnp.asarray(tokens), jnp.asarray(mask))
    assert np.abs(states[0, 0] - states[1, 2]).max() > 3e-3
