"""Eight virtual CPU devices, strict dtype promotion; every warning is an error (pyproject.toml).

Programs that tests start find the package wherever they run, installed or not. Most of the time goes into
compiling: on a CPU programs are compiled with little optimisation, and once for all processes of a session.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", os.environ.get("FVDM_TEST_PLATFORM", "cpu"))
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
if os.environ["JAX_PLATFORMS"] == "cpu":
    kept = tempfile.mkdtemp(prefix="fvdm_jax_tests_")
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": kept,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def optimised():
    """From here to the end of the module programs are compiled as for users, to compute rather than once."""
    before = jax.config._read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def as_for_users(request):
    """What looks at programs for accelerators gets them as users have them."""
    if any(request.node.get_closest_marker(mark) for mark in ("tpu_aot", "gpu")):
        request.getfixturevalue("optimised")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a model that is smaller than the bundled one."""
    import small

    folder = tmp_path_factory.mktemp("model")
    small.save(folder)
    return folder
