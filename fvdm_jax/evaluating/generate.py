"""Clips of the world for every case: the true ones, and those that the model makes of what it is given."""

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fvdm_jax import checkpoint, held_out, lora, rollout, sampling, sharding, tasks
from fvdm_jax.data import source
from fvdm_jax.evaluating.cases import Case
from fvdm_jax.guidance import Generation, Looks
from fvdm_jax.models.streaming import Stream
from fvdm_jax.process import PROCESSES
from fvdm_jax.programs import compiled
from fvdm_jax.progress import Stages
from fvdm_jax.prompts import Reader
from fvdm_jax.request import Request
from fvdm_jax.samplers import SAMPLERS
from fvdm_jax.steps import rows, weights
from fvdm_jax.training import Batch

EVALUATION_SEED = 271_828
"""The seed of the scenes that models are judged by; nothing is trained on them."""


class Truth(NamedTuple):
    """Scenes of the world with these indices, their captions and their pixels [b t H W 3], −1 … 1."""

    index: range
    scene: source.Scene
    captions: list[str]
    pixels: np.ndarray


class Made(NamedTuple):
    """Pixels [b t H W 3] of a case, and for each Kept of it those that the VAE makes of it alone."""

    pixels: np.ndarray
    alone: list[np.ndarray]


class Examiner:
    """A model on all devices that divide `batch` clips: each of its programs is compiled once for a size."""

    def __init__(self, request: Request, batch: int, dtype: str | None, stages: Stages):
        """`request` is as of `request.validate`; `dtype` is what the transformer computes in."""
        self._request, self._stages = request, stages
        with stages("load"):
            self.networks, params = checkpoint.load(request.model, ("dit", "vae"))
            if dtype:
                self.networks = dataclasses.replace(
                    self.networks, dit=dataclasses.replace(self.networks.dit, dtype=dtype)
                )
            self._over = sharding.mesh(data=math.gcd(batch, len(jax.devices())))
            placed = sampling.placed(self._over, {"dit": params["dit"]}, self.networks.dit)
            self._params = placed | jax.device_put({"vae": params["vae"]}, sharding.replicated(self._over))
        self._reader = Reader(request.model, self.networks, stages)
        looks = Looks(request.guidance != 1, 0 if request.history == 1 else 1)
        network, process = lora.Network(self.networks.dit), PROCESSES[request.process]
        generation = Generation(network, process, SAMPLERS[request.solver], looks)
        # A step at a time, so that one program serves schedules of any length.
        self._programs = sampling.programs(generation, self._over)
        self._draw = jax.jit(source.moving_shapes, static_argnums=(1, 2, 3))
        _, h, w, c = self._shape
        vae, (height, width) = self._params["vae"], request.size
        # Piece by piece, so that one program serves clips of every length.
        self._encode = self._stream("encode", vae, (batch, 1, height, width, 3))
        self._decode = self._stream("decode", vae, (batch, 1, h, w, c))
        self._errors = jax.jit(partial(held_out.errors, lambda _, *given: network.velocity(*given), process))
        self._nothing = self._reader.states("")

    def _stream(self, method: str, params: dict, first: tuple[int, ...]) -> Stream:
        with self._stages("compile"):
            piece = self._spread(jnp.zeros(first))
            return Stream(self.networks.vae, method, params, piece, partial(compiled, self._stages.say))

    @property
    def window(self) -> int:
        """Latent frames of a clip of the model's length."""
        return self._request.latent_frames

    def truth(self, index: range, frames: int) -> Truth:
        """The scenes with these indices, and so many frames of them."""
        scene = source.scenes(EVALUATION_SEED, index)
        captions = [source.caption(scene, i) for i in range(len(index))]
        with self._stages("draw"):
            pixels = np.asarray(self._draw(self._spread(scene), frames, *self._request.size))
        return Truth(index, scene, captions, pixels)

    def encoded(self, pixels: np.ndarray) -> jax.Array:
        """Latents [b f h w c] of pixels [b t H W 3]."""
        with self._stages("encode"), jax.set_mesh(self._over):
            return jax.block_until_ready(jnp.concatenate(list(self._encode(pixels)), axis=1))

    def decoded(self, latents: jax.Array) -> np.ndarray:
        """Pixels [b t H W 3], −1 … 1, of latents [b f h w c]."""
        with self._stages("decode"), jax.set_mesh(self._over):
            pieces = [np.asarray(piece) for piece in self._decode(latents)]
            return np.clip(np.concatenate(pieces, axis=1), -1, 1)

    def states(self, captions: list[str]) -> np.ndarray:
        """What the network is told of captions, [b l e]."""
        with self._stages("text"):
            return np.stack([self._reader.states(caption) for caption in captions])

    def errors(self, latents: jax.Array, states: np.ndarray) -> dict[str, float]:
        """The error of true latents for each of `held_out.FAMILIES`, always by the same noise."""
        batch = Batch(latents, self._spread(states), jnp.asarray(self._nothing))
        with self._stages("losses"), jax.set_mesh(self._over):
            return jax.tree.map(float, self._errors(self._params, {}, batch))

    def made(self, case: Case, truth: Truth, states: np.ndarray, schedule: str = "") -> Made:
        """The case of true clips, told their captions; the noise of a clip is the same in every case.

        `schedule` may be another than the request's.
        """
        given = [(kept, self.encoded(truth.pixels[:, kept.pixels])) for kept in case.kept]
        task = tasks.text_to_video((len(truth.index), *self._shape))
        for kept, latents in given:
            task = task.keep(latents, kept.first)
        schedule = schedule or self._request.schedule
        generate = partial(self._window, truth.index, self._told(states), schedule)
        latents = rollout.extend(generate, task, case.windows, case.overlap)
        return Made(self.decoded(latents), [self.decoded(alone) for _, alone in given])

    @property
    def _shape(self) -> tuple[int, ...]:
        """f, h, w and c of a window."""
        vae = self.networks.vae
        return self.window, *(side // vae.spatial for side in self._request.size), vae.latent

    def _told(self, states: np.ndarray) -> tuple[jax.Array, jax.Array]:
        nothing = self._reader.states(self._request.negative)
        return self._spread(states), self._spread(np.broadcast_to(nothing, states.shape))

    def _window(self, index: range, prompts: tuple, schedule: str, task: tasks.Task, window: int):
        """A window of clips with these indices; each clip's noise is by its index and that of the window."""
        request = self._request
        key = jax.random.fold_in(jax.random.key(request.seed), window)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(index))
        noise = jax.vmap(lambda key: jax.random.normal(key, self._shape))(keys)
        matrix = rows(dataclasses.replace(request, schedule=schedule), task.strength)
        listening = weights(request, 0)
        noise, canvas = self._spread((noise, task.canvas))
        with self._stages("denoise"), jax.set_mesh(self._over):
            told = self._programs.told(self._params, prompts)
            carry = self._programs.begin(noise, canvas, matrix)
            for s in range(len(matrix) - 1):
                carry = self._programs.advance(self._params, told, listening, carry, matrix[s : s + 2])
            return jax.block_until_ready(carry[0])

    def _spread(self, tree):
        """Arrays over clips, shared by the devices."""
        return jax.device_put(tree, NamedSharding(self._over, PartitionSpec("data")))


def batches(clips: int, batch: int, after: int = 0) -> Iterator[range]:
    """Indices of scenes, `batch` at a time."""
    for first in range(after, after + clips, batch):
        yield range(first, first + batch)


def described(request: Request) -> dict:
    """How the clips are made, as JSON has it."""
    names = (
        "frames size steps solver process spacing shift schedule guidance history negative fps seed".split()
    )
    return json.loads(json.dumps({name: getattr(request, name) for name in names}))
