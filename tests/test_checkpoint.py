import jax
import ml_dtypes
import numpy as np
import pytest

from fvdm_jax.checkpoint import load_tree, save_tree
from fvdm_jax.program import Refusal

TREE = {
    "a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": {"d": np.float32([1.5])}},
    "e": np.int32([7]),
}


def test_a_tree_comes_back(tmp_path):
    save_tree(tmp_path / "x", TREE)
    back = load_tree(tmp_path / "x")
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype


def test_strided_arrays_are_stored_as_they_look(tmp_path):
    """safetensors 0.8.0 writes the memory behind a transposed view instead."""
    strided = {"t": TREE["a"]["b"].T, "s": np.arange(10.0, dtype=np.float32)[::2]}
    save_tree(tmp_path / "x", strided)
    assert all(np.array_equal(load_tree(tmp_path / "x")[key], strided[key]) for key in strided)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_narrow_floats_come_back_as_float32(tmp_path, dtype):
    save_tree(tmp_path / "x", TREE, dtype)
    back = load_tree(tmp_path / "x")
    assert back["a"]["b"].dtype == np.float32 and np.array_equal(back["a"]["b"], TREE["a"]["b"])
    assert back["e"].dtype == np.int32


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"hello")
    for name in ("x", "none"):
        with pytest.raises(Refusal, match="is not a whole safetensors file"):
            load_tree(tmp_path / name)
