"""What programs ask of the machine that they run on: memory, folders, versions."""

import contextlib
import os
import platform
import subprocess
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
    """Compiled programs go to the user's cache, so that a second run starts at once.

    Not so for several processes on GPUs, unless the folder is named by JAX_COMPILATION_CACHE_DIR: jax writes
    from the first process alone, and where the others cannot read that they compile without it, and wait for
    its share of what XLA measures together.
    """
    import jax

    alone = jax.process_count() == 1 or jax.default_backend() != "gpu"
    if alone and not jax.config.jax_compilation_cache_dir and (folder := cache("programs")):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1
"""Options of glibc's mallopt, by the numbers in its malloc.h."""


def keep_memory() -> None:
    """What is freed stays with the process, where a CPU computes and the C library is glibc.

    XLA's CPU backend takes a step's memory anew at each step; from the system it would come as pages of
    zeros, millions of them, which cost a fifth of the time of training at Wan's widths.
    """
    import ctypes

    import jax

    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        # One arena, nothing mapped for itself, and −1: nothing given back.
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
            library.mallopt(option, value)


def versions() -> dict[str, str]:
    """The versions of this library, of Python, and of what results may depend on."""
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "av", "ftfy", "sentencepiece", "tokenizers")
    ours = {"fvdm_jax": fvdm_jax.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in packages}


def revision() -> dict[str, str]:
    """The revision of the code, where it is a checkout of git and git is there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        here = Path(__file__).parent
        said = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        return {"revision": said.stdout.strip()}
    return {}
