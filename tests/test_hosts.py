"""What goes wrong only where there are several processes, or memory of the host's beside the devices'."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_saving import SETTINGS, state

from fvdm_jax import checkpoint, machine
from fvdm_jax.saving import Checkpoints, Position


def test_one_process_reads_a_folder_without_the_others(tmp_path, monkeypatch):
    """As the first does for its samples, while the others train: none may be waited for."""
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}}
    ocp.PyTreeCheckpointer().save(tmp_path / "vae", tree)

    def never(*_, **__):
        raise AssertionError("waits for other processes")

    for name in ("sync_global_processes", "broadcast_one_to_all"):
        monkeypatch.setattr(ocp.multihost, name, never)
    np.testing.assert_array_equal(checkpoint.restore_tree(tmp_path / "vae")["a"]["b"], tree["a"]["b"])
    with pytest.raises(AssertionError, match="waits for other"):
        ocp.PyTreeCheckpointer().restore(tmp_path / "vae")


@pytest.fixture
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("processes, backend, kept", [(1, "gpu", True), (2, "gpu", False), (2, "tpu", True)])
def test_gpus_of_several_processes_have_no_cache_that_only_one_writes(monkeypatch, processes, backend, kept):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    machine.keep_compiled_programs()
    assert bool(jax.config.jax_compilation_cache_dir) == kept


def test_what_lies_in_the_hosts_memory_is_saved_before_training_goes_on(tmp_path):
    """Orbax looks at it where it is, and the next step writes there."""
    plain = state(1)

    def moved(leaf):
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))

    offloaded = plain._replace(optimizer=jax.tree.map(moved, plain.optimizer))
    for kind, under_way in ((plain, 1), (offloaded, None)):
        checkpoints = Checkpoints(tmp_path / str(under_way), SETTINGS)
        checkpoints.save(kind, Position(1, 8))
        assert checkpoints._writing == under_way
        checkpoints.settle()
        assert checkpoints.steps() == [1]
        checkpoints.close()
