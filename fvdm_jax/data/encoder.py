"""Clips and captions through the networks of a model's folder, into records."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax import checkpoint, programs, sharding, video
from fvdm_jax.data.feed import NOTHING
from fvdm_jax.data.folder import Folder
from fvdm_jax.data.job import PARTS
from fvdm_jax.data.records import Header
from fvdm_jax.models.streaming import Stream
from fvdm_jax.prompts import TOKENIZERS, Reader, fingerprint, trimmed


def identity(model: Path) -> str:
    """A hash of the configs and weights that encode, and of the tokenizer; copies have the same one."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    files = [path for name in TOKENIZERS if (path := model / name).is_file()][:1]
    for name in PARTS:
        # A converted model's manifest has the hashes of all that it was made of.
        for one in (model / f"{name}.safetensors", model / "manifest.json"):
            if one.is_file():
                files.append(one)
                break
        else:
            files += sorted(filter(Path.is_file, (model / name).rglob("*")))
    said = [[config[name] for name in PARTS], fingerprint(*files, dated=False)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class Encoder:
    """The VAE and the text encoder of a folder; their weights are loaded when they are first needed.

    `batch` clips of one size are encoded at a time, shared by the devices of this process. Records hold
    floats as `dtype`.
    """

    def __init__(self, model: Path, batch: int, dtype: str, stages):
        self._model, self.batch, self._dtype, self._stages = model, batch, jnp.dtype(dtype), stages
        self._networks = checkpoint.describe(model, PARTS)
        self._reader = Reader(model, self._networks, stages)
        devices = jax.local_devices()
        self._mesh = sharding.mesh(data=math.gcd(batch, len(devices)), devices=devices)
        self._stream = functools.cache(self._compiled)
        # Clips of one file have one caption.
        self.states = functools.lru_cache(64)(self._read)

    def header(self, fps: float) -> Header:
        """The header of the records."""
        vae, text = self._networks.vae, self._networks.text
        configs = dataclasses.asdict(vae), dataclasses.asdict(text)
        return Header(vae.latent, text.width, text.length, fps, identity(self._model), *configs)

    def bytes(self, bucket: tuple[int, int, int]) -> int:
        """What the latents of a clip (t, H, W) take."""
        vae, (frames, height, width) = self._networks.vae, bucket
        count = (1 + (frames - 1) // vae.stride) * (height // vae.spatial) * (width // vae.spatial)
        return count * vae.latent * self._dtype.itemsize

    def save_nothing(self, folder: Folder) -> None:
        """Writes the states of the empty prompt, with which captions are replaced in training."""
        from safetensors.numpy import save

        if NOTHING not in folder.sizes():
            with folder.write(NOTHING) as draft:
                draft.write_bytes(save({"states": self.states("")}))

    def _read(self, caption: str) -> np.ndarray:
        """The states [l e] of a caption's true length, as they are stored."""
        with self._stages("text"):
            return trimmed(self._reader.states(caption)).astype(self._dtype)

    @functools.cached_property
    def _params(self) -> dict:
        with self._stages("load"):
            params = checkpoint.load(self._model, ("vae",))[1]["vae"]
            return jax.device_put(params, sharding.replicated(self._mesh))

    def _compiled(self, size: tuple[int, int]) -> Stream:
        params = self._params
        first = jnp.zeros((self.batch, 1, *size, 3))
        with self._stages("compile"):
            first = jax.device_put(first, sharding.spatial(self._mesh))
            compiled = functools.partial(programs.compiled, self._stages.say)
            return Stream(self._networks.vae, "encode", params, first, compiled)

    def latents(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The latents [f h w c] of up to `batch` clips [t H W 3], uint8, of one size, as they are stored."""
        stream = self._stream(clips[0].shape[1:3])
        # Places that are left are filled, so that one program serves all.
        pixels = np.stack([*clips, *clips[-1:] * (self.batch - len(clips))])
        pieces = stream(_Unit(pixels))
        with self._stages("encode"):
            made = np.concatenate([np.asarray(piece) for piece in pieces], axis=1)
        return list(made[: len(clips)].astype(self._dtype))


class _Unit:
    """Pixels [b t H W 3] in −1 … 1, of which only what is asked for is ever held as floats."""

    def __init__(self, pixels: np.ndarray):
        self._pixels, self.shape = pixels, pixels.shape

    def __getitem__(self, at) -> np.ndarray:
        return video.to_unit(self._pixels[at])
