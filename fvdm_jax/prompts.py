"""What prompts say to the network: read once by the text encoder, then kept on disk."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fvdm_jax.program import Refusal, outputs

TOKENIZERS = ("tokenizer.json", "spiece.model")
"""What a model's folder may hold beside the weights; where it has neither, its prompts are bytes."""

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


def trimmed(states: np.ndarray) -> np.ndarray:
    """States [l e] without the rows of zeros after the prompt's true length."""
    return states[: 1 + int(np.flatnonzero(states.any(-1))[-1])] if states.any() else states[:0]


def padded(states: np.ndarray, length: int) -> np.ndarray:
    """States [l e] with rows of zeros after them, up to `length`: what `trimmed` took away."""
    return np.pad(states, ((0, length - len(states)), (0, 0)))


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
            found = trimmed(np.asarray(read(prompt), np.float32))
            self._save(prompt, found)
        return padded(found, length)

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


class Reader:
    """Reads prompts with the text encoder of a model's folder; its weights are loaded for the first unknown.

    States that have been read are kept in a folder `kept`, if there is one. Raises Refusal, named --model,
    where the folder has no tokenizer for its weights.
    """

    def __init__(self, model: Path, networks, stages, kept: Path | None = None):
        from fvdm_jax import machine
        from fvdm_jax.models.tokenizer import VOCABULARY, byte_tokenizer, load_tokenizer

        self._model, self._networks, self._stages = model, networks, stages
        self.length, known = networks.text.length, networks.text.vocabulary
        words = [path for name in TOKENIZERS if (path := model / name).is_file()][:1]
        self._tokenizer = load_tokenizer(words[0]) if words else byte_tokenizer
        if self._tokenizer.vocabulary > known or not words and known > VOCABULARY:
            what = f"{words[0] if words else model} has no tokens for these weights"
            raise Refusal("--model", what, f"put the {' or '.join(TOKENIZERS)} of the text encoder there")
        depends: object = None
        if kept:
            # A converted model's manifest has the hashes of all that it was made of.
            weights = [model / name for name in ("text.safetensors", "manifest.json")]
            weights = fingerprint(*filter(Path.is_file, weights), *words)
            depends = weights, dataclasses.asdict(networks.text), machine.versions()
        self._cache = TextCache(kept, depends)

    def count(self, prompt: str) -> int:
        """Tokens of the whole prompt, of which `length` are read."""
        return self._tokenizer.count(prompt)

    def states(self, prompt: str) -> np.ndarray:
        """The states [l e] of a prompt, float32, 0 after its true length."""
        return self._cache.states(prompt, self.length, self._read)

    def _read(self, prompt: str):
        params, program = self._encoder
        return program(params, *self._tokenizer([prompt], self.length))[0]

    @functools.cached_property
    def _encoder(self) -> tuple:
        """The weights, spread over this process's devices, and the program that reads one prompt."""
        import jax

        from fvdm_jax import checkpoint, programs, sharding
        from fvdm_jax.models.text import abstract

        with self._stages("load"):
            params = checkpoint.load(self._model, ("text",))[1]["text"]
            devices = jax.local_devices()
            over = sharding.mesh(fsdp=len(devices), devices=devices)
            placed = sharding.shardings(over, abstract(self._networks.text))
            params = {"text": jax.device_put(params, placed)}
        tokens = self._tokenizer([""], self.length)
        with self._stages("compile"):
            lowered = jax.jit(self._networks.read).lower(params, *tokens)
            return params, programs.compiled(self._stages.say, lowered, f"text ({self.length} tokens)")
