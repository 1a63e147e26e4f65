"""A model that is ready to sample: loaded and compiled once, for any number of videos of one size."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax import caching, checkpoint, latents, lora, machine, programs, rollout, sampling, sharding, zoo
from fvdm_jax.defaults import defaults
from fvdm_jax.given import Given
from fvdm_jax.guidance import Generation, Looks, Weights
from fvdm_jax.kernels.parallel import Attending
from fvdm_jax.models.dit import NO_EXTRA, Extra
from fvdm_jax.process import PROCESSES
from fvdm_jax.progress import Stages
from fvdm_jax.prompts import Reader, padded, trimmed
from fvdm_jax.request import Request
from fvdm_jax.samplers import SAMPLERS
from fvdm_jax.schedule import SPACINGS, switch
from fvdm_jax.shapes import Latents, Schedule
from fvdm_jax.tasks import Task, text_to_video

Look = Callable[[Latents, Latents, Schedule], None]
"""What is told of every step that is done: the clip before it and after it, and its two rows of levels."""

ROOM = 1.5
"""How many times what an expert takes must be free for the other one to be loaded beside it."""


class Studio:
    """Samples what requests of one model and size ask for, by programs that are compiled once.

    Which these are depends on size, solver, and whether there is guidance: prompts, what is kept, schedules,
    weights and the strengths of LoRAs are data.
    """

    def __init__(self, requests: list[Request], stages: Stages, look: Look | None = None):
        """`requests` are those that will come, as of `commands.lines`: of other prompts, seeds, keeps."""
        self._stages, self._look, request = stages, look, requests[0]
        with stages("load"):
            machine.keep_compiled_programs()
            machine.keep_memory()
            self._model = defaults(request.model)
            config = checkpoint.network(request.model, self._model.transformers[0])
            self.networks = checkpoint.describe(request.model, ("vae", "text"))
            height, width = (side // self.networks.vae.spatial for side in request.size)
            self._shape = (1, request.latent_frames, height, width, self.networks.vae.latent)
            network = lora.Network(config, attending=Attending(request.attention))
            looks = Looks(any(map(guided, requests)), request.history_windows if request.history != 1 else 0)
            self._over, attention = sampling.mesh(request.mesh, network, self._shape[1:4], looks.count)
        sizes = ", ".join(f"{name} {size}" for name, size in self._over.shape.items() if size > 1)
        stages.say(f"attention by {attention}" + (f"; devices: {sizes}" if sizes else ""))
        generation = Generation(network, PROCESSES[request.process], SAMPLERS[request.solver], looks)
        self._config, self._programs = config, sampling.programs(generation, self._over)
        self._given = Given(request, dataclasses.replace(self.networks, dit=config), stages)
        self._compiled: dict[object, Callable] = {}
        self._plans: dict[object, np.ndarray] = {}
        self._held: dict[str, dict] = {}
        self._read: dict[str, np.ndarray] = {}
        # Read first, so that the text encoder is gone before a transformer comes.
        self._hear(requests)
        self._last: Request | None = requests[-1]

    def welcome(self, request: Request) -> None:
        """Takes one more request; from now on nothing is given back, since others may follow."""
        self._hear([request])
        self._last = None

    def _hear(self, requests: list[Request]) -> None:
        told = (text for one in requests for text in (*(one.segments or (one.prompt,)), one.negative))
        if new := [text for text in dict.fromkeys(told) if text not in self._read]:
            reader = Reader(requests[0].model, self.networks, self._stages, machine.cache("text"))
            self._length = reader.length
            self._read |= {text: self._states(reader, text) for text in new}

    def shape(self, frames: int) -> tuple[int, ...]:
        """The shape of a clip of so many latent frames, [1 f h w c]."""
        return 1, frames, *self._shape[2:]

    def clip(self, request: Request) -> np.ndarray:
        """The denoised latents, float32 [1 f h w c] on the host, of a video that is made at once."""
        if self._model.pictures:
            task, extra = text_to_video(self._shape), self._given.extra(request, self._model.pictures)
        else:
            task, extra = self._given.task(request, self._shape), NO_EXTRA
        self._stages.expect("denoise", len(rows(request, task.strength)) - 1)
        if request is self._last:
            self._given.forget()
        made = np.asarray(self._denoised(request, request.prompt, task, self._begun(request), extra))
        if request is self._last:
            # What decodes has the devices to itself.
            self._held.clear()
        return made

    def windows(self, request: Request, past: np.ndarray | None) -> Iterator[np.ndarray]:
        """The latents [1 k h w c] of a long video as they become final, window by window.

        `past` are latents of whole windows that are there already. The last piece may go beyond the end.
        """
        seam = rollout.Seam(request.overlap, 0.0, request.anchors)
        done = 0 if past is None else 1 + (past.shape[1] - request.latent_frames) // request.new
        self._stages.expect("denoise", sum(calls(request)[done:]))

        def generate(task: Task, i: int) -> Latents:
            prompt = request.segments[min(i, len(request.segments) - 1)]
            return self._denoised(request, prompt, task, self._noise(request.seed, i))

        start = text_to_video(self._shape) if done else self._given.task(request, self._shape)
        return map(np.asarray, rollout.windows(generate, start, request.windows, seam, past))

    def queue(self, request: Request) -> Iterator[np.ndarray]:
        """The latents [1 1 h w c] of a video without end, frame by frame, by a queue in one window.

        Of the window those `request.overlap` frames that are last clean are kept in sight.
        """
        self._stages.expect("denoise", sum(calls(request)))
        params = self._transformer(self._model.transformers[0], request)
        inputs = params, self._told(params, request.prompt, request.negative), self._put(weights(request, 0))

        def noise(i: int) -> Latents:
            drawn = jax.random.fold_in(key(request.seed), i)
            return self._put(jax.random.normal(drawn, self.shape(1)))

        def advance(carry: tuple, schedule: Schedule) -> tuple:
            return self._stepped(inputs, carry, self._put(jnp.asarray(schedule)))

        sigmas = SPACINGS[request.spacing](request.steps, request.shift)
        begin, frames = self._programs.begin, request.latent_frames
        return map(np.asarray, rollout.rolling(begin, advance, noise, sigmas, frames, request.overlap))

    def _begun(self, request: Request) -> Latents:
        """The noise that a short video begins with: the seed's, or a file's."""
        if request.noise_file is None:
            return self._noise(request.seed)
        return jnp.asarray(latents.noise(request.noise_file, self._shape))

    def _noise(self, seed: int, window: int = 0) -> Latents:
        """The noise of a window; that of the first is a short video's."""
        drawn = jax.random.fold_in(key(seed), window) if window else key(seed)
        return jax.random.normal(drawn, self._shape)

    def _denoised(self, request: Request, prompt: str, task: Task, noise: Latents, extra=NO_EXTRA) -> Latents:
        """What the model's transformers, one after the other, make of the noise, [1 f h w c]."""
        levels = rows(request, task.strength)
        # Experts change by the level of what is generated, whatever a kept frame's is.
        high = switch(rows(request, np.sign(task.strength)), request.boundary)
        parts = [levels] if len(self._model.transformers) == 1 else [levels[: high + 1], levels[high:]]
        noise, canvas, levels = self._put((noise, task.canvas, jnp.asarray(levels)))
        with jax.set_mesh(self._over):
            carry = self._programs.begin(noise, canvas, levels)
            carry = (*carry, jnp.zeros_like(noise)) if request.cache else carry
        for i, part in enumerate(parts):
            if len(part) > 1:
                carry = self._part(request, i, (prompt, self._put(extra)), carry, part)
        return carry[0]

    def _part(self, request: Request, i: int, told: tuple, carry: tuple, levels: zoo.Matrix) -> tuple:
        """The carry after the steps of transformer i; nothing of it is held here when the next is loaded."""
        prompt, extra = told
        name = self._model.transformers[i]
        params = self._transformer(name, request)
        inputs = params, self._told(params, prompt, request.negative, extra), self._put(weights(request, i))
        calls = self._calls(request, name, params, levels) if request.cache else None
        return self._stepped(inputs, carry, self._put(jnp.asarray(levels)), calls)

    def _stepped(
        self, inputs: tuple, carry: tuple, schedule: Schedule, calls: np.ndarray | None = None
    ) -> tuple:
        """The carry after the steps of the schedule: a step is one program, whatever their number.

        With `calls` [s] it is that in which the network may be spared.
        """
        what = f"denoise ({'x'.join(map(str, self._shape[1:4]))})"
        program = self._programs.advance if calls is None else self._programs.cached
        marks = [()] * (len(schedule) - 1) if calls is None else [(self._put(call),) for call in calls]
        with jax.set_mesh(self._over):
            step = self._program(what, program, *inputs, carry, schedule[:2], *marks[0])
        for s, mark in enumerate(marks):
            before = carry[0]
            with self._stages("denoise"), jax.set_mesh(self._over):
                pair = schedule[s : s + 2]
                carry = jax.block_until_ready(step(*inputs, carry, pair, *mark))
                self._stages.step()
            if self._look:
                self._look(before, carry[0], pair)
        return carry

    def _calls(self, request: Request, name: str, params: dict, levels: zoo.Matrix) -> np.ndarray:
        """At which of its steps [s] the transformer of this name is called; how many is said once."""
        known = name, levels.tobytes(), request.cache
        if known not in self._plans:
            inputs = params, self._put(jnp.asarray(levels))
            with jax.set_mesh(self._over):
                change = self._program("cache", self._programs.changes, *inputs)(*inputs)
            self._plans[known] = calls = caching.plan(levels, np.asarray(change), request.cache)
            which = "the network" if len(self._model.transformers) == 1 else name.removeprefix("dit_")
            self._stages.say(f"cache: {which} is called at {calls.sum()} of {len(calls)} steps")
        return self._plans[known]

    def _told(self, params: dict, prompt: str, negative: str, extra: Extra = NO_EXTRA):
        """What the steps need of prompts and pictures, made once."""
        states = tuple(padded(self._read[text], self._length)[None] for text in (prompt, negative))
        inputs = params, self._put(states), extra
        with jax.set_mesh(self._over):
            told = self._program("prompt", self._programs.told, *inputs)
            with self._stages("text"):
                return told(*inputs)

    def _states(self, reader: Reader, prompt: str) -> np.ndarray:
        """States [l e] of a prompt, without the rows after its end."""
        if (count := reader.count(prompt)) > reader.length:
            cut = f"{count} tokens and is cut to the model's {reader.length}"
            self._stages.say(f"note: the prompt {prompt[:40]!r}… has {cut}")
        with self._stages("text"):
            return trimmed(reader.states(prompt))

    def _transformer(self, name: str, request: Request) -> dict:
        """A transformer and its LoRAs, on the devices; the other expert makes room where it has to."""
        if name not in self._held:
            with self._stages("load"):
                bytes_held = sum(leaf.nbytes for leaf in jax.tree.leaves(self._held)) / self._over.size
                if machine.free(jax.devices()[0]) < ROOM * bytes_held:
                    self._held.clear()
                params = checkpoint.load_transformer(request.model, name)
                adapters = [
                    (checkpoint.load_adapters(Path(folder), params), strength)
                    for folder, strength, expert in request.lora
                    if expert in ("", name.removeprefix("dit_"))
                ]
                both = {"dit": params, "adapters": adapters}
                self._held[name] = sampling.placed(self._over, both, self._config)
        return self._held[name]

    def _program(self, what: str, function: Callable, *inputs) -> Callable:
        """The jitted function compiled for inputs of these shapes, under the name `what`."""
        leaves, tree = jax.tree.flatten(inputs)
        known = what, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if known not in self._compiled:
            with self._stages("compile"):
                lowered = function.lower(*inputs)
                self._compiled[known] = programs.compiled(self._stages.say, lowered, what)
        return self._compiled[known]

    def _put(self, tree):
        """Arrays that are whole on every device."""
        return jax.device_put(tree, sharding.replicated(self._over))


def rows(request: Request, strength) -> zoo.Matrix:
    """The level of every frame of a window at every step, [s + 1 f], where they take part so much, [f].

    Those that the request has itself may change over the steps; a later window's do not.
    """
    sigmas, strength = SPACINGS[request.spacing](request.steps, request.shift), np.float32(strength)
    own = np.float32(request.strength[: len(strength)])
    settled = request.settled[: len(strength)] if np.array_equal(strength, own) else None
    return zoo.levels(request.schedule, sigmas, strength, settled)


def calls(request: Request) -> list[int]:
    """Calls of the network for each window of a video; of a queue for the first frame and each later one."""
    if request.rolls:
        ends = [request.steps + i * request.steps // (request.latent_frames - request.overlap)
                for i in range(request.total)]  # fmt: skip
        return np.diff(ends, prepend=0).tolist()
    first = len(rows(request, request.strength[: request.latent_frames])) - 1
    if request.length is None:
        return [first]
    kept = request.latent_frames - request.new
    later = rows(request, np.repeat([0.0, 1.0], [kept, request.new]))
    return [first] + [len(later) - 1] * (request.windows - 1)


def guided(request: Request) -> bool:
    """Whether the network is asked of the prompt and of the negative one."""
    told = request.segments or (request.prompt,)
    return request.guidance not in (1, (1, 1)) and any(prompt != request.negative for prompt in told)


def weights(request: Request, expert: int) -> Weights:
    """How strongly an expert is made to listen, float32."""
    text = request.guidance[expert] if isinstance(request.guidance, tuple) else request.guidance
    noise = request.context_noise
    context, power = noise if isinstance(noise, tuple) else (noise, 0.0)
    history = request.history, request.history_level
    given = Weights(text, *history, *request.interval, request.rescale, context, power)
    return jax.tree.map(jnp.float32, given)


def key(seed: int):
    """jax.random.key of a seed of 64 bits, of which jax by itself takes 32."""
    return jax.random.wrap_key_data(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))
