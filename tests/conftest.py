"""Eight virtual CPU devices, strict dtype promotion; every warning is an error (pyproject.toml).

Programs that tests start find the package wherever they run, installed or not.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", os.environ.get("FVDM_TEST_PLATFORM", "cpu"))
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a model that is smaller than the bundled one."""
    import small

    folder = tmp_path_factory.mktemp("model")
    small.save(folder)
    return folder
