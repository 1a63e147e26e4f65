"""What prompts say to the network: read once by the text encoder, then kept on disk."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fvdm_jax.program import Refusal, outputs

SAMPLES, BLOCK = 256, 4096
"""How many places of a file of weights are looked at for its fingerprint, and how many bytes at each."""


def fingerprint(*paths: Path, dated: bool = True) -> str:
    """A hash of each file's size, time (if `dated`), first 64 KiB, where tensors are named, and more blocks.

    Reading 11 GB of weights to find that a prompt is known would take longer than to encode it. Raises
    Refusal, named for the file, where one cannot be read.
    """
    found = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                time = status.st_mtime_ns if dated else 0
                found.update(f"{status.st_size} {time}".encode() + file.read(65536))
                for place in np.linspace(0, max(0, status.st_size - BLOCK), SAMPLES).astype(int).tolist():
                    file.seek(place)
                    found.update(file.read(BLOCK))
        except OSError as failure:
            raise Refusal(path, f"cannot be read: {failure.strerror}", "make it readable") from failure
    return found.hexdigest()


class TextCache:
    """States of prompts in a folder, one file each, named by the prompt and by all that they depend on."""

    def __init__(self, folder: Path | None, depends: object):
        """`depends`: anything that JSON can say; without a folder nothing is kept."""
        self._folder, self._depends = folder, json.dumps(depends, sort_keys=True, default=str)

    def states(self, prompt: str, length: int, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The states [length e] of a prompt, from the folder, or as `read` has them, which are then kept.

        Their rows are 0 after the prompt's true length; only those before are stored.
        """
        found = self._load(prompt, length)
        if found is None:
            found = np.asarray(read(prompt), np.float32)
            found = found[: 1 + int(np.flatnonzero(found.any(-1))[-1])] if found.any() else found[:0]
            self._save(prompt, found)
        return np.pad(found, ((0, length - len(found)), (0, 0)))

    def _path(self, prompt: str) -> Path:
        key = hashlib.sha256(json.dumps([prompt, self._depends]).encode()).hexdigest()
        return self._folder / f"{key}.safetensors"

    def _load(self, prompt: str, length: int) -> np.ndarray | None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not self._folder:
            return None
        try:
            found = load_file(self._path(prompt))["states"]
        except (OSError, SafetensorError, KeyError):
            # Not there, or not whole: encoded again and replaced.
            return None
        fits = found.dtype == np.float32 and found.ndim == 2 and len(found) <= length
        return found if fits else None

    def _save(self, prompt: str, states: np.ndarray) -> None:
        from safetensors.numpy import save_file

        if not self._folder:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with outputs(self._path(prompt)) as (draft,):
                save_file({"states": np.ascontiguousarray(states)}, draft)
        except (OSError, Refusal):
            # A cache that cannot be written costs time, and nothing else.
            return
