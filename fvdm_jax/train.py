"""Trains a transformer, or adapters for one, on encoded clips: on one CPU, one GPU, or all hosts of a pod."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fvdm_jax.program import Parser, Refusal, leave, run, whole
from fvdm_jax.stopping import deferred

HELP = """
  python -m fvdm_jax.train CONFIG.py --help           the config's own flags too
  python -m fvdm_jax.train CONFIG.py --out run        trains; goes on where a run in that folder has stopped
  python -m fvdm_jax.train CONFIG.py --plan           what it will take, and how near it comes to each task
  python -m fvdm_jax.train CONFIG.py --out run --export lora    what it has learned, for sample and convert
  python -m fvdm_jax.train CONFIG.py --out run --synthetic --steps 20       without data
Ctrl-C and SIGTERM save before the program ends (exit codes 130 and 143); a second one ends it at once.
On every host of a pod the same command is run with --distributed, under Slurm and on GKE too.
"""

AHEAD = 8
"""Batches that are read in advance."""


def parser(config=None) -> Parser:
    """The flags; those of a config are its own."""
    flags = Parser(
        prog="python -m fvdm_jax.train", description=__doc__, epilog=HELP, add_help=config is not None
    )
    flags.add_argument("config", metavar="CONFIG.py", help="a file of configs/, or your own")
    flags.add_argument("--out", type=Path, help="the folder of the run: checkpoints, measures, samples")
    flags.add_argument("--plan", action="store_true", help="say what the run will take, and stop")
    flags.add_argument("--synthetic", action="store_true", help="train on noise, without data or weights")
    flags.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write what the run has learned, and stop"
    )
    flags.add_argument(
        "--profile", type=whole, default=0, metavar="N", help="trace N steps, after two of warm-up"
    )
    flags.add_argument(
        "--distributed", action="store_true", help="one of several processes, as the environment says"
    )
    flags.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 is, instead of the environment"
    )
    flags.add_argument("--hosts", type=whole, help="how many processes there are")
    flags.add_argument("--host", type=whole, help="which of them this is, from 0")
    if config is not None:
        from fvdm_jax.config import add_flags

        add_flags(flags, config)
    return flags


class Asked(NamedTuple):
    """What the command line says: the program's own flags, the settings, and what of them was changed."""

    flags: object
    settings: object
    changed: dict


def parse(argv: list[str]) -> Asked:
    """Raises Refusal for a flag or a value that cannot be."""
    path = next((word for word in argv if word.endswith(".py")), None)
    if path is None:
        if {"-h", "--help"} & set(argv):
            Parser.print_help(parser())
            raise SystemExit(0)
        raise Refusal("CONFIG.py", "is missing", "give a file of configs/ first")
    from fvdm_jax import config

    function = config.load(Path(path))
    flags = parser(function).parse_args(argv)
    own = config.options(function)
    given = {name: value for name, value in vars(flags).items() if name in own}
    try:
        settings = function(**given)
    except ValueError as wrong:
        raise Refusal(path, str(wrong)) from wrong
    changed = {name: (own[name], value) for name, value in given.items() if value != own[name]}
    if not (flags.plan or flags.out):
        raise Refusal("--out", "is missing", "give the folder of the run, or --plan")
    return Asked(flags, settings, changed)


def main(argv: list[str]) -> int:
    """Trains what `argv` asks for. Returns 130 or 143 where it was stopped."""
    asked = parse(argv)
    join(asked.flags)
    from fvdm_jax import machine, trainer

    machine.keep_compiled_programs()
    settings = asked.settings
    made = trainer.build(settings, sizes(asked))
    if asked.flags.export:
        return export(asked, made)
    feed = feeding(asked, made)
    tell(asked, made, feed)
    if asked.flags.plan:
        return 0
    with deferred() as stopped, contextlib.ExitStack() as closing:
        return train(begin(asked, made, feed, closing), stopped)


def export(asked: Asked, made) -> int:
    """Writes what the newest checkpoint has learned to a folder, and tells how large the changes are."""
    from fvdm_jax import export, runs

    runs.check(asked.flags.out, asked.settings)
    checkpoints = runs.Checkpoints(asked.flags.out, asked.settings)
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
    import jax

    from fvdm_jax.data import feed

    settings, network = asked.settings, made.network
    kind = feed.Sizes(settings.batch, network.channels_out, network.text_width, settings.text)
    process = jax.process_index(), jax.process_count()
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
        print(f"{name} {value} (the config has {default})")
    print(*trainer.plan(made, feed.clip, len(feed.nothing)), sep="\n")
    print(feed.told)
    if asked.flags.plan:
        print("how near training comes to what each task asks, in its first step and in its last:")
        for step in (0, asked.settings.steps - 1):
            print(coverage.report(asked.settings.curriculum(step), feed.clip[0]))


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
    held: object
    batches: Iterator


def begin(asked: Asked, made, feed, closing: contextlib.ExitStack) -> Session:
    """The run in its folder: from where it stopped if it has, else from the start."""
    import jax

    from fvdm_jax import previews, runs
    from fvdm_jax.data.feed import gathered
    from fvdm_jax.training import Batch

    settings, out, first = asked.settings, asked.flags.out, jax.process_index() == 0
    out.mkdir(parents=True, exist_ok=True)
    runs.check(out, settings)
    checkpoints = runs.Checkpoints(out, settings)
    closing.callback(checkpoints.close)
    invent = asked.flags.synthetic and not Path(settings.model).is_dir()
    frozen, params = (made.invented(), None) if invent else made.load()
    newest, position = checkpoints.newest(), runs.Position(0, 0)
    if newest is None:
        state = made.start(params)
        if first:
            runs.write_settings(out, settings, Path(asked.flags.config))
    else:
        del params
        state, position = checkpoints.restore(newest, made.state)
        if first:
            print(f"goes on after step {newest} of {settings.steps}")
    log = runs.Log(out, newest or 0) if first else None
    if log:
        closing.callback(log.close)
    held = seen = None
    if feed.held:
        latents, text = gathered(feed.held, len(feed.nothing))
        held = Batch(*map(made.whole, (latents, text, feed.nothing)))
        if settings.sample_every:
            seen = previews.prepared(made, out / "samples", feed.held[0], (text[:1], feed.nothing[None]))
    batches = feed.stream(position.batch, workers=settings.workers)
    return Session(asked, made, feed, frozen, state, checkpoints, log, seen, held, batches)


def train(session: Session, stopped: Callable[[], int]) -> int:
    """Trains to the last step, or till a signal; returns the exit code."""
    from fvdm_jax.measures import Meter
    from fvdm_jax.runs import Position

    made, settings, state = session.trainer, session.asked.settings, session.state
    step, code = int(state.step), 0
    with Meter(made, session.log, session.feed.bad) as meter, profiled(session.asked, step) as trace:
        if step == 0:
            look(session, state, step, meter)
        while step < settings.steps and not code:
            with meter.waiting():
                rows = next(session.batches)
                batch = made.batch(rows.latents, rows.states, session.feed.nothing)
            state, told = made.step(state, session.frozen, batch)
            step += 1
            # What a step told is read when the next one runs, so that the device never waits for the host.
            meter.step(step, told, rows)
            trace(step)
            code = agreed(stopped())
            if code or step == settings.steps or step % settings.save_every == 0:
                meter.settle()
                session.checkpoints.save(state, Position(step, step * settings.batch))
            if not code:
                look(session, state, step, meter)
        meter.settle()
        session.checkpoints.wait()
        meter.finish(step, code)
    return code


def look(session: Session, state, step: int, meter) -> None:
    """The error on held-out clips, and samples, where this step is one for them."""
    made, settings = session.trainer, session.asked.settings

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == settings.steps)

    params = made.trained(state)
    if session.held is not None and due(settings.evaluate_every):
        meter.settle()
        errors = made.errors(params, session.frozen, session.held)
        meter.write(step, {f"held_out/{name}": float(error) for name, error in errors.items()})
    if session.previews is not None and due(settings.sample_every):
        meter.settle()
        for path in session.previews.write(step, made.variables(params, session.frozen)):
            meter.say(f"wrote {path}")


def agreed(code: int) -> int:
    """The exit code that any process was asked for, the same for all."""
    import jax

    if jax.process_count() == 1:
        return code
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
