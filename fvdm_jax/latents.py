"""Denoised latents in a file: what a decode that fails, or another decode, starts from.

Nothing here imports jax, so that a bad file is refused at once.
"""

import json
import math
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvdm_jax.program import Refusal, outputs

SUFFIX = ".latents.safetensors"
NAME = "latents"
LONGEST = 2**20
"""Bytes of the longest header that is read; ours have a few thousand."""


class Saved(NamedTuple):
    """What a file of latents says before they are read: their shape [b f h w c], and how they were made."""

    shape: tuple[int, ...]
    settings: dict


def save(path: Path, latents: np.ndarray, settings: dict) -> None:
    """Writes normalised latents [b f h w c], float32, with the settings that they were made with."""
    from safetensors.numpy import save_file

    with outputs(path) as (draft,):
        array = np.ascontiguousarray(latents, np.float32)
        save_file({NAME: array}, draft, {"settings": json.dumps(settings)})


def probe(path: Path) -> Saved:
    """What the file holds, from its header alone. Raises Refusal, named `path`, where it is no such file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refusal(path, "is no ordinary file", f"give one that ends in {SUFFIX}")
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= LONGEST:
                raise Refusal(path, "is no file of latents", f"give one that ends in {SUFFIX}")
            header = json.loads(file.read(length).decode("utf-8"))
            size = path.stat().st_size - 8 - length
        entry, settings = header[NAME], json.loads(header["__metadata__"]["settings"])
        shape = tuple(entry["shape"])
        sound = len(shape) == 5 and all(type(n) is int and n > 0 for n in shape)
        whole = (
            sound
            and isinstance(settings, dict)
            and size == 4 * math.prod(shape)
            and entry["data_offsets"] == [0, size]
        )
        if not whole or entry["dtype"] != "F32":
            raise Refusal(path, "is not a whole file of latents", "sample again, or copy it again")
        return Saved(shape, settings)
    except OSError as failure:
        raise Refusal(path, f"cannot be read: {failure.strerror}", "give a file that exists") from failure
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as broken:
        raise Refusal(path, "is no file of latents", f"give one that ends in {SUFFIX}") from broken


def load(path: Path) -> np.ndarray:
    """The latents [b f h w c], float32. Raises Refusal as `probe` does, and where they are not finite."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    probe(path)
    try:
        latents = load_file(path)[NAME]
    except (SafetensorError, OSError, KeyError) as broken:
        raise Refusal(path, f"cannot be read ({broken})", "sample again, or copy it again") from broken
    if not np.isfinite(latents).all():
        raise Refusal(path, "holds values that are not finite", "sample again")
    return latents
