"""Steps of a run made again: whether the devices say now, to the bit, what they said then."""

import contextlib
from collections.abc import Callable

import jax
import numpy as np

from fvdm_jax import integrity, programs, runs, saving, train_run
from fvdm_jax.program import Refusal


def replay(asked, made, feed) -> int:
    """Makes steps again, twice, and prints whether all bits agree. Returns 0 if they do, else 1.

    They begin after the newest checkpoint before the step of --replay, or where the run began, and end with
    the first checkpoint from that step on, whose state theirs has to be; where there is none, with the step
    itself, and the two are compared with each other alone. Nothing in the run's folder is changed, and a run
    may be going on in it. Another mesh or version than the run had may round otherwise. Raises Refusal where
    there is no run, or one of both checkpoints is damaged.
    """
    out, step = asked.flags.out, asked.flags.replay
    tell = print if jax.process_index() == 0 else lambda line: None
    if not (out / runs.SETTINGS).is_file() or not (out / saving.CHECKPOINTS).is_dir():
        raise Refusal("--out", f"{out} holds no run", "train first")
    for line in runs.check(out, asked.settings, asked.options, tuple(asked.flags.allow_change)):
        tell(f"note: {line}")
    with contextlib.closing(saving.Checkpoints(out, asked.settings, read_only=True, tell=tell)) as saved:
        first = max((each for each in saved.steps() if each < step), default=0)
        last = min((each for each in saved.steps() if each >= step), default=step)
        tell(f"makes steps {first + 1} to {last} again, twice")
        again = _again(asked, made, feed, tell)
        made_once, made_twice = (again(saved, first, last) for _ in range(2))
        wrong = _differs(made_once, made_twice, f"steps {first + 1} to {last} made twice")
        told = f"steps {first + 1} to {last} are the same twice, to the bit"
        if last in saved.steps():
            kept = integrity.summed(saving.raw(saved.restore(made.state, only=last)[0]))
            wrong = wrong or _differs(made_once, kept, f"steps {first + 1} to {last}, and what was saved")
            told += ", and what was saved"
    tell(wrong or told)
    return int(bool(wrong))


def _again(asked, made, feed, tell) -> Callable:
    """A function that makes the steps after one checkpoint up to another, and sums up their state."""
    steps, nothing = {}, made.whole(feed.nothing)

    def again(saved: saving.Checkpoints, first: int, last: int) -> integrity.Summed:
        frozen, params = train_run.loaded(asked, made, begins=not first)
        state = saved.restore(made.state, only=first)[0] if first else made.start(params)
        with contextlib.closing(feed.stream(first, workers=asked.settings.workers)) as batches:
            for number in range(first, last):
                rows = next(batches)
                size = rows.latents.shape[1:4]
                if size not in steps:
                    lowered = made.lower(size, len(feed.nothing))
                    steps[size] = programs.compiled(tell, lowered, f"training step ({size})")
                batch = made.batch(rows.latents, rows.states, nothing, number)
                state, _ = jax.block_until_ready(steps[size](state, frozen, batch))
        return integrity.summed(saving.raw(state))

    return again


def _differs(a: integrity.Summed, b: integrity.Summed, what: str) -> str:
    """A line that names the first array that differs, and its first device; empty where none does."""
    places = np.argwhere((a.sums != b.sums).any(-1).T)
    if not len(places):
        return ""
    array, row = places[0]
    count = len({place[0] for place in places.tolist()})
    return f"{what}, differ: {a.paths[array]} on device {a.devices[row]} first, of {count} arrays"
