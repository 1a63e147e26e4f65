"""Denoised latents in a file: what a decode that fails, or another decode, starts from.

Nothing here imports jax, so that a bad file is refused at once.
"""

import json
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
        save_file({NAME: array}, draft, {"settings": json.dumps(settings, ensure_ascii=False)})


def probe(path: Path) -> Saved:
    """What the file holds, from its header alone. Raises Refusal, named `path`, where it is no such file."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= LONGEST:
                raise Refusal(path, "is no file of latents", f"give one that ends in {SUFFIX}")
            header = json.loads(file.read(length).decode("utf-8"))
            size = path.stat().st_size - 8 - length
        entry, settings = header[NAME], json.loads(header["__metadata__"]["settings"])
        shape = tuple(map(int, entry["shape"]))
        whole = entry["dtype"] == "F32" and len(shape) == 5 and min(shape) > 0 and isinstance(settings, dict)
        if not whole or size != 4 * int(np.prod(shape, dtype=object)):
            raise Refusal(path, "is not a whole file of latents", "sample again, or copy it again")
        return Saved(shape, settings)
    except OSError as failure:
        raise Refusal(path, f"cannot be read: {failure.strerror}", "give a file that exists") from failure
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as broken:
        raise Refusal(path, "is no file of latents", f"give one that ends in {SUFFIX}") from broken


def load(path: Path) -> np.ndarray:
    """The latents [b f h w c], float32. Raises Refusal as `probe` does, and where they are not finite."""
    from safetensors.numpy import load_file

    probe(path)
    latents = load_file(path)[NAME]
    if not np.isfinite(latents).all():
        raise Refusal(path, "holds values that are not finite", "sample again")
    return latents
