"""A run that is going on: its parts, and what is done in it beside training steps."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fvdm_jax import budget, presence, previews, programs, runs, saving
from fvdm_jax.data.feed import gathered
from fvdm_jax.goodput import Ledger
from fvdm_jax.integrity import digests, path_name
from fvdm_jax.measures import Meter, NotFinite
from fvdm_jax.program import Refusal, plain
from fvdm_jax.saving import PATIENCE, Position
from fvdm_jax.trainer import bytes_of
from fvdm_jax.training import Batch

ASIDE = "aside"
"""The folder of a run's folder that holds the state before a step that was not finite."""


class Run(NamedTuple):
    """The parts of a run, and the state that it begins with. `failed` counts what failed beside training."""

    asked: object
    trainer: object
    feed: object
    frozen: dict
    state: object
    checkpoints: saving.Checkpoints
    log: runs.Log | None
    previews: object
    held: list
    nothing: object
    batches: Iterator
    ledger: Ledger
    place: presence.Presence
    failed: dict[str, int]

    def next(self, number: int) -> tuple[object, Batch]:
        """The rows of the next batch, and the batch as the step takes it."""
        with self.ledger.doing("data"):
            rows = next(self.batches)
            return rows, self.trainer.batch(rows.latents, rows.states, self.nothing, number)

    def compiled(self, size: tuple[int, int, int], meter: Meter) -> Callable:
        """The step for clips of this size, compiled; it is told before, and the time is not the run's."""
        what = f"training step ({'x'.join(map(str, size))})"
        meter.settle()
        with self.ledger.doing("compile"):
            step = programs.compiled(meter.say, self.trainer.lower(size, len(self.feed.nothing)), what)
        meter.resume()
        return step

    def save(self, state, step: int, meter: Meter, last: bool = False) -> None:
        """Begins to write a checkpoint; returns when it is there where it is the last."""
        position = Position(step, step * self.asked.settings.batch)
        meter.settle()
        with self.ledger.doing("save"):
            self.checkpoints.tell = meter.say
            (self.checkpoints.finish if last else self.checkpoints.save)(state, position)
        if self.log:
            self.ledger.write(self.asked.flags.out, step, self.log.lost)
        meter.resume()

    def look(self, state, step: int, meter: Meter) -> None:
        """The error on held-out clips, and samples, where this step is one for them."""
        settings = self.asked.settings

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == settings.steps)

        if self.held and due(settings.evaluate_every):
            with self._beside("evaluation", step, meter):
                meter.write(step, self._errors(self.trainer.trained(state)))
        if self.previews is not None and due(settings.sample_every):
            with self._beside("samples", step, meter):
                variables = self.trainer.variables(self.trainer.trained(state), self.frozen)
                for path in self.previews.write(step, variables):
                    meter.say(f"wrote {path}")

    def _errors(self, params) -> dict[str, float]:
        every = [self.trainer.errors(params, self.frozen, batch) for batch in self.held]
        counts = [len(batch.latents) for batch in self.held]
        return {
            f"held_out/{name}": float(np.average([float(errors[name]) for errors in every], weights=counts))
            for name in every[0]
        }

    @contextlib.contextmanager
    def _beside(self, what: str, step: int, meter: Meter) -> Iterator[None]:
        """Its time is not the steps', and its failure not the run's, unless it fails time after time."""
        meter.settle()
        try:
            with self.ledger.doing(what):
                yield
            self.failed[what] = 0
        except Exception as failure:
            self.failed[what] = self.failed.get(what, 0) + 1
            said = plain(f"{type(failure).__name__}: {failure}", 300)
            meter.incident(f"{what} failed", step, said)
            if self.failed[what] == PATIENCE:
                raise
            meter.say(f"warning: {what} after step {step} failed, and training goes on: {said}")
        meter.resume()

    def set_aside(self, state, wrong: NotFinite, meter: Meter) -> None:
        """Keeps the state before the step that was not finite, beside the run's checkpoints.

        Where such steps are let pass, the state has gone on by the one that was under way.
        """
        step, folder = int(state.step), self.asked.flags.out / ASIDE / f"step_{wrong.step}"
        # Two that save at a time would meet each other's processes.
        with contextlib.suppress(Refusal):
            self.checkpoints.settle()
        with contextlib.suppress(Refusal, OSError), contextlib.ExitStack() as closing:
            folder.mkdir(parents=True, exist_ok=True)
            apart = saving.Checkpoints(folder, self.asked.settings, tell=meter.say)
            closing.callback(apart.close)
            apart.finish(state, Position(step, step * self.asked.settings.batch))
            meter.say(f"the state after step {step} is in {folder}")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within it a device that has too little memory is a Refusal, and of a lost process is told."""
        try:
            yield
        except jax.errors.JaxRuntimeError as failure:
            if "RESOURCE_EXHAUSTED" in str(failure) or "out of memory" in str(failure).lower():
                raise Refusal("device", *_too_much(self.trainer, failure)) from failure
            if jax.process_count() > 1:
                # Whose end it was, the watch over the others tells, and ends this process too.
                time.sleep(presence.SILENCE + 5)
            raise


def _too_much(trainer, failure: Exception) -> tuple[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path((trainer.state, trainer.frozen))
    sizes = {path_name(path): bytes_of(leaf) for path, leaf in leaves}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:3]
    told = ", ".join(f"{name[2:]} {sizes[name] / 2**20:,.0f} MiB" for name in largest)
    what = f"has not the memory for a step ({plain(str(failure).splitlines()[0], 200)}); largest: {told}"
    return what, "give a smaller --batch, more --parts, --remat full, fsdp in --mesh, or --offload"


def loaded(asked, made, begins: bool) -> tuple[dict, dict | None]:
    """What stands still, and the parameters that a run starts from where it `begins`, if there are any."""
    if not (asked.settings.rank or begins):
        return {}, None
    invent = asked.flags.synthetic and not Path(asked.settings.model).is_dir()
    return (made.invented(), None) if invent else made.load()


def begin(asked, made, feed, place: presence.Presence, ledger: Ledger, closing: contextlib.ExitStack) -> Run:
    """The run in its folder: from where it stopped if it has, else from the start."""
    settings, out, first = asked.settings, asked.flags.out, jax.process_index() == 0
    notes = runs.check(out, settings, asked.options, tuple(asked.flags.allow_change))
    tell = print if first else (lambda line: None)
    checkpoints = saving.Checkpoints(out, settings, tell=tell)
    closing.callback(checkpoints.close)
    newest, position = checkpoints.newest(), Position(0, 0)
    frozen, params = loaded(asked, made, begins=newest is None)
    if newest is None:
        state = made.start(params)
        # The first save, which may have to be quick, is to find its programs compiled.
        digests(saving.raw(state))
        if first:
            runs.write_settings(out, settings, asked.options, Path(asked.flags.config))
    else:
        with ledger.doing("restore"):
            state, position = checkpoints.restore(made.state, not asked.flags.no_fallback)
        tell("\n".join([*notes, f"goes on after step {position.batch} of {settings.steps}"]))
    tell(budget.told(out, saving.raw(made.state), settings.save_every))
    log = runs.Log(out, position.batch if newest is not None else -1) if first else None
    if log:
        closing.callback(log.close)
    seen, nothing = None, made.whole(feed.nothing)
    groups = gathered(feed.held, len(feed.nothing))
    held = [Batch(made.whole(latents), made.whole(text), nothing) for latents, text in groups]
    if held and settings.sample_every:
        seen = previews.prepared(made, out / "samples", feed.held[0], (groups[0][1][:1], feed.nothing[None]))
    if settings.sample_every and seen is None and first:
        print("note: no samples, for want of a clip that is held out or of a model that says how it samples")
    batches = feed.stream(position.batch, workers=settings.workers)
    closing.callback(batches.close)
    parts = frozen, state, checkpoints, log, seen, held, nothing, batches, ledger, place
    return Run(asked, made, feed, *parts, {})
