"""Eight virtual CPU devices, strict dtype promotion; every warning is an error (pyproject.toml)."""

import os

os.environ.setdefault("JAX_PLATFORMS", os.environ.get("FVDM_TEST_PLATFORM", "cpu"))
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
