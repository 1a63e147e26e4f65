"""A model that is ready to sample: loaded and compiled once, for any number of videos of one size."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvdm_jax import caching, checkpoint, latents, lora, machine, programs, rollout, sampling, sharding, zoo
from fvdm_jax.defaults import defaults
from fvdm_jax.given import Given
from fvdm_jax.guidance import Generation, Looks
from fvdm_jax.kernels.parallel import Attending
from fvdm_jax.models.dit import NO_EXTRA, Extra
from fvdm_jax.process import PROCESSES
from fvdm_jax.progress import Stages
from fvdm_jax.prompts import Reader, padded, trimmed
from fvdm_jax.request import Request
from fvdm_jax.samplers import SAMPLERS
from fvdm_jax.schedule import SPACINGS
from fvdm_jax.shapes import Latents, Schedule
from fvdm_jax.steps import abreast, calls, high, key, rows, weights
from fvdm_jax.tasks import Task, text_to_video

Look = Callable[[Latents, Latents, Schedule], None]
"""What is told of every step that is done: the clip before it and after it, and its two rows of levels."""

Store = Callable[[int, list[np.ndarray]], None]
"""What is told how a queue stands: how many frames there are, and what it goes on with."""

ROOM = 1.5
"""How many times what an expert takes must be free for the other one to be loaded beside it."""


class Shot(NamedTuple):
    """A clip to be made: of which request, told what, from what task and noise, with what beside it."""

    request: Request
    prompt: str
    task: Task
    noise: Latents
    extra: Extra = NO_EXTRA


class Studio:
    """Samples what requests of one model and size ask for, by programs that are compiled once.

    Which these are depends on size, solver, and whether there is guidance: prompts, what is kept, schedules,
    weights and the strengths of LoRAs are data.
    """

    def __init__(self, requests: list[Request], stages: Stages, look: Look | None = None, many: bool = False):
        """`requests` are those that will come, as of `commands.lines`: of other prompts, seeds, keeps.

        With `many`, a mesh that is asked for makes several at a time, as of `sampling.layout`.
        """
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
            looks = Looks(
                any(one.guided for one in requests), request.history_windows if request.history != 1 else 0
            )
            self._layout = sampling.layout(request.mesh, network, self._shape[1:4], looks.count, many)
            self._over = self._layout.over
        said = [f"attention by {self._layout.attention}"]
        if sizes := ", ".join(f"{name} {size}" for name, size in self._over.shape.items() if size > 1):
            said.append(f"devices: {sizes}")
        if self._layout.clips > 1:
            said.append(f"{self._layout.clips} clips at a time")
        stages.say("; ".join(said))
        generation = Generation(network, PROCESSES[request.process], SAMPLERS[request.solver], looks)
        self._config, self._programs = config, sampling.programs(generation, self._over, self._layout.batch)
        self._given = Given(request, dataclasses.replace(self.networks, dit=config), stages)
        self._compiled: dict[object, Callable] = {}
        self._plans: dict[object, np.ndarray] = {}
        self._held: dict[str, dict] = {}
        self._read: dict[str, np.ndarray] = {}
        # Read first, so that the text encoder is gone before a transformer comes.
        self._hear(requests)
        self._warn(requests)
        self._last: Request | None = requests[-1]

    def _warn(self, requests: list[Request]) -> None:
        """Says where the second expert comes too late for some frames."""
        for one in requests if len(self._model.transformers) > 1 else ():
            if one.rolls:
                continue
            strength = np.float32(one.sampled[: one.latent_frames])
            done = (rows(one, strength)[high(one, strength)] == 0) & (strength > 0)
            if done.any():
                what = f"{done.sum()} of {len(done)} frames are clean before the expert of low noise begins"
                self._stages.say(f"note: {what}; schedule together leaves the end of every frame to it")
                return

    def welcome(self, request: Request) -> None:
        """Takes one more request; from now on nothing is given back, since others may follow."""
        self._hear([request])
        if request is not self._last:
            self._warn([request])
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

    def batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        """The requests, as many together as `clips` makes at a time, in their order.

        Together go those whose experts change at the same step; and where steps are spared, of one schedule.
        """
        some: list[Request] = []
        for one in requests:
            if len(some) == self._layout.clips or some and self._kind(one) != self._kind(some[0]):
                yield some
                some = []
            some.append(one)
        yield some

    def _kind(self, request: Request) -> tuple:
        strength = request.sampled
        return high(request, strength), rows(request, strength).tobytes() if request.cache else b""

    def clip(self, request: Request) -> np.ndarray:
        """The denoised latents, float32 [1 f h w c] on the host, of a video that is made at once."""
        return self.clips([request])[0]

    def clips(self, requests: list[Request]) -> list[np.ndarray]:
        """The latents of each of `batches`, which are made together; where there are too few, by the way."""
        shots = [self._shot(one) for one in requests]
        self._stages.expect("denoise", max(len(rows(shot.request, shot.task.strength)) for shot in shots) - 1)
        last = self._release(requests[-1])
        made = np.asarray(self._denoised([*shots, *shots[-1:] * (self._layout.clips - len(shots))]))
        if last:
            # What decodes has the devices to itself.
            self._held.clear()
        return [made[i : i + 1] for i in range(len(shots))]

    def _release(self, request: Request) -> bool:
        """Gives back what reads files, where this is the last request."""
        if last := request is self._last:
            self._given.forget()
        return last

    def _shot(self, request: Request) -> Shot:
        task, extra = text_to_video(self._shape), NO_EXTRA
        if self._model.pictures:
            extra = self._given.extra(request, self._model.pictures)
        else:
            task = self._given.task(request, self._shape)
        return Shot(request, request.prompt, task, self._begun(request), extra)

    def windows(self, request: Request, past: np.ndarray | None) -> Iterator[np.ndarray]:
        """The latents [1 k h w c] of a long video as they become final, window by window.

        `past` are latents of whole windows that are there already. The last piece may go beyond the end.
        """
        seam = rollout.Seam(request.overlap, 0.0, request.anchors)
        done = 0 if past is None else 1 + (past.shape[1] - request.latent_frames) // request.new
        self._stages.expect("denoise", sum(calls(request)[done:]))

        def generate(task: Task, i: int) -> Latents:
            prompt = request.segments[min(i, len(request.segments) - 1)]
            return self._denoised([Shot(request, prompt, task, self._noise(request.seed, i))])

        start = text_to_video(self._shape) if done else self._given.task(request, self._shape)
        self._release(request)
        return map(np.asarray, rollout.windows(generate, start, request.windows, seam, past))

    def queue(
        self, request: Request, past: tuple[int, list] | None = None, store: Store | None = None
    ) -> Iterator[np.ndarray]:
        """The latents [1 k h w c] of a video without end, by a queue in one window: what is given, then each.

        Of the window those `request.overlap` frames that are last clean are kept in sight. Once in a queue's
        length `store` is told how it stands, when the next frame is asked for: the latest of it, as `past`,
        is where another run goes on.
        """
        given, length = request.given, request.latent_frames - request.overlap
        canvas = self._put(self._given.task(request, self._shape).canvas) if past is None else None
        self._release(request)
        params = self._transformer(self._model.transformers[0], request)
        told = self._told(params, [(request.prompt, request.negative)])
        inputs = params, told, self._put(weights(request, 0))

        def noise(i: int) -> Latents:
            drawn = jax.random.fold_in(key(request.seed), i)
            return self._put(jax.random.normal(drawn, self.shape(1)))

        def advance(carry: tuple, schedule: Schedule) -> tuple:
            return self._stepped(inputs, carry, self._put(jnp.asarray(schedule)))

        def begin(*state) -> tuple:
            with jax.set_mesh(self._over):
                return self._programs.begin(*state)

        sigmas = SPACINGS[request.spacing](request.steps, request.shift)
        queue = rollout.Queue(begin, advance, noise, sigmas, request.latent_frames, request.overlap, given)
        if past is None:
            begun = queue.start(canvas)
            if given:
                yield np.asarray(canvas[:, :given])
        else:
            drawn = noise(0)
            with jax.set_mesh(self._over):
                like = jax.eval_shape(self._programs.begin, drawn, drawn, sigmas[:1, None])
            begun = rollout.Rolled(past[0], jax.tree.unflatten(jax.tree.structure(like), self._put(past[1])))
        self._stages.expect("denoise", sum(calls(request)[begun.next - given :]))
        for frame, now in queue.roll(begun):
            yield np.asarray(frame)
            if store and (now.next - given) % length == 0:
                store(now.next, list(map(np.asarray, jax.tree.leaves(now.carry))))

    def _begun(self, request: Request) -> Latents:
        """The noise that a short video begins with: the seed's, or a file's."""
        if request.noise_file is None:
            return self._noise(request.seed)
        return jnp.asarray(latents.noise(request.noise_file, self._shape))

    def _noise(self, seed: int, window: int = 0) -> Latents:
        """The noise of a window; that of the first is a short video's."""
        drawn = jax.random.fold_in(key(seed), window) if window else key(seed)
        return jax.random.normal(drawn, self._shape)

    def _denoised(self, shots: list[Shot]) -> Latents:
        """What the model's transformers, one after the other, make of as many clips as are made at a time."""
        request, levels = shots[0].request, abreast([rows(s.request, s.task.strength) for s in shots])
        change = high(request, shots[0].task.strength)
        parts = [levels] if len(self._model.transformers) == 1 else [levels[: change + 1], levels[change:]]
        given = [(shot.noise, shot.task.canvas, shot.extra) for shot in shots]
        given = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *given) if len(shots) > 1 else given[0]
        noise, canvas, extra = jax.device_put(given, self._layout.batch)
        told = [(shot.prompt, shot.request.negative) for shot in shots], extra
        with jax.set_mesh(self._over):
            carry = self._programs.begin(noise, canvas, self._put(jnp.asarray(levels)))
            carry = (*carry, jnp.zeros_like(noise)) if request.cache else carry
        for i, part in enumerate(parts):
            if len(part) > 1:
                carry = self._part(request, i, told, carry, part)
        return carry[0]

    def _part(self, request: Request, i: int, told: tuple, carry: tuple, levels: np.ndarray) -> tuple:
        """The carry after the steps of transformer i; nothing of it is held here when the next is loaded."""
        name = self._model.transformers[i]
        params = self._transformer(name, request)
        inputs = params, self._told(params, *told), self._put(weights(request, i))
        # Those that are made together have one schedule then.
        one = levels.reshape(len(levels), -1, levels.shape[-1])[:, 0]
        calls = self._calls(request, name, params, one) if request.cache else None
        return self._stepped(inputs, carry, self._put(jnp.asarray(levels)), calls)

    def _stepped(
        self, inputs: tuple, carry: tuple, schedule: Schedule, calls: np.ndarray | None = None
    ) -> tuple:
        """The carry after the steps of the schedule: a step is one program, whatever their number.

        With `calls` [s] it is that in which the network may be spared.
        """
        many = f"{self._layout.clips} of " if self._layout.clips > 1 else ""
        what = f"denoise ({many}{'x'.join(map(str, self._shape[1:4]))})"
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

    def _told(self, params: dict, prompts: list[tuple[str, str]], extra: Extra = NO_EXTRA):
        """What the steps need of (prompt, negative) of each clip, and of pictures, made once."""
        both = ([padded(self._read[pair[i]], self._length) for pair in prompts] for i in (0, 1))
        inputs = params, jax.device_put(tuple(map(np.stack, both)), self._layout.batch), extra
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
