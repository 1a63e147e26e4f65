"""Trains a transformer, or adapters for one, on encoded clips: on one CPU, one GPU, or all hosts of a pod."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fvdm_jax import presence, program
from fvdm_jax.goodput import Ledger
from fvdm_jax.program import Refusal
from fvdm_jax.stopping import deferred
from fvdm_jax.train_request import Asked, parse

ASK, SOON = 10, 1.0
"""Steps after which processes ask each other whether one was told to stop, and seconds, whichever is less."""


def main(argv: list[str]) -> int:
    """Trains what `argv` asks for. Returns 130 or 143 where it was stopped, 1 where a replay differs."""
    ledger = Ledger()
    presence.glance(argv)
    asked = parse(argv)
    join(asked.flags)
    from fvdm_jax import machine, trainer

    machine.keep_compiled_programs()
    machine.keep_memory()
    made = trainer.build(asked.settings, sizes(asked))
    if asked.flags.export:
        return export(asked, made)
    feed = feeding(asked, made)
    made.check(feed.sizes)
    if asked.flags.replay is not None:
        from fvdm_jax.replay import replay

        return replay(asked, made, feed)
    tell(asked, made, feed)
    if asked.flags.plan:
        return 0
    from fvdm_jax.train_run import begin

    with deferred() as stopped, contextlib.ExitStack() as closing:
        place = closing.enter_context(placed(asked.flags))
        code = train(begin(asked, made, feed, place, ledger, closing), stopped)
    part()
    return code


def export(asked: Asked, made) -> int:
    """Writes what the newest checkpoint has learned to a folder, and tells how large the changes are."""
    from fvdm_jax import export, runs, saving

    runs.check(asked.flags.out, asked.settings, asked.options)
    if not Path(asked.settings.model).is_dir():
        what = f"{asked.settings.model} is no folder"
        raise Refusal("--model", what, "give the one that was trained from, beside which changes are told")
    checkpoints = None
    if (asked.flags.out / saving.CHECKPOINTS).is_dir():
        checkpoints = saving.Checkpoints(asked.flags.out, asked.settings, read_only=True)
    if checkpoints is None or checkpoints.newest() is None:
        raise Refusal("--out", f"{asked.flags.out} holds no checkpoint", "train first")
    name = "average" if asked.settings.average else "params"
    learned, step = checkpoints.part(name, made.state.params)
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


def part() -> None:
    """Leaves the other processes, when all are here: a process that then ends at once ends no other."""
    import jax

    if jax.process_count() > 1:
        jax.distributed.shutdown()


@contextlib.contextmanager
def placed(flags) -> Iterator[presence.Presence]:
    """This process's place in the run's folder, which no other run has meanwhile. Raises Refusal."""
    import jax

    place = presence.Presence(flags.out, jax.process_index(), jax.process_count())
    try:
        if jax.process_index() == 0:
            place.take(flags.takeover)
        place.join()
    except OSError as failure:
        raise Refusal(
            "--out", f"{flags.out} cannot be written: {failure.strerror}", "give another"
        ) from failure
    try:
        yield place
        place.leave()
    except BaseException:
        # The others are to see that this one is no more.
        place.leave(silent=True)
        raise


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


def train(run, stopped: Callable[[], int]) -> int:
    """Trains a `train_run.Run` to the last step, or till a signal; returns the exit code."""
    from fvdm_jax.measures import Meter, NotFinite

    settings, state = run.asked.settings, run.state
    step, code, steps = int(state.step), 0, {}
    meter = Meter(run.trainer, run.log, run.feed)
    asking = Asking(meter)
    with meter, profiled(run.asked, step) as trace, run.explained():
        run.ledger.began()
        try:
            if step == 0:
                run.look(state, step, meter)
            while step < settings.steps and not code:
                with meter.waiting():
                    rows, batch = run.next(step)
                size = batch.latents.shape[1:4]
                if size not in steps:
                    steps[size] = run.compiled(size, meter)
                state, told = steps[size](state, run.frozen, batch)
                step += 1
                run.place.doing(f"step {step}")
                # What a step told is read when the next one runs, so that the device never waits for the
                # host.
                meter.step(step, told, rows)
                trace(step)
                code = asking(stopped())
                if not code:
                    run.look(state, step, meter)
                if code or step == settings.steps or step % settings.save_every == 0:
                    run.save(state, step, meter, last=bool(code) or step == settings.steps)
            meter.settle()
        except NotFinite as wrong:
            run.set_aside(state, wrong, meter)
            raise
        meter.finish(step, code, run.ledger.seconds())
    return code


class Asking:
    """The exit code that any process was asked for, the same for all of them at the same step.

    They ask each other every ASK steps, since to ask takes the device, which has to end its step first, and
    where steps are slow about every SOON seconds, but not within a step.
    """

    def __init__(self, meter):
        self._meter, self._every, self._asked, self._steps = meter, ASK, time.monotonic(), 0

    def __call__(self, code: int) -> int:
        """To be called after every step."""
        import jax

        if jax.process_count() == 1:
            return code
        self._steps += 1
        if self._steps < self._every:
            return 0
        from fvdm_jax.together import most

        now = time.monotonic()
        with self._meter.watched("the wait for the steps of other processes"):
            step = most((now - self._asked) / self._steps)
        self._every, self._asked, self._steps = max(1, min(ASK, int(SOON / max(step, 1e-3)))), now, 0
        return int(most(code))


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
    program.leave(program.run(main))


if __name__ == "__main__":
    cli()
