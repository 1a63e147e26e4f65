"""Trains a transformer, or adapters for one, on encoded clips: on one CPU, one GPU, or all hosts of a pod."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Refusal, leave, run
from fvdm_jax.stopping import deferred
from fvdm_jax.train_request import Asked, parse

ASK = 10
"""Steps after which processes ask each other whether one was told to stop."""


def main(argv: list[str]) -> int:
    """Trains what `argv` asks for. Returns 130 or 143 where it was stopped."""
    asked = parse(argv)
    join(asked.flags)
    from fvdm_jax import machine, trainer

    machine.keep_compiled_programs()
    machine.keep_memory()
    settings = asked.settings
    made = trainer.build(settings, sizes(asked))
    if asked.flags.export:
        return export(asked, made)
    feed = feeding(asked, made)
    made.check(feed.sizes)
    tell(asked, made, feed)
    if asked.flags.plan:
        return 0
    with deferred() as stopped, contextlib.ExitStack() as closing:
        return train(begin(asked, made, feed, closing), stopped)


def export(asked: Asked, made) -> int:
    """Writes what the newest checkpoint has learned to a folder, and tells how large the changes are."""
    from fvdm_jax import export, runs

    runs.check(asked.flags.out, asked.settings, asked.options)
    if not Path(asked.settings.model).is_dir():
        what = f"{asked.settings.model} is no folder"
        raise Refusal("--model", what, "give the one that was trained from, beside which changes are told")
    step = None
    if (asked.flags.out / runs.CHECKPOINTS).is_dir():
        checkpoints = runs.Checkpoints(asked.flags.out, asked.settings, read_only=True)
        step = checkpoints.newest()
    if step is None:
        raise Refusal("--out", f"{asked.flags.out} holds no checkpoint", "train first")
    name = "average" if asked.settings.average else "params"
    learned = checkpoints.part(step, name, made.state.params)
    checkpoints.close()
    export.write(asked.flags.export, made, learned)
    for line in export.changes(made, learned):
        print(line)
    print(f"wrote {asked.flags.export}, of step {step}")
    return 0


def join(flags) -> None:
    """Joins the other processes of the run, if there are any."""
    import jax

    if flags.distributed or flags.coordinator:
        try:
            jax.distributed.initialize(flags.coordinator, flags.hosts, flags.host)
        except ValueError as wrong:
            what = f"finds no other processes ({wrong})"
            raise Refusal("--distributed", what, "give --coordinator, --hosts and --host") from wrong


def sizes(asked: Asked):
    """The sizes of the network that is trained."""
    from fvdm_jax import checkpoint

    settings, folder = asked.settings, Path(asked.settings.model)
    if settings.dit is not None and (settings.fresh or not folder.is_dir()):
        return settings.dit
    found = checkpoint.network(folder, settings.part)
    if settings.dit not in (None, found):
        what = f"{settings.part} has other sizes than the config: {found}"
        raise Refusal("--model", what, "give the model that the config is for")
    return found


def feeding(asked: Asked, made):
    """Where the clips of the run come from."""
    from fvdm_jax.data import feed

    settings, network = asked.settings, made.network
    kind = feed.Sizes(settings.batch, network.channels_out, network.text_width, settings.text)
    process = made.rows()
    if asked.flags.synthetic or asked.flags.plan and not settings.data:
        clip = tuple(map(int, settings.clip.split("x")))
        return feed.invented(clip, kind, settings.seed, settings.held_out, process)
    if not settings.data:
        raise Refusal(
            "--data", "is missing", "give a folder of python -m fvdm_jax.data.precompute, or --synthetic"
        )
    return feed.recorded(settings.data, kind, settings.seed, settings.held_out, process)


def tell(asked: Asked, made, feed) -> None:
    """Prints what was changed of the config, what the run will take, and what it trains for."""
    import jax

    from fvdm_jax import coverage, trainer

    if jax.process_index():
        return
    for name, (default, value) in asked.changed.items():
        print(f"{name} {value} (the config has {'none' if default == '' else default})")
    print(*trainer.plan(made, feed.sizes[0], len(feed.nothing)), sep="\n")
    print(feed.told)
    if asked.flags.plan:
        print("how near training comes to what each task asks, in its first step and in its last:")
        reports = [
            coverage.report(asked.settings.curriculum(step), feed.sizes[0][0])
            for step in (0, asked.settings.steps - 1)
        ]
        print(*dict.fromkeys(reports), sep="\n")


class Session(NamedTuple):
    """A run that is going on: its parts, and the state that it begins with."""

    asked: Asked
    trainer: object
    feed: object
    frozen: dict
    state: object
    checkpoints: object
    log: object
    previews: object
    held: list
    nothing: object
    batches: Iterator


def begin(asked: Asked, made, feed, closing: contextlib.ExitStack) -> Session:
    """The run in its folder: from where it stopped if it has, else from the start."""
    import jax

    from fvdm_jax import previews, runs
    from fvdm_jax.data.feed import gathered
    from fvdm_jax.training import Batch

    settings, out, first = asked.settings, asked.flags.out, jax.process_index() == 0
    out.mkdir(parents=True, exist_ok=True)
    notes = runs.check(out, settings, asked.options)
    checkpoints = runs.Checkpoints(out, settings)
    closing.callback(checkpoints.close)
    invent = asked.flags.synthetic and not Path(settings.model).is_dir()
    newest, position, params, frozen = checkpoints.newest(), runs.Position(0, 0), None, {}
    if settings.rank or newest is None:
        frozen, params = (made.invented(), None) if invent else made.load()
    if newest is None:
        state = made.start(params)
        if first:
            runs.write_settings(out, settings, asked.options, Path(asked.flags.config))
    else:
        state, position = checkpoints.restore(newest, made.state)
        if first:
            print(*notes, f"goes on after step {newest} of {settings.steps}", sep="\n")
    log = runs.Log(out, -1 if newest is None else newest) if first else None
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
    return Session(asked, made, feed, frozen, state, checkpoints, log, seen, held, nothing, batches)


def train(session: Session, stopped: Callable[[], int]) -> int:
    """Trains to the last step, or till a signal; returns the exit code."""
    from fvdm_jax.measures import Meter
    from fvdm_jax.runs import Position

    made, settings, state = session.trainer, session.asked.settings, session.state
    step, code, steps = int(state.step), 0, {}
    with Meter(made, session.log, session.feed.bad) as meter, profiled(session.asked, step) as trace:
        if step == 0:
            look(session, state, step, meter)
        while step < settings.steps and not code:
            with meter.waiting():
                rows = next(session.batches)
                batch = made.batch(rows.latents, rows.states, session.nothing)
            size = batch.latents.shape[1:4]
            if size not in steps:
                steps[size] = compiled(session, size, meter)
            state, told = steps[size](state, session.frozen, batch)
            step += 1
            # What a step told is read when the next one runs, so that the device never waits for the host.
            meter.step(step, told, rows)
            trace(step)
            code = agreed(stopped(), step)
            if not code:
                look(session, state, step, meter)
            if code or step == settings.steps or step % settings.save_every == 0:
                meter.settle()
                session.checkpoints.save(state, Position(step, step * settings.batch))
                meter.resume()
        meter.settle()
        session.checkpoints.wait()
        meter.finish(step, code)
    return code


def compiled(session: Session, size: tuple[int, int, int], meter) -> Callable:
    """The step for clips of this size, compiled; it is told before, and the time is not the run's."""
    from fvdm_jax import programs

    made, what = session.trainer, f"training step ({'x'.join(map(str, size))})"
    meter.settle()
    step = programs.compiled(meter.say, made.lower(size, len(session.feed.nothing)), what)
    meter.resume()
    return step


def look(session: Session, state, step: int, meter) -> None:
    """The error on held-out clips, and samples, where this step is one for them."""
    import numpy as np

    made, settings = session.trainer, session.asked.settings

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == settings.steps)

    params = made.trained(state)
    if session.held and due(settings.evaluate_every):
        meter.settle()
        every = [made.errors(params, session.frozen, batch) for batch in session.held]
        counts = [len(batch.latents) for batch in session.held]
        for_all = {
            name: np.average([float(errors[name]) for errors in every], weights=counts) for name in every[0]
        }
        meter.write(step, {f"held_out/{name}": float(error) for name, error in for_all.items()})
        meter.resume()
    if session.previews is not None and due(settings.sample_every):
        meter.settle()
        for path in session.previews.write(step, made.variables(params, session.frozen)):
            meter.say(f"wrote {path}")
        meter.resume()


def agreed(code: int, step: int) -> int:
    """The exit code that any process was asked for, the same for all; they ask every ASK steps.

    To ask takes the device, which has to end its step first.
    """
    import jax

    if jax.process_count() == 1:
        return code
    if step % ASK:
        return 0
    import numpy as np
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(code))))


@contextlib.contextmanager
def profiled(asked: Asked, start: int) -> Iterator[Callable[[int], None]]:
    """A function to be told of each step that was begun: it traces those that --profile asks for."""
    import jax

    count, running = asked.flags.profile, False

    def trace(step: int) -> None:
        nonlocal running
        if count and step == start + 2:
            jax.profiler.start_trace(str(asked.flags.out / "profile"))
            running = True
        elif running and step >= start + 2 + count:
            jax.profiler.stop_trace()
            running = False

    try:
        yield trace
    finally:
        if running:
            jax.profiler.stop_trace()


def cli() -> None:
    """The program, as `python -m fvdm_jax.train` and as `fvdm-train`."""
    leave(run(main))


if __name__ == "__main__":
    cli()
