"""What programs ask of the machine that they run on: memory, folders, versions."""

import contextlib
import os
import platform
from pathlib import Path

import fvdm_jax


def free(device) -> float:
    """Bytes that are free on a device; infinite where nobody says."""
    sizes = device.memory_stats() or {}
    if "bytes_limit" in sizes:
        return sizes["bytes_limit"] - sizes["bytes_in_use"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return float("inf")


def cache(kind: str) -> Path | None:
    """The folder of this user's cache for things of a kind; a user without a home has none."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvdm_jax" / kind


def keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache, so that a second run starts at once."""
    import jax

    if not jax.config.jax_compilation_cache_dir and (folder := cache("programs")):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def versions() -> dict[str, str]:
    """The versions of this library, of Python, and of what results may depend on."""
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "numpy", "av", "ftfy", "sentencepiece", "tokenizers")
    ours = {"fvdm_jax": fvdm_jax.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in packages}
