import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fvdm_jax import latents
from fvdm_jax.program import Refusal
from fvdm_jax.prompts import TextCache, fingerprint

STATES = np.zeros((6, 3), np.float32)
STATES[:4] = np.arange(1, 13).reshape(4, 3) / 7


@pytest.fixture
def read():
    """An encoder that counts how often it is asked."""

    def states(prompt: str) -> np.ndarray:
        states.asked.append(prompt)
        return STATES

    states.asked = []
    return states


def test_a_prompt_is_read_once(tmp_path, read):
    for _ in range(3):
        found = TextCache(tmp_path / "new", "weights").states("a cat", 6, read)
        assert np.array_equal(found, STATES) and found.dtype == np.float32
    assert read.asked == ["a cat"]
    # Only what is not padding is stored.
    (file,) = (tmp_path / "new").iterdir()
    assert load_file(file)["states"].shape == (4, 3)


def test_another_prompt_or_other_weights_are_read(tmp_path, read):
    for depends, prompt in (("weights", "a cat"), ("weights", "a dog"), ("other", "a cat")):
        TextCache(tmp_path, depends).states(prompt, 6, read)
    assert read.asked == ["a cat", "a dog", "a cat"]


def test_a_damaged_file_is_read_again_and_replaced(tmp_path, read):
    cache = TextCache(tmp_path, "weights")
    cache.states("a cat", 6, read)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    damaged = [b"", content[:-5], *(content[:i] + b"\xff" + content[i + 1 :] for i in range(0, 60, 7))]
    for damage in damaged:
        file.write_bytes(damage)
        assert np.array_equal(cache.states("a cat", 6, read), STATES)
    for other in (np.zeros((9, 3), np.float32), np.zeros(3, np.float32), np.zeros((2, 3))):
        save_file({"states": other}, file)
        assert np.array_equal(cache.states("a cat", 6, read), STATES)
    assert len(read.asked) == 1 + len(damaged) + 3


@pytest.mark.parametrize("folder", [None, "/proc/none"])
def test_without_a_folder_nothing_is_kept_and_all_works(folder, read):
    cache = TextCache(folder and Path(folder), "weights")
    assert np.array_equal(cache.states("a cat", 6, read), STATES)


def test_a_fingerprint_is_of_the_contents(tmp_path):
    rng = np.random.default_rng(0)
    content = rng.bytes(3_000_000)
    first, same, other = (tmp_path / name for name in "abc")
    for path in (first, same):
        path.write_bytes(content)
        os.utime(path, (1, 1))
    # Weights that were trained on differ everywhere but in the header.
    other.write_bytes(content[:70_000] + rng.bytes(2_930_000))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    assert fingerprint(first) != fingerprint(first, same)
    os.utime(same, (1, 2))
    assert fingerprint(first) != fingerprint(same)
    with pytest.raises(Refusal, match="cannot be read"):
        fingerprint(tmp_path / "none")


def test_latents_come_back_with_their_settings(tmp_path):
    path, made = tmp_path / "a.latents.safetensors", np.random.default_rng(0).normal(size=(1, 2, 4, 6, 3))
    latents.save(path, made, {"prompt": "ä", "seed": 2**63})
    assert latents.probe(path) == ((1, 2, 4, 6, 3), {"prompt": "ä", "seed": 2**63})
    assert np.array_equal(latents.load(path), made.astype(np.float32))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\x02" + b"\0" * 7 + b"{}",
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x04" + b"\0" * 7 + b"\xff\xfe\xfd\xfc",
    ],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(Refusal, match="is no file of latents"):
        latents.probe(path)


def test_latents_that_are_not_finite_are_refused(tmp_path):
    latents.save(tmp_path / "a", np.full((1, 1, 1, 1, 1), np.nan), {})
    with pytest.raises(Refusal, match="not finite"):
        latents.load(tmp_path / "a")
